"""Compiles every Triton kernel as it would be launched, for a GPU that need not be here.

    python tests/tools/compile_gate.py sm_90            (sm_80, sm_90, sm_100, gfx942)
    python tests/tools/compile_gate.py --record         writes sass_budget.json: lower numbers only

The result is printed as JSON. The launches are the library's own: its functions are called with
`runtime.start` replaced by a recorder, so that what is compiled has the types, constants and
divisibilities of a real call. It needs a process of its own, without TRITON_INTERPRET.
"""

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minilora.kernels.gpu import choose, dropout, matmul, nf4, runtime, skinny
from minilora.kernels.reference import nf4 as reference
from minilora.kernels.reference.nf4 import PackedWeight

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.uint8: "*u8",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BUDGET = Path(__file__).with_name("sass_budget.json")

# The weight that is passed: multiples of 16, as in every real model, and y wider than x.
O, I, R = 512, 256, 16

Call = tuple[str, Callable[[], Any]]


class Launch(NamedTuple):
    """One kernel as the library starts it."""

    case: str
    kernel: Any
    args: tuple[Any, ...]
    settings: dict[str, Any]


def weights() -> tuple[Tensor, PackedWeight, PackedWeight]:
    """Returns a dense weight, and the same quantized with and without double quantization."""
    dense = torch.zeros(O, I)
    packed, absmax = reference.quantize(dense, 64)
    plain = PackedWeight(packed, absmax, None, None, (O, I), 64)
    double = PackedWeight(packed, *reference.double_quantize(absmax), (O, I), 64)
    return dense, plain, double


def launches(portable: bool) -> Iterator[Launch]:
    """Every kernel in every configuration that the library launches."""
    recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    runtime.start = lambda kernel, grid, args, settings: recorded.append((kernel, args, settings))

    # Lets CPU tensors through the checks: nothing runs.
    runtime.INTERPRETED = True
    runtime.PORTABLE = skinny.PORTABLE = portable
    nf4._WORDS = nf4._WARPS * (64 if portable else 32)

    seen = set()
    for case, call in [*conversions(), *products()]:
        recorded.clear()
        call()
        for kernel, args, settings in recorded:
            kinds = [v.dtype if isinstance(v, Tensor) else v for _, v in leaves(args)]
            key = kernel.__name__, *kinds, *settings.items()

            # Not twice: the dense path dequantizes as `dequantize` does.
            if key not in seen:
                seen.add(key)
                yield Launch(case.replace("torch.", ""), kernel, args, settings)


def leaves(value: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """The arguments of a launch with their places, those inside named tuples too."""
    if not isinstance(value, tuple):
        yield path, value
        return
    for i, part in enumerate(value):
        yield from leaves(part, (*path, i))


def conversions() -> Iterator[Call]:
    """(case, call) of quantizing and dequantizing."""
    dense, plain, double = weights()
    odd = PackedWeight(plain.packed[:33], plain.absmax[:2], None, None, (65,), 64)
    assert double.absmax2 is not None and double.offset is not None
    codes = double.absmax, double.absmax2, double.offset

    for dtype in (torch.float32, torch.bfloat16):
        yield f"quantize {dtype}", functools.partial(nf4.quantize, dense.to(dtype), 64)
    yield "quantize blocks of 4096", lambda: nf4.quantize(dense, 4096)

    yield "double quantization", lambda: nf4.double_quantize(plain.absmax)
    yield "double quantization, back", lambda: nf4.double_dequantize(*codes)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield f"dequantize to {dtype}", functools.partial(nf4.dequantize, double, dtype)
    yield "dequantize plain", lambda: nf4.dequantize(plain, torch.bfloat16)
    yield "dequantize odd", lambda: nf4.dequantize(odd, torch.bfloat16)
    yield "dropout", lambda: dropout.dropout(dense.to(torch.bfloat16), 0.1, torch.tensor(1))


def products() -> Iterator[Call]:
    """(case, call) of the products, for every line of the table of choices."""
    kinds = {
        "forward": ("float16", "bfloat16", "+ LoRA", "+ LoRA r=8", "plain", "+ bias"),
        "backward": ("float16", "bfloat16", "+ LoRA", "plain"),
    }
    for direction, kind in kinds.items():
        for line in choose.lines(direction):
            rows = {"skinny": (1, 9), "tile": (line.get("rows", 1),), "dense": (4096,)}
            for M in rows[line["path"]]:
                for what in kind:
                    call = functools.partial(product, direction, line, M, what)
                    yield f"{direction} {line['path']} M={M} {what}", call


def product(direction: str, line: dict[str, Any], M: int, what: str) -> None:
    _, plain, double = weights()
    w = plain if what == "plain" else double
    wide, tall = (I, O) if direction == "forward" else (O, I)
    dtype = torch.float16 if what == "float16" else torch.bfloat16
    x = torch.zeros(M, wide, dtype=dtype)

    low = None
    if "LoRA" in what:
        r = 8 if "r=8" in what else R
        right = torch.zeros(tall, r, dtype=dtype)
        right = right if direction == "forward" else right.T.contiguous().T
        low = runtime.LowRank(torch.zeros(M, r, dtype=dtype), right, 2.0)

    if direction == "forward":
        bias = x.new_zeros(O) if "bias" in what else None
        matmul.forward(x, w, bias, low, line)
    else:
        matmul.backward(x, w, low, line)


def compiled(launch: Launch, target: str) -> Any:
    """Compiles as the JIT would specialize; returns the kernel, its arguments and its options.

    None and 1 are constants; integers and pointers may be multiples of 16.
    """
    kernel, settings = launch.kernel, launch.settings
    names = kernel.arg_names
    given = dict(zip(names, launch.args, strict=False))
    given |= {k: v for k, v in settings.items() if k in names}
    options = {k: v for k, v in settings.items() if k not in names}

    constexprs = {names[i] for i in kernel.constexprs}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def kind(path: tuple[int, ...], value: Any) -> Any:
        """The type of an argument, and its entries in `constants` and `attributes`."""
        if isinstance(value, tuple):
            return type(value)(*(kind((*path, i), part) for i, part in enumerate(value)))
        if value is None or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor):
            # Triton sees that a tensor is aligned, and under 2 GB.
            attributes[path] = [["tt.divisibility", 16]] if value.data_ptr() % 16 == 0 else []
            if target.startswith("gfx"):
                attributes[path].append(["tt.pointer_range", 32])
            return POINTERS[value.dtype]
        if isinstance(value, int) and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, float):
            return "fp32"
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature: dict[str, Any] = {}
    for i, name in enumerate(names):
        if name in constexprs:
            signature[name], constants[(i,)] = "constexpr", given[name]
        else:
            signature[name] = kind((i,), given[name])

    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=options), given, options


def cuobjdump(flag: str, path: str) -> str:
    command = [str(CUOBJDUMP), flag, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sass(cubin: bytes) -> tuple[list[tuple[int, str, str]], int]:
    """Returns the instructions (address, name, operands) without padding, and bytes of stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = cuobjdump("-sass", file.name)
        usage = cuobjdump("--dump-resource-usage", file.name)

    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", text)
    lines = [(int(address, 16), name, rest) for address, name, rest in found]
    while lines and lines[-1][1] in ("NOP", "BRA"):
        lines.pop()

    stack = re.search(r"STACK:(\d+)", usage)
    assert lines and stack, "cuobjdump printed something else than expected"
    return lines, int(stack[1])


def loops(lines: list[tuple[int, str, str]]) -> list[list[str]]:
    """The instructions from the target of each backward branch to the branch, longest first."""
    found = []
    for address, name, rest in lines:
        to = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if to and int(to[1], 16) < address:
            first = int(to[1], 16)
            found.append([name for at, name, _ in lines if first <= at <= address])
    return sorted(found, key=len, reverse=True)


def weights_per_thread(given: dict[str, Any], warps: int) -> float:
    """Weights that a thread decodes in the kernel, or in an iteration of its loop if it has one."""
    threads = 32 * warps
    if "WORDS" in given:
        return 8 * given["WORDS"] * given["TIMES"] / threads
    if "BLOCKS" in given and "MB" in given:
        return 64 * 64 * given["BLOCKS"] / threads
    return given["BO"] * given["BI"] / threads if "BI" in given else 0


def measure(launch: Launch, target: str) -> dict[str, Any]:
    """Compiles a launch and describes its machine code."""
    k, given, options = compiled(launch, target)
    sizes = {n: v for n, v in given.items() if n.isupper() and isinstance(v, int)}
    row = {
        "case": launch.case,
        "kernel": launch.kernel.__name__,
        "target": target,
        "shared": k.metadata.shared,
        "meta": sizes | options,
    }
    if target.startswith("gfx"):
        return row | measure_amd(k.asm["amdgcn"])
    return row | measure_nvidia(k, weights_per_thread(given, options["num_warps"]))


def measure_amd(text: str) -> dict[str, Any]:
    def directive(key: str) -> int:
        value = re.search(rf"{re.escape(key)}:\s+(\d+)", text)
        assert value, f"{key} is not in the assembly"
        return int(value[1])

    return {
        "spills": directive(".vgpr_spill_count"),
        "stack": directive(".private_segment_fixed_size"),
        "registers": directive(".vgpr_count"),
        "mfma": text.count("v_mfma"),
        "wide": len(re.findall(r"_(?:load|store)_dwordx4", text)),
    }


def measure_nvidia(k: Any, weights: float) -> dict[str, Any]:
    ptx = k.asm["ptx"]
    lines, stack = sass(k.asm["cubin"])
    found = loops(lines)
    body = found[0] if found else [name for _, name, _ in lines]
    wide = [name for _, name, _ in lines if ".128" in name]
    return {
        "stack": stack,
        "spills": sum(name.startswith(("LDL", "STL")) for loop in found for name in loop),
        "instructions": len(body),
        "per weight": round(len(body) / weights, 2) if weights else None,
        "wgmma": ptx.count("wgmma.mma_async"),
        "wide": sum(name.startswith(("LDG", "STG", "LDGSTS")) for name in wide),
        "f64": ".f64" in ptx,
        "div.full": "div.full" in ptx,
    }


def record() -> None:
    """Takes over what is new or lower.

    A number that may rise is changed by hand, where a reader of the change sees it.
    """
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    of_version = budget.setdefault(triton.__version__, {})

    for target in TARGETS:
        if target.startswith("gfx"):
            continue
        held = of_version.get(target, {})
        rows = everything(target)
        found = {f"{row['case']}: {row['kernel']}": row["instructions"] for row in rows}
        of_version[target] = {key: min(n, held.get(key, n)) for key, n in found.items()}

    BUDGET.write_text(json.dumps(budget, indent=1) + "\n")


def everything(target: str) -> list[dict[str, Any]]:
    return [measure(launch, target) for launch in launches(portable=target.startswith("gfx"))]


def main() -> None:
    if sys.argv[1] == "--record":
        record()
    else:
        print(json.dumps({"triton": triton.__version__, "rows": everything(sys.argv[1])}))


if __name__ == "__main__":
    main()
