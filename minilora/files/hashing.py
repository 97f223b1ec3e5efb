"""SHA-256 checksums of files and of tensors."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_BLOCK = 1 << 20


def sha256_of_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            total.update(block)
    return total.hexdigest()


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of keys, dtypes, shapes and bytes, in the keys' order, in hexadecimal.

    safetensors has no checksum of its own: without this, a flipped bit in a weight would load
    silently, and so would a weight under another layer's name.
    """
    total = hashlib.sha256()
    for key in sorted(tensors):
        # A copy, because `tensor.numpy()` makes the storage that it shares non-resizable for
        # good, and FSDP2 has to resize its parameters.
        copy = tensors[key].detach().cpu().contiguous().clone()
        total.update(f"{key} {copy.dtype} {list(copy.shape)}\n".encode())
        total.update(copy.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
