"""safetensors files: what is written comes back, and errors name the file."""

from pathlib import Path

import pytest
import torch
from helpers import gaussian, same_bits

from minilora.files.tensors import read_tensors, write_tensors


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    tensors = {
        "float32": gaussian(3, 5),
        "bfloat16": gaussian(4, dtype=torch.bfloat16),
        "transposed": gaussian(3, 5).T,
        "trained": torch.nn.Parameter(gaussian(2)),
    }
    write_tensors(tmp_path / "t.safetensors", tensors, {"key": "value"})

    found, metadata = read_tensors(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[key], tensor) for key, tensor in tensors.items())
    assert metadata == {"format": "pt", "key": "value"}


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"t\.safetensors does not exist"):
        read_tensors(tmp_path / "t.safetensors")
    (tmp_path / "t.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"t\.safetensors is damaged or truncated"):
        read_tensors(tmp_path / "t.safetensors")
    with pytest.raises(OSError, match=r"t\.safetensors could not be written"):
        write_tensors(tmp_path / "nowhere" / "t.safetensors", {"a": gaussian(1)}, {})
