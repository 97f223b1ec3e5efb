"""Python time of a layer's forward on a GPU, with nothing launched: what the card may wait for.

    python tests/bench/host_time.py

No GPU is needed, and none is used: tensors on the CPU go the way of the GPU's, down to the launch
of a kernel, which is left out. Beside it stand F.linear in bfloat16 and the parts of the call that
are PyTorch's own operators; these do their arithmetic on the CPU, for a small layer. The last
columns are the same products through the operators `torch.ops.minilora.*`, where PyTorch
dispatches and every argument is checked.

A wrong call is not timed: both ways have to launch the same kernels, with equal grids, settings and
arguments. The time is the smallest mean of several rounds, in which the sides take turns.
"""

import argparse
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import minilora
from minilora.kernels.gpu import lora, matmul, runtime

O = I = 256
RANK = 8
ROWS = (1, 16)
CALLS, ROUNDS = 20, 250

Launch = tuple[Any, ...]
Sides = dict[str, Callable[[], Any]]


def take_the_gpus_way() -> None:
    """CPU tensors are multiplied by kernels/gpu from now on, which launches nothing.

    Before the first product, which imports its backend.
    """
    for module in (lora, matmul):
        sys.modules[module.__name__.replace(".gpu.", ".cpu.")] = module
    # Lets CPU tensors through the checks.
    runtime.INTERPRETED = True
    runtime.start = lambda *_: None


def launches(call: Callable[[], Any]) -> list[Launch]:
    """Returns what a call would launch, in a form that can be compared."""
    recorded: list[Launch] = []

    def start(kernel: Any, grid: Any, args: Any, settings: Any) -> None:
        recorded.append((kernel.__name__, grid, described(args), sorted(settings.items())))

    silent, runtime.start = runtime.start, start
    try:
        call()
    finally:
        runtime.start = silent
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


def sides(rows: int) -> Sides:
    """What is timed for so many rows of x, every side checked."""
    torch.manual_seed(0)
    x = torch.randn(rows, I).bfloat16()
    dense = torch.nn.Linear(I, O, bias=False).bfloat16()
    plain = minilora.NF4Linear.from_linear(dense).eval()
    adapted = minilora.QLoRALinear(minilora.NF4Linear.from_linear(dense), r=RANK).eval()
    adapter = adapted.adapters[adapted.active[0]]
    A, B = (t.detach().bfloat16() for t in (adapter.A, adapter.B))
    halves = types.SimpleNamespace(A=torch.nn.Parameter(A), B=torch.nn.Parameter(B))
    rounded = minilora.QLoRALinear(minilora.NF4Linear.from_linear(dense), r=RANK).eval()
    rounded.adapters[rounded.active[0]].A = halves.A
    rounded.adapters[rounded.active[0]].B = halves.B

    operator = torch.ops.minilora.nf4_inference.default
    w = minilora.ops._flatten(plain.weight)
    a = minilora.ops._flatten(adapted.weight)
    found: Sides = {
        "F.linear": lambda: F.linear(x, dense.weight),
        "NF4Linear": lambda: plain(x),
        "QLoRALinear": lambda: rounded(x),
        "QLoRALinear, A and B in float32": lambda: adapted(x),
        "of it x A^T": lambda: x @ A.T,
        "of it A and B to bfloat16": lambda: (adapter.A.to(x.dtype), adapter.B.to(x.dtype)),
        "operator, NF4": lambda: operator(x, *w, None),
        "operator, QLoRA": lambda: operator(x, *a, None, A, B, adapter.scale),
    }
    check("NF4Linear", found["NF4Linear"], found["operator, NF4"])
    for name in ("QLoRALinear", "QLoRALinear, A and B in float32"):
        check(name, found[name], found["operator, QLoRA"])
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
        found = {rows: microseconds(sides(rows)) for rows in ROWS}

    where = f"{processor()}, torch {torch.__version__}, triton {runtime.triton.__version__}"
    print(f"{where}\nmicroseconds per call, {I} x {O}, r={RANK}, bfloat16, no_grad\n")
    heads = [f"M = {rows}" for rows in ROWS]
    print("| " + " | ".join(["", *heads]) + " |\n|---" + "|---:" * len(heads) + "|")
    for side in found[ROWS[0]]:
        print("| " + " | ".join([side, *(f"{found[rows][side]:.1f}" for rows in ROWS)]) + " |")
    if args.out:
        args.out.write_text(json.dumps({"where": where, "us": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
