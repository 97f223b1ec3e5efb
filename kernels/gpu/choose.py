"""Which path a product takes: the first line of the table in choices.json that the product fits.

A line may say `rows` (M at most), `weights` (O * I at least), `path` (skinny, tile or dense) and
the sides of a tile. The benchmark rewrites the table for the GPU at hand:
`python tests/bench/gpu.py --tune`.
"""

import functools
import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("choices.json")


@functools.cache
def lines(direction: str) -> list[dict[str, Any]]:
    """Returns the lines of the table for "forward" or "backward"."""
    found: list[dict[str, Any]] = json.loads(TABLE.read_text())[direction]
    return found


def takes(line: dict[str, Any], M: int, I: int, block_size: int) -> bool:
    """Whether a line's kernel can compute the product at all.

    Tiles step through I, and blocks must not cross rows. The skinny kernel scales sums over 64
    columns, so its blocks are no smaller.
    """
    if line["path"] == "dense":
        return True
    if I % line.get("BI", 64) or I % block_size:
        return False
    return line["path"] == "tile" or (M <= 64 and block_size >= 64)


def choose(direction: str, M: int, O: int, I: int, block_size: int) -> dict[str, Any]:
    """Returns the line for a product of M rows with a weight [O, I].

    A weight that no kernel takes is dequantized whole: path "dense".
    """
    for line in lines(direction):
        fits = line.get("rows", M) >= M and line.get("weights", 0) <= O * I
        if fits and takes(line, M, I, block_size):
            return line
    return {"path": "dense"}
