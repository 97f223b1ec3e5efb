"""Finds the fastest path of every shape and number of rows, for the GPU at hand.

    python tests/bench/gpu.py --tune                         4096 x 4096, every tile
    python tests/bench/gpu.py --tune 4096x4096 11008x4096 --short

The table goes into the user's cache folder, from which `choose.py` reads it; the package is left
as it is.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_checks import Line, check_product, forced, gaussian, name_of, packed_weight, paths
from gpu_clock import Clock, StoppedClock

from minilora.kernels.gpu import choose, tuned
from minilora.kernels.reference.nf4 import PackedWeight

Shape = tuple[int, int]

TILES: list[Line] = [
    {"path": "tile", "BM": BM, "BO": BO, "BI": BI, "warps": warps, "stages": stages}
    for BM, BO, BI, warps, stages in itertools.product(
        (16, 32, 64, 128), (32, 64, 128), (64, 128), (4, 8), (2, 3, 4)
    )
]


def shape_of(text: str) -> Shape:
    """Parses OUTxIN.

    Raises:
        ValueError: it is something else.
    """
    sizes = text.lower().split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"{text!r} is no shape of a weight: OUTxIN, as 4096x11008")
    return int(sizes[0]), int(sizes[1])


def tune(
    clock: Clock | StoppedClock, shapes: list[Shape], rows: tuple[int, ...], short: bool = False
) -> list[dict[str, Any]]:
    """Times every path for each shape and number of rows; returns what was found.

    `short` tries the tiles that the table of choices has, and otherwise all of TILES.
    """
    found = []
    for shape in shapes:
        w, dense = packed_weight(*shape)
        for direction, M in itertools.product(("forward", "backward"), rows):
            best = fastest(clock, direction, M, w, dense, short)
            found.append({"shape": list(shape), "direction": direction, "rows": M} | best)
    return found


def fastest(
    clock: Clock | StoppedClock,
    direction: str,
    M: int,
    w: PackedWeight,
    dense: torch.Tensor,
    short: bool,
) -> dict[str, Any]:
    """The fastest path for M rows: {"line": ..., "microseconds": ...}, None where not measured."""
    is_forward = direction == "forward"
    x = gaussian(M, w.shape[1] if is_forward else w.shape[0])

    tried = paths(direction, M, w, [] if short else TILES)
    # A tile of twice as many rows computes half of them for nothing.
    tried = [line for line in tried if line.get("BM", 0) <= max(16, 2 * M)]

    calls = {}
    for line, call in forced(direction, x, w, tried):
        try:
            y = call()
        except triton.runtime.errors.OutOfResources as error:
            # More shared memory than this card has.
            print(f"{direction} M={M} {name_of(line)}: {error}", file=sys.stderr)
            continue
        check_product(f"{direction} M={M} {name_of(line)}", y, x, dense if is_forward else dense.T)
        calls[json.dumps(line)] = call

    times = clock.microseconds(calls)
    measured = {key: time for key, time in times.items() if time is not None}
    if not measured:
        return {"line": None, "microseconds": None}
    best = min(measured, key=measured.__getitem__)
    return {"line": json.loads(best), "microseconds": measured[best]}


def tables(found: list[dict[str, Any]]) -> tuned.Tables:
    """The tables of choices that the results make: neighbours with the same winner are one line."""
    made: tuned.Tables = {}
    for row in found:
        shape = row["shape"][0], row["shape"][1]
        lines = made.setdefault(shape, {}).setdefault(row["direction"], [])
        if lines and {k: v for k, v in lines[-1].items() if k != "rows"} == row["line"]:
            lines.pop()
        lines.append({"rows": row["rows"]} | row["line"])

    for lines in itertools.chain.from_iterable(table.values() for table in made.values()):
        while lines and lines[-1]["path"] == "dense":
            lines.pop()
        lines.append(choose.DENSE)
    return made


def store(found: list[dict[str, Any]], card: str) -> Path:
    """Writes the tables where `choose.py` looks for those of this card."""
    path = tuned.store(card, tables(found))
    choose.forget()
    return path
