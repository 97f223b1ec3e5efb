"""safetensors files: the same bytes for the same contents, and errors that name the file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minilora.files.text import shown


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes tensors and metadata as a safetensors file.

    The same contents give the same bytes, and the file has the mode that `open` gives.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    try:
        # safetensors replaces it by a file that only its owner may read.
        path.touch()
        mode = path.stat().st_mode
        save_file(contiguous, path, metadata={"format": "pt", **metadata})
        path.chmod(mode)
        _sort_metadata(path)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path} could not be written: {error}") from error


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata by key; safetensors writes them in another order in each process."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "the same JSON without white space"
        file.seek(8)
        file.write(text.ljust(length))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns (tensors, metadata) of a safetensors file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or truncated.
    """
    return _read(path, _tensors)


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file alone. Raises what `read_tensors` raises."""
    return _read(path, lambda file: None)[1]


def _tensors(file: Any) -> dict[str, Tensor]:
    keys = file.keys()
    return {key: file.get_tensor(key) for key in keys}


def _read(path: Path, read: Any) -> tuple[Any, dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return read(file), file.metadata() or {}
    except (SafetensorError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or truncated and cannot be read ({shown(error, 200)}): "
            "copy or save it again"
        ) from error
