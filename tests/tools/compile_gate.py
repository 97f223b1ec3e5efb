"""Compiles every Triton kernel as it would be launched, for one GPU that need not be here, and prints what came out as JSON.

    python tests/tools/compile_gate.py sm_90            (sm_80, sm_90, sm_100, gfx942)
    python tests/tools/compile_gate.py --record         writes sass_budget.json for this triton: lower numbers only

The launches are the library's own: its functions are called with `runtime.start` replaced by a recorder, so that what is compiled
has the types, constants and divisibilities that a real call has. Needs a process of its own, without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minilora.kernels.gpu import choose, matmul, nf4, runtime, skinny
from minilora.kernels.reference import nf4 as reference

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BUDGET = Path(__file__).with_name("sass_budget.json")
O, I, R = (
    512,
    256,
    16,
)  # the weight that is passed: multiples of 16, as in every real model, and y wider than x


def launches(portable: bool) -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """(name, kernel, arguments, settings) of every kernel in every configuration that the library launches."""
    recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    runtime.start = lambda kernel, grid, args, settings: recorded.append((kernel, args, settings))
    runtime.INTERPRETED = True  # lets CPU tensors through the checks: nothing runs
    runtime.PORTABLE = skinny.PORTABLE = portable
    nf4._WORDS = nf4._WARPS * (64 if portable else 32)
    weight = torch.zeros(O, I)
    packed, absmax = reference.quantize(weight, 64)
    double = packed, *reference.double_quantize(absmax)
    plain = packed, absmax, None, None

    def calls() -> Iterator[tuple[str, Any]]:
        for dtype in (torch.float32, torch.bfloat16):
            yield f"quantize {dtype}", lambda dtype=dtype: nf4.quantize(weight.to(dtype), 64)
        yield "quantize blocks of 4096", lambda: nf4.quantize(weight, 4096)
        yield "double quantization", lambda: nf4.double_quantize(absmax)
        yield "double quantization, back", lambda: nf4.double_dequantize(*double[1:])
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield (
                f"dequantize to {dtype}",
                lambda dtype=dtype: nf4.dequantize(*double, (O, I), dtype, 64),
            )
        yield "dequantize plain", lambda: nf4.dequantize(*plain, (O, I), torch.bfloat16, 64)
        yield (
            "dequantize odd",
            lambda: nf4.dequantize(packed[:33], absmax[:2], None, None, (65,), torch.bfloat16, 64),
        )
        for direction in ("forward", "backward"):
            for line in choose.lines(direction):
                for M in {"skinny": (1, 9), "tile": (line.get("rows", 1),), "dense": (4096,)}[
                    line["path"]
                ]:
                    for what in ("float16", "bfloat16", "+ LoRA", "+ LoRA r=8", "plain", "+ bias"):
                        if what not in ("+ bias", "+ LoRA r=8") or direction == "forward":
                            state = plain if what == "plain" else double
                            yield (
                                f"{direction} {line['path']} M={M} {what}",
                                lambda a=(direction, line, M, what, state): product(*a),
                            )

    seen = set()
    for name, call in calls():
        recorded.clear()
        call()
        for kernel, args, settings in recorded:
            key = (
                kernel.__name__,
                *(a.dtype if isinstance(a, Tensor) else a for a in args),
                *settings.items(),
            )
            if key not in seen:  # the dense path decodes as `dequantize` does
                seen.add(key)
                yield name.replace("torch.", ""), kernel, args, settings


def product(direction: str, line: dict[str, Any], M: int, what: str, weight: Any) -> None:
    wide, tall = (I, O) if direction == "forward" else (O, I)
    dtype = torch.float16 if what == "float16" else torch.bfloat16
    r = 8 if "r=8" in what else R
    x, left, right = (torch.zeros(size, dtype=dtype) for size in ((M, wide), (M, r), (tall, r)))
    low = (
        matmul.LowRank(left, right if direction == "forward" else right.T.contiguous().T, 2.0)
        if "LoRA" in what
        else None
    )
    if direction == "forward":
        matmul.forward(x, weight, x.new_zeros(O) if "bias" in what else None, low, (O, I), 64, line)
    else:
        matmul.backward(x, weight, low, (O, I), 64, line)


def compiled(kernel: Any, args: tuple[Any, ...], settings: dict[str, Any], target: str) -> Any:
    """Compiles as the JIT would specialise: None and 1 are constants, integers and pointers may be multiples of 16."""
    names = kernel.arg_names
    given = dict(zip(names, args, strict=False)) | {k: v for k, v in settings.items() if k in names}
    options = {k: v for k, v in settings.items() if k not in names}
    constexprs = {names[i] for i in kernel.constexprs}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, name in enumerate(names):
        value = given[name]
        if name in constexprs or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            kinds = {
                torch.uint8: "u8",
                torch.float32: "fp32",
                torch.float16: "fp16",
                torch.bfloat16: "bf16",
            }
            signature[name] = "*" + kinds[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]  # the allocator's
            if target.startswith("gfx"):
                attributes[(i,)].append(
                    ["tt.pointer_range", 32]
                )  # what triton sees of a tensor under 2 GB
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=options), given, options


def sass(cubin: bytes) -> tuple[list[tuple[int, str, str]], int]:
    """Returns the instructions (address, name, operands) without the filling at the end, and bytes of stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, usage = (
            subprocess.run(
                [str(CUOBJDUMP), flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-sass", "--dump-resource-usage")
        )
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", text)
    lines = [(int(address, 16), name, rest) for address, name, rest in found]
    while lines and lines[-1][1] in ("NOP", "BRA"):
        lines.pop()
    stack = re.search(r"STACK:(\d+)", usage)
    assert lines and stack, "cuobjdump printed something else than expected"
    return lines, int(stack[1])


def loops(lines: list[tuple[int, str, str]]) -> list[list[str]]:
    """The instructions between the target of each branch back and the branch, the longest loop first."""
    found = []
    for address, name, rest in lines:
        to = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if to and int(to[1], 16) < address:
            found.append([name for at, name, _ in lines if int(to[1], 16) <= at <= address])
    return sorted(found, key=len, reverse=True)


def weights_a_thread(name: str, given: dict[str, Any], warps: int) -> float:
    """Weights that a thread decodes: in the whole kernel where it has no loop, in one round of the loop where it has."""
    if "WORDS" in given:
        return 8 * given["WORDS"] * given["TIMES"] / (32 * warps)
    if "BLOCKS" in given and "MB" in given:
        return 64 * 64 * given["BLOCKS"] / (32 * warps)
    return given["BO"] * given["BI"] / (32 * warps) if "BI" in given else 0


def measure(
    name: str, kernel: Any, args: tuple[Any, ...], settings: dict[str, Any], target: str
) -> dict[str, Any]:
    k, given, options = compiled(kernel, args, settings, target)
    row = {"case": name, "kernel": kernel.__name__, "target": target, "shared": k.metadata.shared}
    row |= {
        "meta": {n: v for n, v in given.items() if n.isupper() and not isinstance(v, Tensor)}
        | options
    }
    if target.startswith("gfx"):
        text = k.asm["amdgcn"]
        for field, key in (
            ("spills", ".vgpr_spill_count"),
            ("stack", ".private_segment_fixed_size"),
            ("registers", ".vgpr_count"),
        ):
            value = re.search(rf"{re.escape(key)}:\s+(\d+)", text)
            assert value, f"{key} is not in the assembly"
            row[field] = int(value[1])
        return row | {
            "mfma": text.count("v_mfma"),
            "wide": len(re.findall(r"_(?:load|store)_dwordx4", text)),
        }
    ptx = k.asm["ptx"]
    lines, stack = sass(k.asm["cubin"])
    found = loops(lines)
    body = found[0] if found else [n for _, n, _ in lines]
    weights = weights_a_thread(name, given, options["num_warps"])
    return row | {
        "stack": stack,
        "spills": sum(n.startswith(("LDL", "STL")) for loop in found for n in loop),
        "instructions": len(body),
        "a weight": round(len(body) / weights, 2) if weights else None,
        "wgmma": ptx.count("wgmma.mma_async"),
        "wide": sum(n.startswith(("LDG", "STG", "LDGSTS")) and ".128" in n for _, n, _ in lines),
        "f64": ".f64" in ptx,
        "div.full": "div.full" in ptx,
    }


def record() -> None:
    """Takes over what is new or lower. A number that may rise is changed by hand, where a reader of the change sees it."""
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    for target in TARGETS:
        if not target.startswith("gfx"):
            held = budget.setdefault(triton.__version__, {}).setdefault(target, {})
            found = {
                f"{row['case']}: {row['kernel']}": row["instructions"] for row in everything(target)
            }
            budget[triton.__version__][target] = {
                key: min(n, held.get(key, n)) for key, n in found.items()
            }
    BUDGET.write_text(json.dumps(budget, indent=1) + "\n")


def everything(target: str) -> list[dict[str, Any]]:
    return [measure(*launch, target) for launch in launches(portable=target.startswith("gfx"))]


def main() -> None:
    if sys.argv[1] == "--record":
        record()
    else:
        print(json.dumps({"triton": triton.__version__, "rows": everything(sys.argv[1])}))


if __name__ == "__main__":
    main()
