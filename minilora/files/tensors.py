"""safetensors files, with errors that name the file."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes tensors and metadata as a safetensors file.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns (tensors, metadata) of a safetensors file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or truncated.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            tensors = {key: file.get_tensor(key) for key in keys}
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or truncated and cannot be read ({error}): copy or save it again"
        ) from error
