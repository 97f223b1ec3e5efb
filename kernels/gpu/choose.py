"""Which path a product takes, from the table in choices.json: the first line that the product fits.

A line may say `rows` (M at most), `weights` (O * I at least), `path` (skinny, tile or dense) and the sides of a tile. The benchmark
rewrites the table for the card at hand: `python tests/bench/gpu.py --tune`.
"""

import functools
import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("choices.json")


@functools.cache
def lines(direction: str) -> list[dict[str, Any]]:
    """The table's lines for "forward" or "backward"."""
    found: list[dict[str, Any]] = json.loads(TABLE.read_text())[direction]
    return found


def takes(line: dict[str, Any], M: int, I: int, block_size: int) -> bool:
    """Whether a line's kernel can do the product at all.

    Tiles step through I, and blocks must not cross rows. The skinny kernel scales sums of 64 columns, so its blocks are no smaller.
    """
    if line["path"] == "dense":
        return True
    whole = I % line.get("BI", 64) == 0 and I % block_size == 0
    return whole and (line["path"] == "tile" or (M <= 16 and block_size >= 64))


def choose(direction: str, M: int, O: int, I: int, block_size: int) -> dict[str, Any]:
    """Returns the line for a product of M rows with a weight [O, I]. What no kernel takes is decoded whole: path "dense"."""
    for line in lines(direction):
        fits = line.get("rows", M) >= M and line.get("weights", 0) <= O * I
        if fits and takes(line, M, I, block_size):
            return line
    return {"path": "dense"}
