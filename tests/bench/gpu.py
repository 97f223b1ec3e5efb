"""Speed on a GPU of minilora's Triton kernels, bitsandbytes, dequantize + cuBLAS, and cuBLAS alone.

    python tests/bench/gpu.py

checks every kernel, then prints one table and writes it to bench-gpu.json.

    python tests/bench/gpu.py --tune

times every path and tile, and rewrites kernels/gpu/choices.json for this card.

A time is that of the work on the card: n calls are captured in a CUDA graph with the L2 cache
emptied before each, and the time of a graph that only empties it is subtracted. Medians of many. A
wrong result is not timed: every side is first compared with the reference. Without a GPU it says
so.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

import minilora
from minilora import ops
from minilora.kernels.gpu import choose, matmul
from minilora.kernels.reference import nf4 as reference

# (out, in): a 7B Llama's attention and MLP.
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
CALLS, REPEATS = 20, 15
R = 16
TUNED = (4096, 4096)
DEVICE = "cuda"

# What --tune tries.
TILES = [
    {"path": "tile", "BM": BM, "BO": BO, "BI": BI, "warps": warps, "stages": stages}
    for BM, BO, BI, warps, stages in itertools.product(
        (16, 32, 64, 128), (32, 64, 128), (64, 128), (4, 8), (2, 3, 4)
    )
]
Sides = dict[str, Callable[[], Any]]


def check(name: str, right: bool) -> None:
    if not right:
        sys.exit(f"{name}: the result is wrong, so it is not timed")


def check_product(name: str, y: Tensor, x: Tensor, W: Tensor) -> None:
    """Compares a bfloat16 product with float64.

    The result is rounded once, by 2^-8 at most; W or its levels once each, by some 2^-9, errors
    that add up as their squares do: eight standard deviations of them.
    """
    exact = x.double() @ W.double().T
    spread = (x.double().square() @ W.double().square().T).sqrt()
    check(name, y.shape == exact.shape)
    bound = 2**-8 * exact.abs() + 8 * 2**-9 * spread
    check(name, bool(((y.double() - exact).abs() <= bound).all()))


def check_everything() -> None:
    """Every kernel against the reference; bitsandbytes too, where it is installed."""
    for O, I in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            check_quantization(gaussian(O, I, dtype))
        check_products(O, I)


def check_quantization(W: Tensor) -> None:
    packed, absmax = reference.quantize(W, 64)
    for double in (False, True):
        w = minilora.quantize_nf4(W, double_quant=double)
        constants = reference.double_quantize(absmax) if double else (absmax, None, None)
        expected = reference.PackedWeight(packed, *constants, tuple(W.shape), 64)
        for found, part in zip(w.tensors, expected.tensors, strict=True):
            check("quantize", found is part is None or torch.equal(found, part))
        dense = reference.dequantize(expected, W.dtype)
        check("dequantize", torch.equal(w.dequantize(), dense))

    bnb = bitsandbytes()
    if bnb:
        theirs, state = bnb.functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
        # Its CUDA build codes a block of zeros as 0.
        zero = absmax.repeat_interleave(32)[: packed.numel()] == 0
        check("bitsandbytes' bytes", bool(((theirs.view(-1) == packed) | zero).all()))
        check("bitsandbytes' absmax", torch.equal(state.absmax, absmax))


def check_products(O: int, I: int) -> None:
    w = minilora.quantize_nf4(gaussian(O, I))
    W = w.dequantize(torch.float32)
    A, B = gaussian(R, I), gaussian(O, R)
    for M in ROWS:
        x, dy = gaussian(M, I), gaussian(M, O)
        check_product(f"forward M={M}", minilora.nf4_linear(x, w), x, W)
        check_product(f"backward M={M}", ops.nf4_linear_backward(dy, w), dy, W.T)
        both = torch.cat([x, x @ A.T], 1), torch.cat([W, 2 * B.float()], 1)
        check_product(f"LoRA M={M}", minilora.lora_linear(x, w, A, B, 2.0), *both)


def bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError:
        return None
    return bitsandbytes


def gaussian(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(rows << 16 | columns)
    return (0.02 * torch.randn(rows, columns, generator=generator)).to(DEVICE, dtype)


class Clock:
    def __init__(self) -> None:
        # More than any L2 cache.
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
        self.empty = self._graph(lambda: None)

    def _graph(self, call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                self.flush.zero_()
                call()
        return graph

    def _milliseconds(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)  # type: ignore[no-any-return]

    def microseconds(self, sides: Sides) -> dict[str, float]:
        """Median time of a call of each side; the sides take turns."""
        graphs = {}
        for name, call in sides.items():
            # Compiles, and fills the caches.
            call()
            torch.cuda.synchronize()
            graphs[name] = self._graph(call)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(REPEATS):
            for name, graph in graphs.items():
                milliseconds = self._milliseconds(graph) - self._milliseconds(self.empty)
                times[name].append(1000 * milliseconds / CALLS)
        return {name: statistics.median(found) for name, found in times.items()}


def limits(clock: Clock) -> tuple[float, float]:
    """The card's bytes per second (a copy) and bfloat16 operations per second (a large product)."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target, square = torch.empty_like(source), gaussian(8192, 8192)
    found = clock.microseconds(
        {"copy": lambda: target.copy_(source), "product": lambda: square @ square}
    )
    return 2 * source.nbytes / found["copy"] * 1e6, 2 * 8192**3 / found["product"] * 1e6


def cases(O: int, I: int) -> Any:
    """(name, bytes that must move, operations, sides) for one weight."""
    bnb = bitsandbytes()
    dense = gaussian(O, I)
    w = minilora.quantize_nf4(dense)
    A, B = gaussian(R, I), gaussian(O, R)
    state = q = None
    if bnb:
        q, state = bnb.functional.quantize_4bit(
            dense, blocksize=64, quant_type="nf4", compress_statistics=True
        )
    sides: Sides = {"minilora": lambda: ops.quantize(dense, 64)}
    if bnb:
        sides["bitsandbytes"] = lambda: bnb.functional.quantize_4bit(
            dense, blocksize=64, quant_type="nf4"
        )
    yield "quantize", dense.nbytes + w.packed.nbytes + 4 * w.absmax.numel(), 0, sides
    sides = {"minilora": lambda: w.dequantize()}
    if bnb:
        sides["bitsandbytes"] = lambda: bnb.functional.dequantize_4bit(q, state)
    yield "dequantize, double", dense.nbytes + w.nbytes, 0, sides
    for M in ROWS:
        x, dy = gaussian(M, I), gaussian(M, O)
        moved, work = w.nbytes + x.nbytes + dy.nbytes, 2 * M * O * I
        z = x @ A.T
        sides = {
            "minilora": lambda x=x: minilora.nf4_linear(x, w),
            "cuBLAS": lambda x=x: F.linear(x, dense),
        }
        sides["dequantize + cuBLAS"] = lambda x=x: F.linear(x, w.dequantize())
        if bnb:
            sides["bitsandbytes"] = lambda x=x: bnb.matmul_4bit(x, q.t(), quant_state=state)
        yield f"forward, M={M}", moved, work, sides
        sides = {
            "minilora": lambda dy=dy: ops.nf4_linear_backward(dy, w),
            "cuBLAS": lambda dy=dy: dy @ dense,
        }
        sides["dequantize + cuBLAS"] = lambda dy=dy: dy @ w.dequantize()
        if bnb:
            sides["bitsandbytes"] = lambda dy=dy: dy @ bnb.functional.dequantize_4bit(q, state)
        yield f"backward, M={M}", moved, work, sides
        sides = {"minilora": lambda x=x, z=z: ops.nf4_lora_linear(x, w, None, z, B, 2.0)}
        sides["cuBLAS"] = lambda x=x, z=z: F.linear(x, dense).addmm_(z, B.T, alpha=2.0)
        sides["dequantize + cuBLAS"] = lambda x=x, z=z: F.linear(x, w.dequantize()).addmm_(
            z, B.T, alpha=2.0
        )
        yield f"forward + LoRA, M={M}", moved + z.nbytes + B.nbytes, work + 2 * M * O * R, sides


OTHERS = "bitsandbytes", "dequantize + cuBLAS", "cuBLAS"


def report(out: Path) -> None:
    clock = Clock()
    bandwidth, arithmetic = limits(clock)
    packages = ["torch", "triton"] + ["bitsandbytes"] * bool(bitsandbytes())
    versions = {p: metadata.version(p) for p in packages}
    card, date = torch.cuda.get_device_name(), time.strftime("%Y-%m-%d")

    print(f"{card}; {', '.join(f'{p} {v}' for p, v in versions.items())}; {date}")
    print(
        f"copy {bandwidth / 1e12:.2f} TB/s, bfloat16 product {arithmetic / 1e12:.0f} TFLOP/s; "
        f"microseconds, medians of {REPEATS}\n"
    )
    columns = ["out x in", "case", "minilora", "GB/s or TFLOP/s", "of the floor"]
    columns += [f"{side} / ours" for side in OTHERS]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")

    rows = []
    for O, I in SHAPES:
        for name, moved, work, sides in cases(O, I):
            found = clock.microseconds(sides)
            floor = 1e6 * max(moved / bandwidth, work / arithmetic)
            is_bound_by_work = work / arithmetic > moved / bandwidth
            print_row(f"{O} x {I}", name, found, floor, work if is_bound_by_work else 0, moved)
            rows.append({"shape": [O, I], "case": name, "floor": floor, "microseconds": found})

    head = {"card": card, "versions": versions, "date": date}
    head |= {"bytes/s": bandwidth, "flop/s": arithmetic}
    out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
    print(f"\nwritten to {out}")


def print_row(
    size: str, name: str, found: dict[str, float], floor: float, work: float, moved: float
) -> None:
    """One case; `work` is 0 where the memory is the limit, and the rate is then that of bytes."""
    ours = found["minilora"]
    rate = f"{work / ours / 1e6:.0f} TFLOP/s" if work else f"{moved / ours / 1e3:.0f} GB/s"
    ratios = [f"{found[side] / ours:.2f}" if side in found else "" for side in OTHERS]
    cells = [size, name, f"{ours:.1f}", rate, f"{floor / ours:.0%}", *ratios]
    print("| " + " | ".join(cells) + " |", flush=True)


def tune() -> None:
    """Writes the fastest path of 4096 x 4096 for each number of rows into the table of choices.

    Neighbours with the same winner become one line.
    """
    clock = Clock()
    table = json.loads(choose.TABLE.read_text())
    size = f"{TUNED[0]} x {TUNED[1]}"
    table["measured on"] = f"{torch.cuda.get_device_name()}, {time.strftime('%Y-%m-%d')}, {size}"

    w = minilora.quantize_nf4(gaussian(*TUNED))
    packed = reference.PackedWeight(*w.tensors, tuple(w.shape), w.block_size, w.quant_type)
    for direction in ("forward", "backward"):
        lines: list[dict[str, Any]] = []
        for M in ROWS:
            best = fastest(clock, direction, M, packed)
            if lines and {k: v for k, v in lines[-1].items() if k != "rows"} == best:
                lines.pop()
            lines.append({"rows": M} | best)
        while lines and lines[-1]["path"] == "dense":
            lines.pop()
        table[direction] = [*lines, {"path": "dense"}]
    choose.TABLE.write_text(json.dumps(table, indent=2) + "\n")


def fastest(clock: Clock, direction: str, M: int, w: reference.PackedWeight) -> dict[str, Any]:
    """The fastest path, and its tile, for M rows."""
    is_forward = direction == "forward"
    x = gaussian(M, w.shape[1] if is_forward else w.shape[0])
    dense = ops.dequantize(w, torch.float32)

    tried: list[dict[str, Any]] = [{"path": "dense"}]
    if is_forward and M <= 16:
        tried.append({"path": "skinny"})
    tried += [tile for tile in TILES if tile["BM"] <= max(16, 2 * M)]

    calls = {}
    for line in tried:
        if is_forward:
            call = functools.partial(matmul.forward, x, w, None, None, line)
        else:
            call = functools.partial(matmul.backward, x, w, None, line)
        try:
            y = call()
        except triton.runtime.errors.OutOfResources as error:
            # More shared memory than this card has.
            print(f"{direction} M={M} {line}: {error}", file=sys.stderr)
            continue
        check_product(f"{direction} {line}", y, x, dense if is_forward else dense.T)
        calls[json.dumps(line)] = call

    found = clock.microseconds(calls)
    best: dict[str, Any] = json.loads(min(found, key=lambda key: found[key]))
    print(f"{direction} M={M}: {best}, {min(found.values()):.1f} us", flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--tune", action="store_true", help="rewrite kernels/gpu/choices.json for this card"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return
    warnings.simplefilter("ignore")
    check_everything()
    if args.tune:
        tune()
    else:
        report(args.out)


if __name__ == "__main__":
    main()
