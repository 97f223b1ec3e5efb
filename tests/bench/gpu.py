"""Speed on a GPU of minilora's Triton kernels, bitsandbytes, dequantize + cuBLAS, and cuBLAS alone.

    python tests/bench/gpu.py

checks every kernel, then prints one table and writes it to bench-gpu.json.

    python tests/bench/gpu.py --tune 4096x4096 11008x4096

times every path and tile for weights of these shapes, and stores the fastest in the user's cache
folder, where the library finds it (see `gpu_tune.py`).

`gpu_clock.py` says what a time is. A wrong result is not timed: every side is first compared with
the reference. Without a GPU it says so. `make gpu-day` runs this and everything else that wants a
GPU.
"""

import argparse
import json
import time
import warnings
from importlib import metadata
from pathlib import Path

import gpu_tune
import torch
from gpu_cases import OTHERS, SHAPES, cases
from gpu_checks import (
    WrongResultError,
    bitsandbytes,
    check_products,
    check_quantization,
    gaussian,
    stop,
)
from gpu_clock import REPEATS, Clock, Sides, StoppedClock, clock, limits

ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def check_everything() -> None:
    """Every kernel against the reference; bitsandbytes too, where it is installed."""
    for O, I in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            check_quantization(gaussian(O, I, dtype))
        check_products(O, I, ROWS)


def report(out: Path) -> None:
    timer = clock()
    assert isinstance(timer, Clock)
    bandwidth, arithmetic = limits(timer)
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
        for name, moved, work, sides in cases(O, I, ROWS):
            found = timed(timer, sides)
            floor = 1e6 * max(moved / bandwidth, work / arithmetic)
            is_bound_by_work = work / arithmetic > moved / bandwidth
            print_row(f"{O} x {I}", name, found, floor, work if is_bound_by_work else 0, moved)
            rows.append({"shape": [O, I], "case": name, "floor": floor, "microseconds": found})

    head = {"card": card, "versions": versions, "date": date}
    head |= {"bytes/s": bandwidth, "flop/s": arithmetic}
    out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
    print(f"\nwritten to {out}")


def timed(timer: Clock | StoppedClock, sides: Sides) -> dict[str, float]:
    found = timer.microseconds(sides)
    return {name: time for name, time in found.items() if time is not None}


def print_row(
    size: str, name: str, found: dict[str, float], floor: float, work: float, moved: float
) -> None:
    """One case; `work` is 0 where the memory is the limit, and the rate is then that of bytes."""
    ours = found["minilora"]
    rate = f"{work / ours / 1e6:.0f} TFLOP/s" if work else f"{moved / ours / 1e3:.0f} GB/s"
    ratios = [f"{found[side] / ours:.2f}" if side in found else "" for side in OTHERS]
    cells = [size, name, f"{ours:.1f}", rate, f"{floor / ours:.0%}", *ratios]
    print("| " + " | ".join(cells) + " |", flush=True)


def tune(shapes: list[gpu_tune.Shape], short: bool) -> None:
    found = gpu_tune.tune(clock(), shapes, ROWS, short)
    for row in found:
        size = " x ".join(map(str, row["shape"]))
        best = f"{row['line']}, {row['microseconds']:.1f} us"
        print(f"{size} {row['direction']} M={row['rows']}: {best}")
    print(f"written to {gpu_tune.store(found, torch.cuda.get_device_name())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--tune",
        nargs="*",
        type=gpu_tune.shape_of,
        metavar="OUTxIN",
        help="store the fastest paths for weights of these shapes (default: 4096x4096)",
    )
    parser.add_argument("--short", action="store_true", help="tune: only the tiles of the table")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return
    warnings.simplefilter("ignore")
    try:
        check_everything()
        if args.tune is None:
            report(args.out)
        else:
            tune(args.tune or [SHAPES[0]], args.short)
    except WrongResultError as error:
        stop(error)


if __name__ == "__main__":
    main()
