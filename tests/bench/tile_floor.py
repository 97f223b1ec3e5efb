"""When a tile can win against dequantize + cuBLAS, from counts alone: no GPU is needed.

    PYTHONPATH=tests/tools python tests/bench/tile_floor.py            (H100 and A100)

compiles tiles, counts the instructions of their loops and the bytes that they move, and prints for
each shape and number of rows the shortest time that any tile could take beside the shortest that
the dense path could. Both are lower bounds: nothing waits for memory or for a barrier. A tile is
worth trying where its bound is the lower one; whether it wins, only a card can tell. A loop that
waits may take twice its bound, so a line of choices.json asks for half the dense path's.

A streaming multiprocessor issues four instructions of 32 lanes per clock; the arithmetic of
integers, shifts, permutes and conversions runs at half that rate (CUDA C++ Programming Guide,
throughput of native arithmetic instructions). Shared memory moves 128 bytes per clock. A tile's
programs are spread over the multiprocessors, and the busiest decides.
"""

import re
import sys
from typing import Any, NamedTuple

import compile_gate
import machine_code
import torch

from minilora.kernels.gpu import matmul, runtime
from minilora.kernels.reference import nf4 as reference
from minilora.kernels.reference.nf4 import PackedWeight

Line = dict[str, Any]


class Card(NamedTuple):
    """What a GPU can do at best: data sheets, with bandwidth and FLOP/s as measured in practice."""

    name: str
    target: str
    processors: int
    clock: float
    bandwidth: float
    flops: float
    # Bytes of L2 cache.
    cache: int


CARDS = (
    Card("H100", "sm_90", 132, 1.755e9, 3.0e12, 800e12, 50 << 20),
    Card("A100", "sm_80", 108, 1.41e9, 1.8e12, 250e12, 40 << 20),
)

# (out, in)
SHAPES = ((4096, 4096), (11008, 4096), (28672, 8192))
ROWS = (16, 17, 32, 64, 96, 128, 192, 256, 384)

# BM, BO, BI, warps, stages
SIDES = {
    "forward": (
        (32, 64, 64, 4, 4),
        (64, 32, 128, 4, 4),
        (64, 64, 64, 4, 4),
        (64, 128, 64, 4, 4),
        (128, 32, 128, 4, 3),
        (128, 64, 64, 4, 4),
        (128, 128, 64, 8, 3),
    ),
    "backward": (
        (16, 64, 64, 4, 4),
        (32, 64, 64, 4, 4),
        (64, 64, 64, 4, 4),
        (64, 64, 128, 4, 3),
        (64, 128, 64, 4, 4),
        (128, 64, 64, 4, 4),
        (128, 64, 128, 8, 3),
        (128, 128, 64, 8, 3),
    ),
}

# Instructions that run at half rate.
HALF_RATE = re.compile(r"PRMT|LOP3|SHF|ISETP|SEL|IADD3|VIADD|LEA|I?MNMX|VIMNMX|F2FP")

# Bytes per weight: packed with its absmax; dense in 16 bits, written once and read once.
PACKED, DENSE = 4.127 / 8, 2
# SASS instructions per weight of the kernel that dequantizes (tests/tools/sass_budget.json).
DEQUANTIZE = 9.9


class Counts(NamedTuple):
    """Clocks that an iteration of a tile's loop takes a multiprocessor, by what it uses up."""

    issue: float
    half_rate: float
    shared: float
    tensor: float


def counts(direction: str, line: Line, card: Card) -> Counts:
    """Compiles a tile and counts its main loop."""
    launch = recorded(direction, line)
    kernel = compile_gate.compiled(launch, card.target)[0]
    body = machine_code.loops(machine_code.sass(kernel.asm["cubin"]).lines)[0]
    halves = sum(bool(HALF_RATE.match(name)) for name in body)

    BM, BO, BI = line["BM"], line["BO"], line["BI"]
    macs_per_clock = card.flops / 2 / card.processors / card.clock
    return Counts(
        issue=len(body) * line["warps"] / 4,
        half_rate=halves * line["warps"] / 2,
        shared=shared_bytes(direction, line, kernel.asm["ttgir"]) / 128,
        tensor=BM * BO * BI / macs_per_clock,
    )


def recorded(direction: str, line: Line) -> compile_gate.Launch:
    """The launch of a product with this tile, as the library makes it."""
    launches: list[tuple[Any, ...]] = []
    runtime.start = lambda *launch: launches.append(launch)
    runtime.INTERPRETED = True

    O, I = 512, 256
    packed, absmax = reference.quantize(torch.zeros(O, I), 64)
    w = PackedWeight(packed, *reference.double_quantize(absmax), (O, I), 64)
    if direction == "forward":
        matmul.forward(torch.zeros(line["BM"], I).bfloat16(), w, None, None, line)
    else:
        matmul.backward(torch.zeros(line["BM"], O).bfloat16(), w, None, line)

    kernel, _, arguments, settings = launches[-1]
    return compile_gate.Launch(direction, kernel, arguments, settings)


def shared_bytes(direction: str, line: Line, ttgir: str) -> float:
    """Bytes through shared memory in an iteration, without bank conflicts.

    x and the packed words are written and read, and so is W. A tensor-core instruction of a warp
    group reads both sides there, 64 rows at a time; with `mma.sync` each row of warps reads all of
    W and each column of warps all of x.
    """
    BM, BO, BI = line["BM"], line["BO"], line["BI"]
    W, words = 2 * BO * BI, BO * BI // 2
    x = 2 * BM * (BI if direction == "forward" else BO)
    written = x + W + 2 * words

    if "warp_group_dot" in ttgir:
        return written + x + W * max(1, BM // 64)
    layout = re.search(r"nvidia_mma<\{versionMajor = 2.*?warpsPerCTA = \[(\d+), (\d+)\]", ttgir)
    assert layout, "neither a warp group's product nor mma.sync"
    down, across = map(int, layout.groups())
    return written + across * x + down * W


def tile_floor(direction: str, line: Line, c: Counts, card: Card, M: int, O: int, I: int) -> float:
    """Seconds that the tile takes at least."""
    wide, tall, step, side = (
        (I, O, line["BI"], line["BO"]) if direction == "forward" else (O, I, line["BO"], line["BI"])
    )
    programs = -(-M // line["BM"]) * -(-tall // side)
    busiest = -(-programs // card.processors)
    clocks = busiest * -(-wide // step) * max(c)
    return max(clocks / card.clock, PACKED * O * I / card.bandwidth)


def dense_floors(card: Card, M: int, O: int, I: int) -> tuple[float, float]:
    """Seconds of the dense path at least: W through memory, and W in the L2 cache if it fits."""
    n = O * I
    product = 2 * M * n / card.flops
    through = (PACKED + DENSE) * n / card.bandwidth + max(DENSE * n / card.bandwidth, product)
    if DENSE * n > card.cache:
        return through, through

    instructions = DEQUANTIZE * n / (128 * card.processors * card.clock)
    cached = max(PACKED * n / card.bandwidth, instructions) + product
    return through, cached


def main() -> None:
    for card in CARDS:
        for direction, sides in SIDES.items():
            names = ("BM", "BO", "BI", "warps", "stages")
            lines = [{"path": "tile", **dict(zip(names, s, strict=True))} for s in sides]
            counted = [(line, counts(direction, line, card)) for line in lines]
            print_counts(direction, counted, card)
            for O, I in SHAPES:
                print_floors(direction, counted, card, O, I)


def sides_of(line: Line) -> str:
    return f"{line['BM']}x{line['BO']}x{line['BI']} w{line['warps']} s{line['stages']}"


def print_counts(direction: str, counted: list[tuple[Line, Counts]], card: Card) -> None:
    print(f"\n{card.name} ({card.target}), {direction}: clocks per 32 weights of an iteration\n")
    print("| tile | instructions issued | at half rate | shared memory | tensor cores |")
    print("|---|---|---|---|---|")
    for line, c in counted:
        each = line["BO"] * line["BI"] / 32
        row = " | ".join(f"{n / each:.2f}" for n in c)
        print(f"| {sides_of(line)} | {row} |")


def print_floors(
    direction: str, counted: list[tuple[Line, Counts]], card: Card, O: int, I: int
) -> None:
    print(f"\n{card.name}, {direction}, {O} x {I}: microseconds at least\n")
    print("| M | best tile | tile | dense, W through memory | dense, W in L2 | by count |")
    print("|---|---|---|---|---|---|")
    for M in ROWS:
        time, line = min(
            ((tile_floor(direction, line, c, card, M, O, I), line) for line, c in counted),
            key=lambda found: found[0],
        )
        through, cached = dense_floors(card, M, O, I)
        verdict = "tile" if time < cached else "open" if time < through else "dense"
        floors = " | ".join(f"{1e6 * seconds:.1f}" for seconds in (time, through, cached))
        print(f"| {M} | {sides_of(line)} | {floors} | {verdict} |")


if __name__ == "__main__":
    sys.exit(main())
