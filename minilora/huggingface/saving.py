"""Saving a model and its tokenizer as a folder that is either complete or absent."""

import os
from pathlib import Path
from typing import Any

from torch import nn

from minilora.files.atomic import atomic_folder


def check_new_path(path: str | Path) -> Path:
    """Returns the path of a file or folder that can be made, before any work is done for it.

    Raises:
        ValueError: something exists there already.
        OSError: the folder that it would be in cannot be written to.
    """
    new = Path(path)
    if os.path.lexists(new):
        raise ValueError(f"{new} already exists: choose another --out, or remove it")

    above = next(parent for parent in new.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise NotADirectoryError(f"{new} cannot be made: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"{new} cannot be made: {above} cannot be written to")
    return new


def save_model(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Writes a model and its tokenizer as an ordinary transformers folder.

    Raises:
        OSError: the disk is full or the folder cannot be written to; nothing is left there.
    """
    from safetensors import SafetensorError

    try:
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)  # type: ignore[operator]
            tokenizer.save_pretrained(temporary)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{folder} could not be written: {error}") from error
