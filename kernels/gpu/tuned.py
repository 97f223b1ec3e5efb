"""What was measured on a card: the tables that `choose.py` prefers to those of choices.json.

Tuning writes one file per card into the user's cache folder, never into the package:

    ~/.cache/minilora/NVIDIA-H100-80GB-HBM3.json        or in $XDG_CACHE_HOME

    {"card": "NVIDIA H100 80GB HBM3", "triton": "3.9.0",
     "weights": [{"shape": [4096, 4096], "forward": [...], "backward": [...]}, ...]}

The tables are those of choices.json, one of each direction per shape of a weight. A file that is
damaged, or of another card or another Triton, is left alone with a warning: what was fastest there
need not be right here.
"""

import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

from .runtime import triton

Line = dict[str, Any]

# (O, I) -> "forward" or "backward" -> lines.
Tables = dict[tuple[int, int], dict[str, list[Line]]]

DIRECTIONS = ("forward", "backward")

# The skinny kernel takes at most so many rows of x.
SKINNY_ROWS = 64

# What a tile's line says, and the values that the kernel takes.
_TILE = {
    "BM": (16, 32, 64, 128, 256),
    "BO": (16, 32, 64, 128, 256),
    "BI": (64, 128, 256),
    "warps": (1, 2, 4, 8, 16),
    "stages": (1, 2, 3, 4, 5, 6, 7, 8),
}


def check_lines(direction: str, lines: Any) -> None:
    """Raises ValueError unless these are the lines of a table, from few rows to many."""
    if not isinstance(lines, list) or not lines or lines[-1] != {"path": "dense"}:
        raise ValueError(f'{direction}: a list whose last line is {{"path": "dense"}} is missing')

    rows = 0
    for line in lines[:-1]:
        if fault := _fault(line):
            raise ValueError(f"{direction}: {line} {fault}")
        if line["rows"] < rows:
            raise ValueError(f"{direction}: {line} comes after a line of {rows} rows")
        if line["path"] == "skinny" and (direction == "backward" or line["rows"] > SKINNY_ROWS):
            raise ValueError(f"{direction}: skinny is forward, and at most {SKINNY_ROWS} rows")
        rows = line["rows"]


def _fault(line: Any) -> str | None:
    """Says what is wrong with a line, by itself."""
    if not isinstance(line, dict) or line.get("path") not in ("skinny", "tile", "dense"):
        return "has no path"

    sides = _TILE if line["path"] == "tile" else {}
    expected = {"path", "rows", *sides}
    if line.keys() - {"weights"} != expected:
        return f"does not say {', '.join(sorted(expected))}"
    for key in line.keys() - {"path"}:
        if type(line[key]) is not int or line[key] < 1:
            return f"has no positive integer for {key}"
    for key, values in sides.items():
        if line[key] not in values:
            return f"has a {key} that is none of {values}"
    return None


def file_of(card: str) -> Path:
    """Returns where the tables of a card are, by the name that PyTorch gives it."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():
        folder = Path.home() / ".cache"
    name = re.sub(r"[^A-Za-z0-9]+", "-", card).strip("-")
    return folder / "minilora" / f"{name}.json"


def store(card: str, tables: Tables) -> Path:
    """Adds tables to a card's file, or replaces those of the same shapes, and returns its path.

    The file is written whole and then renamed, so that a reader sees the old one or the new one.

    Args:
        card: `torch.cuda.get_device_name()`.
        tables: (O, I) -> {"forward": lines, "backward": lines}.

    Raises:
        ValueError: a table is not sound.
        OSError: the cache folder cannot be written.

    With lines = [{"rows": 32, "path": "skinny"}, {"path": "dense"}] it is called as

        store(card, {(4096, 4096): {"forward": lines, "backward": [{"path": "dense"}]}})
    """
    for table in tables.values():
        for direction in DIRECTIONS:
            check_lines(direction, table.get(direction))

    merged = {**(load(card) or {}), **tables}
    weights = [{"shape": list(shape), **merged[shape]} for shape in sorted(merged)]
    content = {"card": card, "triton": triton.__version__, "weights": weights}

    path = file_of(card)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        temporary.write_text(json.dumps(content, indent=1))
        temporary.replace(path)
    return path


def load(card: str) -> Tables | None:
    """Returns the tables of a card, or None if it was not tuned. Warns of a file that is no use."""
    try:
        path = file_of(card)
        text = path.read_bytes()
    except (OSError, RuntimeError):
        # Not there, not ours to read, or nobody's home.
        return None

    try:
        return _parsed(json.loads(text), card)
    except (ValueError, RecursionError) as error:
        warnings.warn(
            f"{path} is not used ({error}): tune again (python tests/bench/gpu.py --tune in "
            "minilora's repository) or delete it",
            stacklevel=2,
        )
        return None


def _parsed(content: Any, card: str) -> Tables:
    """The tables of a file's content. Raises ValueError where they are not for this card."""
    if not isinstance(content, dict) or not isinstance(content.get("weights"), list):
        raise ValueError("it holds no tables")
    for key, here in (("card", card), ("triton", triton.__version__)):
        if content.get(key) != here:
            raise ValueError(f"it was measured with {key} {content.get(key)!r}, this is {here!r}")

    tables: Tables = {}
    for entry in content["weights"]:
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or [type(n) for n in shape] != [int, int] or min(shape) < 1:
            raise ValueError(f"{shape} is no shape of a weight")
        for direction in DIRECTIONS:
            check_lines(direction, entry.get(direction))
        tables[shape[0], shape[1]] = {direction: entry[direction] for direction in DIRECTIONS}
    return tables
