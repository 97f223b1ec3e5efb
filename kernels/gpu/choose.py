"""Which path a product takes: the first line of a table that it fits.

The tables are in choices.json, one for each generation of GPUs: they differ in shared memory,
registers and tensor cores. What was tuned on the card itself goes before (see `tuned.py`).

A line may say `rows` (M at most), `weights` (O * I at least), `path` (skinny, tile or dense) and
the sides of a tile. A line whose kernel needs more than the card has is given up for a smaller one.
"""

import functools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch

from . import runtime, tuned
from .tuned import SKINNY_ROWS, Line

TABLE = Path(__file__).with_name("choices.json")

DENSE: Line = {"path": "dense"}

# Whose table holds for CPU tensors, which the interpreter takes.
DEFAULT = "sm_90"

_CPU = torch.device("cpu")

# Lines that a device has too little of something for: (device, direction, the line as text).
_too_large: set[tuple[torch.device, str, str]] = set()


@functools.cache
def _choices() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TABLE.read_text())
    return found


def generations() -> list[str]:
    """Returns the names of the generations that have a table: "sm_75", ..., "amd"."""
    return list(_choices()["generations"])


def generation_of(major: int, minor: int) -> str:
    """Returns the generation of an NVIDIA GPU by its compute capability.

    It is the newest that is no newer than the GPU; one older than all belongs to the oldest.

    Example:
        >>> generation_of(8, 9), generation_of(10, 3), generation_of(7, 0)
        ('sm_86', 'sm_100', 'sm_75')
    """
    known = {int(name[3:]): name for name in generations() if name.startswith("sm_")}
    capability = 10 * major + minor
    return known[max((n for n in known if n <= capability), default=min(known))]


def generation(device: torch.device) -> str:
    """Returns the generation of a device."""
    if device.type != "cuda":
        return DEFAULT
    if runtime.PORTABLE:
        return "amd"
    return generation_of(*torch.cuda.get_device_capability(device))


def lines(direction: str, of: str = DEFAULT) -> list[Line]:
    """Returns every line that a product may be given on a generation of GPUs, each once.

    These are the lines of its table, those that take their place where they are too large, and the
    tiles that tuning starts from. All are to be compiled and tested.
    """
    table = _choices()["generations"][of][direction]
    found: list[Line] = []
    for line in table:
        smaller: Line | None = line
        while smaller is not None:
            found.append(smaller)
            smaller = next_smaller(smaller)

    has_tiles = of != "sm_75"
    found += _choices()["tiles"][direction] if has_tiles else []
    return [line for i, line in enumerate(found) if line not in found[:i]]


def next_smaller(line: Line) -> Line | None:
    """Returns what to try where a line's kernel does not fit: fewer stages, and at last dense."""
    if line["path"] == "dense":
        return None
    if line["path"] == "tile" and line["stages"] > 2:
        return line | {"stages": line["stages"] - 1}
    return DENSE


def takes(line: Line, M: int, I: int, block_size: int) -> bool:
    """Whether a line's kernel can compute the product at all.

    Tiles step through I, and blocks must not cross rows. The skinny kernel scales sums over 64
    columns, so its blocks are no smaller.
    """
    if line["path"] == "dense":
        return True
    if I % line.get("BI", 64) or I % block_size:
        return False
    return line["path"] == "tile" or (M <= SKINNY_ROWS and block_size >= 64)


@functools.cache
def _tuned(device: torch.device) -> tuned.Tables | None:
    """What was tuned on the card at hand. Read once in a process."""
    if device.type != "cuda":
        return None
    return tuned.load(torch.cuda.get_device_name(device))


def _table(direction: str, O: int, I: int, device: torch.device) -> list[Line]:
    """The table for a weight [O, I]: that of the tuned shape nearest to it, or the generation's."""
    measured = _tuned(device)
    found: list[Line]
    if not measured:
        found = _choices()["generations"][generation(device)][direction]
        return found

    def distance(shape: tuple[int, int]) -> float:
        return abs(math.log(shape[0] / O)) + abs(math.log(shape[1] / I))

    return measured[min(measured, key=distance)][direction]


@functools.lru_cache(maxsize=4096)
def choose(
    direction: str, M: int, O: int, I: int, block_size: int, device: torch.device = _CPU
) -> Line:
    """Returns the line for a product of M rows with a weight [O, I].

    A weight that no kernel takes is dequantized whole: path "dense".
    """
    for line in _table(direction, O, I, device):
        fits = line.get("rows", M) >= M and line.get("weights", 0) <= O * I
        if fits and takes(line, M, I, block_size):
            return _that_fits(direction, line, device)
    return DENSE


def _that_fits(direction: str, line: Line, device: torch.device) -> Line:
    """The line, or the first smaller one that the device has not refused."""
    smaller: Line | None = line
    while smaller is not None and (device, direction, json.dumps(smaller)) in _too_large:
        smaller = next_smaller(smaller)
    return smaller or DENSE


def give_up(direction: str, line: Line, device: torch.device) -> None:
    """Notes that a line's kernel needs more than a device has: `choose` gives a smaller one now."""
    _too_large.add((device, direction, json.dumps(line)))
    choose.cache_clear()


def warn_of(
    direction: str, line: Line, smaller: Line, device: torch.device, error: Exception
) -> None:
    """Warns that `smaller` took the place of a line, and says what to do."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    warnings.warn(
        f"{direction}: {line} needs more than {card} has ({error}), so {smaller} is used from now "
        "on. Tuning finds the fastest that fits: python tests/bench/gpu.py --tune in minilora's "
        "repository",
        stacklevel=4,
    )


def forget() -> None:
    """Forgets what was read, chosen and given up in this process: after tuning, and in tests."""
    _choices.cache_clear()
    _tuned.cache_clear()
    choose.cache_clear()
    _too_large.clear()
