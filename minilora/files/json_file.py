"""JSON objects that somebody else may have written, read within limits."""

import json
from pathlib import Path
from typing import Any

from minilora.files.text import shown

# A config of ten thousand layers with a pattern each is smaller and less deep.
_MOST_BYTES = 16 << 20
_MOST_LEVELS = 32


def read_json(path: Path, most_bytes: int = _MOST_BYTES) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a regular file, or too large; see `parse_json`.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        # Reading a pipe would wait forever.
        raise ValueError(f"{path} is not a regular file")
    if (size := path.stat().st_size) > most_bytes:
        raise ValueError(f"{path} has {size:,} bytes, and at most {most_bytes:,} are read")
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """Returns the object that a text holds.

    Args:
        text: JSON in UTF-8.
        where: what error messages call it.

    Raises:
        ValueError: it is not JSON in UTF-8, not an object, too deep, or has a key twice.
    """
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {shown(error, 200)}") from error
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply: at most {_MOST_LEVELS} levels") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} is a JSON {type(found).__name__}, not an object")
    _check_depth(found, where)
    return found


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook`: an object of JSON. Python's would keep the last of equal keys.

    Raises:
        ValueError: a key occurs twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key '{shown(twice)}' occurs twice")
    return found


def _check_depth(found: Any, where: str) -> None:
    level = [found]
    for _ in range(_MOST_LEVELS):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise ValueError(f"{where} is nested too deeply: at most {_MOST_LEVELS} levels")


def _children(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return list(item.values())
    return item if isinstance(item, list) else []
