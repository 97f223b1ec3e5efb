"""Checksums: those of sha256sum, and different wherever a bit is."""

import hashlib
from pathlib import Path

import pytest
import torch
from helpers import gaussian
from hypothesis import given
from hypothesis import strategies as st

from minilora.files.hashing import sha256_of_file, sha256_of_tensors


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_file_of_any_size_has_the_hash_of_its_bytes(size: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(i % 251 for i in range(size)))
    assert sha256_of_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@given(st.integers(0, 8 * 4 * 15 - 1))
def test_one_bit_of_one_tensor_changes_the_hash(bit: int) -> None:
    tensors = {"b": gaussian(3, 5), "a": gaussian(2)}
    before = sha256_of_tensors(tensors)
    tensors["b"].view(torch.uint8).view(-1)[bit // 8] ^= 1 << bit % 8
    assert sha256_of_tensors(tensors) != before


def test_neither_the_order_of_the_keys_nor_the_layout_in_memory_matters() -> None:
    a, b = gaussian(3, 5), gaussian(2, dtype=torch.bfloat16)
    strided = a.T.contiguous().T
    assert not strided.is_contiguous()
    assert sha256_of_tensors({"a": a, "b": b}) == sha256_of_tensors({"b": b, "a": strided})


def test_a_hashed_tensor_can_still_be_resized() -> None:
    """FSDP2 resizes its parameters; `tensor.numpy()` would have forbidden it for good."""
    parameter = torch.nn.Parameter(gaussian(4))
    sha256_of_tensors({"a": parameter})
    parameter.untyped_storage().resize_(0)
