"""Compiles every Triton kernel as it would be launched, for a GPU that need not be here.

    python tests/tools/compile_gate.py sm_90               every launch
    python tests/tools/compile_gate.py --sample sm_86 ...  the main loops of the products only
    python tests/tools/compile_gate.py --record            lower numbers into sass_budget.json

The result is printed as JSON; `machine_code.py` says what is measured. The launches are the
library's own: its functions are called with `runtime.start` replaced by a recorder, so that what is
compiled has the types, constants and divisibilities of a real call. It needs a process of its own,
without TRITON_INTERPRET.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import machine_code
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minilora.kernels.gpu import choose, dropout, matmul, nf4, runtime, skinny
from minilora.kernels.reference import nf4 as reference
from minilora.kernels.reference.nf4 import PackedWeight

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in CAPABILITIES}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)

POINTERS = {
    torch.uint8: "*u8",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}
BUDGET = Path(__file__).with_name("sass_budget.json")

# The weight that is passed: multiples of 16, as in every real model, and y wider than x. NARROW_I
# is an odd number of blocks, as SmolLM2's 576.
O, I, R = 512, 256, 16
NARROW_I = 192

# The kernels with the main loop of a product.
PRODUCTS = ("_partial", "_forward", "_backward")

Call = tuple[str, Callable[[], Any]]


class Launch(NamedTuple):
    """One kernel as the library starts it."""

    case: str
    kernel: Any
    args: tuple[Any, ...]
    settings: dict[str, Any]


def weights(columns: int = I) -> tuple[Tensor, PackedWeight, PackedWeight]:
    """Returns a dense weight, and the same quantized with and without double quantization."""
    dense = torch.zeros(O, columns)
    packed, absmax = reference.quantize(dense, 64)
    plain = PackedWeight(packed, absmax, None, None, (O, columns), 64)
    double = PackedWeight(packed, *reference.double_quantize(absmax), (O, columns), 64)
    return dense, plain, double


def launches(target: str) -> Iterator[Launch]:
    """Every kernel in every configuration that the library launches."""
    recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    runtime.start = lambda kernel, grid, args, settings: recorded.append((kernel, args, settings))

    # Lets CPU tensors through the checks: nothing runs.
    portable = target.startswith("gfx")
    runtime.INTERPRETED = True
    runtime.PORTABLE = skinny.PORTABLE = portable
    runtime.capability_of = lambda device: capability(target)
    nf4._WORDS = nf4._WARPS * (64 if portable else 32)

    seen = set()
    for case, call in [*conversions(), *products(target)]:
        recorded.clear()
        call()
        for kernel, args, settings in recorded:
            kinds = [v.dtype if isinstance(v, Tensor) else v for _, v in leaves(args)]
            key = kernel.__name__, *kinds, *settings.items()

            # Not twice: the dense path dequantizes as `dequantize` does.
            if key not in seen:
                seen.add(key)
                yield Launch(case.replace("torch.", ""), kernel, args, settings)


def sample(target: str) -> list[Launch]:
    """The products in bfloat16: the skinny kernel of fewest and of most rows, the widest tiles."""
    found: dict[str, list[Launch]] = {name: [] for name in PRODUCTS}
    for launch in launches(target):
        if launch.kernel.__name__ in found and launch.case.endswith(" bfloat16"):
            found[launch.kernel.__name__].append(launch)

    of_skinny, *of_tiles = found.values()
    ends = [of_skinny[0], *of_skinny[1:][-1:]]
    return [*ends, *(tiles[-1] for tiles in of_tiles if tiles)]


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


def products(target: str) -> Iterator[Call]:
    """(case, call) of the products, for every line that a target's GPUs may be given."""
    kinds = {
        "forward": ("float16", "bfloat16", "+ LoRA", "+ LoRA r=8", "plain", "+ bias"),
        "backward": ("float16", "bfloat16", "+ LoRA", "plain"),
    }
    for direction, kind in kinds.items():
        for line in choose.lines(direction, generation(target)):
            for size, M in sizes(line):
                for what in kind:
                    call = functools.partial(product, direction, line, M, what)
                    yield f"{direction} {line['path']} {size} {what}", call

    line = {"path": "skinny"}
    call = functools.partial(product, "forward", line, 1, "bfloat16", NARROW_I)
    yield f"forward skinny M=1 I={NARROW_I}", call


def capability(target: str) -> tuple[int, int] | None:
    """Returns the compute capability of a target, None for AMD's."""
    if target.startswith("gfx"):
        return None
    major, minor = divmod(TARGETS[target].arch, 10)
    return major, minor


def generation(target: str) -> str:
    """Returns whose table of choices a target's GPUs have."""
    found = capability(target)
    return choose.generation_of(*found) if found else "amd"


def sizes(line: dict[str, Any]) -> list[tuple[str, int]]:
    """(name, M) of the launches that a line makes, M rows of x being enough for one of them."""
    if line["path"] == "tile":
        sides = "x".join(str(line[side]) for side in ("BM", "BO", "BI"))
        return [(f"{sides}, {line['stages']} stages", line["BM"])]
    if line["path"] == "dense":
        return [("M=4096", 4096)]

    # The fewest rows of every height that the skinny kernel is compiled for.
    fewest = (M for M in (1, 9, 17, 33) if line["rows"] >= M)
    return [(f"M={M}", M) for M in fewest]


def product(direction: str, line: dict[str, Any], M: int, what: str, columns: int = I) -> None:
    _, plain, double = weights(columns)
    w = plain if what == "plain" else double
    wide, tall = (columns, O) if direction == "forward" else (O, columns)
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


def weights_per_thread(given: dict[str, Any], warps: int) -> float:
    """Weights that a thread decodes in the kernel, or in an iteration of its loop if it has one."""
    threads = 32 * warps
    if "WORDS" in given:
        return 8 * given["WORDS"] * given["TIMES"] / threads
    if "BLOCKS" in given and "MB" in given:
        return skinny.ROWS.value * 64 * given["BLOCKS"] / threads
    return given["BO"] * given["BI"] / threads if "BI" in given else 0


def measure(launches: Iterable[Launch], target: str) -> list[dict[str, Any]]:
    """Compiles launches and describes their machine code."""
    held = list(launches)
    built = [compiled(launch, target) for launch in held]
    if target.startswith("gfx"):
        found = [machine_code.measure_amd(k.asm["amdgcn"]) for k, _, _ in built]
    else:
        cubins = [k.asm["cubin"] for k, _, _ in built]
        codes = machine_code.sass_of_all(cubins, machine_code.architecture(built[0][0]))
        found = [
            machine_code.measure_nvidia(
                k, code, weights_per_thread(given, options["num_warps"]), 32 * options["num_warps"]
            )
            for (k, given, options), code in zip(built, codes, strict=True)
        ]
    return [described(*parts, target) | row for *parts, row in zip(held, built, found, strict=True)]


def described(launch: Launch, built: tuple[Any, ...], target: str) -> dict[str, Any]:
    """What a launch is, and what its kernel may use."""
    k, given, options = built
    constants = {n: v for n, v in given.items() if n.isupper() and isinstance(v, int)}
    return {
        "case": launch.case,
        "kernel": launch.kernel.__name__,
        "target": target,
        "shared": k.metadata.shared,
        "meta": constants | options,
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
        rows = measure(launches(target), target)
        found = {f"{row['case']}: {row['kernel']}": row["instructions"] for row in rows}
        of_version[target] = {key: min(n, held.get(key, n)) for key, n in found.items()}

    BUDGET.write_text(json.dumps(budget, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--sample", action="store_true", help="the products' main loops only")
    parser.add_argument("--record", action="store_true", help="write sass_budget.json")
    args = parser.parse_args()
    if args.record:
        return record()

    chosen = sample if args.sample else launches
    rows = [row for target in args.targets for row in measure(chosen(target), target)]
    print(json.dumps({"triton": triton.__version__, "rows": rows}))
    return None


if __name__ == "__main__":
    main()
