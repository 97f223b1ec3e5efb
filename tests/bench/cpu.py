"""Speed on the CPU of minilora, bitsandbytes and dense PyTorch, 4096 x 4096.

    python tests/bench/cpu.py

Every side runs in a process of its own, because two OpenMP runtimes in one process slow each other
down, and the sides take turns. Each turn gives the median of many calls; the table shows each
side's best turn. A wrong result is not timed: every side is first compared with the reference.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor

from minilora.kernels.reference import nf4 as reference

N = 4096
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What to time, and how many calls.
Case = tuple[Callable[[], object], int]


def weight(dtype: torch.dtype) -> Tensor:
    return torch.randn(N, N, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)


def inputs(rows: int) -> Tensor:
    return torch.randn(rows, N, generator=torch.Generator().manual_seed(rows)).bfloat16()


def check(name: str, right: bool) -> None:
    if not right:
        sys.exit(f"{name}: the result is wrong, so it is not timed")


def check_product(name: str, y: Tensor, x: Tensor, W: Tensor) -> None:
    """Compares bfloat16 products with float64: a rounding of the result, 2^-8, and of the sums."""
    exact = x.double() @ W.double().T
    bound = 2**-8 * exact.abs() + 2**-14 * (x.double().abs() @ W.double().abs().T)
    check(name, bool(((y.double() - exact).abs() <= bound).all()))


def products(
    layer: Callable[[Tensor], Tensor], W: Tensor, W_one: Tensor | None = None
) -> dict[str, Case]:
    """Forward, and forward + backward, for some numbers of rows.

    `W_one` is the weight that a single row is multiplied by, if it is another one.
    """
    cases: dict[str, Case] = {}
    for rows in (1, 256, 1024):
        x = inputs(rows)
        expected = W if rows > 1 or W_one is None else W_one
        check_product(f"product M={rows}", layer(x), x, expected)
        leaf, dy = x.clone().requires_grad_(), inputs(rows)

        def both(leaf: Tensor = leaf, dy: Tensor = dy) -> None:
            leaf.grad = None
            layer(leaf).backward(dy)

        both()
        assert leaf.grad is not None
        check_product(f"gradient M={rows}", leaf.grad, dy, W.T)

        def forward(x: Tensor = x) -> Tensor:
            with torch.no_grad():
                return layer(x)

        calls = 60 if rows == 1 else 20 if rows == 256 else 9
        cases[f"product, M={rows}, forward"] = forward, calls
        if rows > 1:
            cases[f"product, M={rows}, forward + backward"] = both, calls
    return cases


def ours() -> dict[str, Case]:
    import minilora

    cases: dict[str, Case] = {}
    for name, dtype in FLOATS.items():
        w = weight(dtype)
        packed, absmax = reference.quantize(w, 64)
        for double in (False, True):
            q = minilora.quantize_nf4(w, double_quant=double)
            check("quantize", torch.equal(q.packed, packed))
            constants = reference.double_quantize(absmax) if double else (absmax, None, None)
            expected = reference.PackedWeight(packed, *constants, (N, N), 64)
            dense = reference.dequantize(expected, dtype)
            check("dequantize", torch.equal(q.dequantize(), dense))

            kind = "double" if double else "plain"
            cases[f"dequantize, {kind}, {name}"] = (lambda q=q: q.dequantize()), 20
        cases[f"quantize, double, {name}"] = (lambda w=w: minilora.quantize_nf4(w)), 9
    q = minilora.quantize_nf4(weight(torch.bfloat16))
    return cases | products(
        lambda x: minilora.nf4_linear(x, q), q.dequantize(), q.dequantize(torch.float32)
    )


def bitsandbytes() -> dict[str, Case]:
    import bitsandbytes as bnb
    from bitsandbytes import functional as B

    nf4 = {"quant_type": "nf4", "compress_statistics": True}
    cases: dict[str, Case] = {}
    for name, dtype in FLOATS.items():
        w = weight(dtype)
        for double in (False, True):
            options = nf4 | {"compress_statistics": double}
            q, state = B.quantize_4bit(w, blocksize=64, **options)
            check("quantize", torch.equal(q.view(-1), reference.quantize(w, 64)[0]))

            kind = "double" if double else "plain"
            dequantize = functools.partial(B.dequantize_4bit, q, state)
            cases[f"dequantize, {kind}, {name}"] = dequantize, 20
        quantize = functools.partial(B.quantize_4bit, w, blocksize=64, **nf4)
        cases[f"quantize, double, {name}"] = quantize, 9

    layer = bnb.nn.Linear4bit(N, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight(torch.bfloat16), requires_grad=False, **nf4)
    layer = layer.to("cpu").train()
    return cases | products(layer, B.dequantize_4bit(layer.weight.data, layer.weight.quant_state))


def dense() -> dict[str, Case]:
    W = weight(torch.bfloat16)
    return products(lambda x: torch.nn.functional.linear(x, W), W)


SIDES: dict[str, Callable[[], dict[str, Case]]] = {
    "minilora": ours,
    "bitsandbytes": bitsandbytes,
    "dense": dense,
}


def measure(side: str, threads: int) -> dict[str, float]:
    """Median milliseconds of each case, in this process."""
    torch.set_num_threads(threads)
    medians = {}
    for name, (call, calls) in SIDES[side]().items():
        times = []
        for i in range(calls + 2):
            start = time.perf_counter()
            call()
            # Two calls to warm up.
            if i >= 2:
                times.append(1e3 * (time.perf_counter() - start))
        medians[name] = statistics.median(times)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--side", choices=SIDES, help="measure one side and print JSON (what each process runs)"
    )
    args = parser.parse_args()
    if args.side:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(args.side, args.threads)))
        return
    print_table(best_of(args.turns, args.threads), args.turns, args.threads)


def best_of(turns: int, threads: int) -> dict[str, dict[str, float]]:
    """Side -> case -> the smallest median, in milliseconds."""
    best: dict[str, dict[str, float]] = {side: {} for side in SIDES}
    for turn in range(turns):
        for side in SIDES:
            print(f"turn {turn + 1} of {turns}: {side}", file=sys.stderr)
            command = [sys.executable, __file__, "--side", side, "--threads", str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{side}: {done.stderr.strip().splitlines()[-1]}")
            for name, ms in json.loads(done.stdout.splitlines()[-1]).items():
                best[side][name] = min(ms, best[side].get(name, ms))
    return best


def print_table(best: dict[str, dict[str, float]], turns: int, threads: int) -> None:
    packages = ("torch", "numba", "bitsandbytes", "numpy")
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in packages)
    capabilities = torch.cpu.get_capabilities()
    bf16 = [n for n in ("avx512_bf16", "amx_bf16") if capabilities.get(n)]
    units = ", ".join(bf16) or "no bfloat16 unit"
    print(f"{N} x {N}, blocks of 64, {threads} threads; {platform.machine()} with {units}")
    print(f"Python {platform.python_version()}, {versions}")
    print(f"milliseconds, best of {turns} medians\n")

    print("| case | minilora | bitsandbytes | its time / ours | dense bfloat16 | ours / dense |")
    print("|---|---|---|---|---|---|")
    for name, mine in best["minilora"].items():
        theirs, dense = best["bitsandbytes"].get(name), best["dense"].get(name)
        row = [name, f"{mine:.2f}"]
        row += [f"{theirs:.2f}", f"{theirs / mine:.2f}"] if theirs else ["", ""]
        row += [f"{dense:.2f}", f"{mine / dense:.2f}"] if dense else ["", ""]
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
