"""safetensors files, with errors that name the file."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """safetensors' save_file with an error that says which file."""
    try:
        save_file(
            {k: t.detach().contiguous() for k, t in tensors.items()},
            path,
            metadata={"format": "pt", **metadata},
        )
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns (tensors, metadata) of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut short or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or cut short and cannot be read ({error}): copy or save it again"
        ) from error
