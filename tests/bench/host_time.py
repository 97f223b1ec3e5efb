"""Python time of a layer's forward on a GPU, with nothing launched: what the card may wait for.

    python tests/bench/host_time.py

No GPU is needed, and none is used: tensors on the CPU go the way of the GPU's, down to the launch
of a kernel, which is left out. Beside it stand F.linear in bfloat16 and the parts of the call that
are PyTorch's own operators; these do their arithmetic on the CPU, for a small layer. The operators
`torch.ops.minilora.*` compute the same, but PyTorch dispatches and every argument is checked. The
last lines add what Triton does on the host for the two launches of a call, but for the function at
its end, written in C: as `kernel[grid](...)` does it, and as this library does it.

A wrong call is not timed: both ways have to launch the same kernels, with equal grids, settings and
arguments. The time is the smallest mean of many rounds, in which the sides take turns.
"""

import argparse
import atexit
import contextlib
import contextvars
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import silent_driver
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minilora
from minilora.kernels.gpu import lora, matmul, runtime
from minilora.kernels.reference.lora import frozen_adapters

O = I = 256
RANK = 8
SHAPES = {"1 x 256": (1, I), "1 x 1 x 256": (1, 1, I), "16 x 256": (16, I)}
CALLS, ROUNDS = 20, 250

Launch = tuple[Any, ...]
Start = Callable[[Any, Any, Any, Any], None]
Sides = dict[str, Callable[[], Any]]

# The library's own, before it is replaced.
launched_by_us = runtime.start


def launched_by_triton(kernel: Any, grid: Any, args: Any, settings: Any) -> None:
    kernel[grid](*args, **settings)


def not_launched(kernel: Any, grid: Any, args: Any, settings: Any) -> None:
    pass


def take_the_gpus_way() -> None:
    """CPU tensors are multiplied by kernels/gpu from now on, which launches nothing.

    Before the first product, which imports its backend.
    """
    for module in (lora, matmul):
        sys.modules[module.__name__.replace(".gpu.", ".cpu.")] = module
    # Lets CPU tensors through the checks.
    runtime.INTERPRETED = True
    runtime.start = not_launched
    silent_driver.activate()


def launches(call: Callable[[], Any]) -> list[Launch]:
    """Returns what a call would launch, in a form that can be compared."""
    recorded: list[Launch] = []

    def start(kernel: Any, grid: Any, args: Any, settings: Any) -> None:
        recorded.append((kernel.__name__, grid, described(args), sorted(settings.items())))

    before, runtime.start = runtime.start, start
    try:
        call()
    finally:
        runtime.start = before
    return recorded


def described(value: Any) -> Any:
    """An argument of a kernel. Buffers are new in each call, so no address is compared."""
    if isinstance(value, tuple):
        return tuple(described(part) for part in value)
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    return value


def check(name: str, call: Callable[[], Any], operator: Callable[[], Any]) -> None:
    found, expected = launches(call), launches(operator)
    if not found or found != expected:
        sys.exit(f"{name}: {found} is launched in place of {expected}, so it is not timed")


def microseconds(sides: Sides) -> dict[str, float]:
    """The smallest mean of each side."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(ROUNDS):
        for name, call in sides.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], 1e6 * (time.perf_counter() - start) / CALLS)
    return best


def layers() -> tuple[nn.Linear, Any, Any, Any]:
    """A dense layer, the same quantized, and with an adapter in bfloat16 and in float32."""
    torch.manual_seed(0)
    dense = nn.Linear(I, O, bias=False).bfloat16()
    plain = minilora.NF4Linear.from_linear(dense).eval()
    adapted = [
        minilora.QLoRALinear(minilora.NF4Linear.from_linear(dense), r=RANK).eval() for _ in range(2)
    ]
    adapted[0].adapters.to(torch.bfloat16)
    return dense, plain, *adapted


def frozen(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A call of a layer inside `frozen_adapters`, as generation makes it."""
    context, inside = contextvars.copy_context(), contextlib.ExitStack()
    context.run(inside.enter_context, frozen_adapters())
    atexit.register(context.run, inside.close)
    return functools.partial(context.run, layer, x)


def started(start: Start, layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A call of a layer whose kernels are launched in this way."""

    def call() -> None:
        runtime.start = start
        layer(x)
        runtime.start = not_launched

    return call


def sides(shape: tuple[int, ...]) -> Sides:
    """What is timed for x of a shape, every side checked."""
    dense, plain, adapted, wide = layers()
    x = torch.randn(*shape).bfloat16()
    (adapter,), (wide_adapter,) = adapted.adapters.values(), wide.adapters.values()
    A, B, factors = adapter.A, adapter.B, (wide_adapter.A, wide_adapter.B)

    operator = torch.ops.minilora.nf4_inference.default
    w = minilora.ops._flatten(plain.weight)
    found: Sides = {
        "F.linear": lambda: F.linear(x, dense.weight),
        "NF4Linear": lambda: plain(x),
        "QLoRALinear": lambda: adapted(x),
        "of this, x A^T": lambda: F.linear(x, A),
        "QLoRALinear, A and B in float32": lambda: wide(x),
        "of this, A and B to bfloat16": lambda: [t.to(x.dtype) for t in factors],
        "the same inside frozen_adapters": frozen(wide, x),
        "operator of NF4Linear": lambda: operator(x, *w, None),
        "operator of QLoRALinear": lambda: operator(x, *w, None, A, B, adapter.scale),
        "NF4Linear, kernel[grid](...)": started(launched_by_triton, plain, x),
        "NF4Linear, launched by minilora": started(launched_by_us, plain, x),
        "QLoRALinear, kernel[grid](...)": started(launched_by_triton, adapted, x),
        "QLoRALinear, launched by minilora": started(launched_by_us, adapted, x),
    }
    check("NF4Linear", found["NF4Linear"], found["operator of NF4Linear"])
    for name in ("QLoRALinear", "QLoRALinear, A and B in float32"):
        check(name, found[name], found["operator of QLoRALinear"])
    check("frozen_adapters", found["the same inside frozen_adapters"], found["QLoRALinear"])
    return found


def processor() -> str:
    """Returns the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the times as JSON, too")
    args = parser.parse_args()

    torch.set_num_threads(1)
    take_the_gpus_way()
    with torch.no_grad():
        found = {name: microseconds(sides(shape)) for name, shape in SHAPES.items()}

    where = f"{processor()}, torch {torch.__version__}, triton {runtime.triton.__version__}"
    print(f"{where}\nmicroseconds per call, {I} x {O}, r={RANK}, bfloat16, no_grad\n")
    heads = [f"x {name}" for name in SHAPES]
    print("| " + " | ".join(["", *heads]) + " |\n|---" + "|---:" * len(heads) + "|")
    for side in found["1 x 256"]:
        cells = [f"{found[name][side]:.1f}" for name in SHAPES]
        print("| " + " | ".join([side, *cells]) + " |")
    if args.out:
        args.out.write_text(json.dumps({"where": where, "us": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
