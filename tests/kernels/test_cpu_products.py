"""Small products of words, and the layouts of words, against NumPy."""

import numpy as np
import pytest
import torch
from helpers import gaussian
from torch import Tensor

from minilora.kernels.cpu import words
from minilora.kernels.cpu.avx512 import AVX512, AVX512_BF16
from minilora.kernels.cpu.moves import transpose_16
from minilora.kernels.cpu.products import add_product, add_transposed_product

NUMBERS = [
    pytest.param(1, marks=pytest.mark.skipif(not AVX512, reason="used with AVX-512 only")),
    pytest.param(2, marks=pytest.mark.skipif(not AVX512_BF16, reason="vdpbf16ps")),
]


def as_rows(x: Tensor, numbers: int) -> np.ndarray:
    """[rows, width] as rows of words."""
    return x.contiguous().view(torch.int32).numpy().view(np.uint32).ravel().copy()


def matrix(rows: int, width: int, numbers: int, seed: int) -> Tensor:
    dtype = torch.float32 if numbers == 1 else torch.bfloat16
    return gaussian(rows, width, seed=seed).to(dtype)


@pytest.mark.parametrize("numbers", NUMBERS)
def test_a_product_is_added(numbers: int) -> None:
    """Within the roundings of a sum of 192 terms."""
    A, B = matrix(24, 192, numbers, 1), matrix(192, 64, numbers, 2)
    C = gaussian(24, 64, seed=3)
    exact = C.double() + A.double() @ B.double()

    rows, pairs = as_rows(A, numbers), words.as_pairs(as_rows(B, numbers), 64, numbers)
    out = C.flatten().numpy().copy()
    add_product(numbers, rows, pairs, out, 24, 192 // numbers, 64)
    size = A.double().abs() @ B.double().abs()
    error = torch.from_numpy(out).view(24, 64) - exact
    assert (error.abs() <= 192 * 2**-24 * size).all()


@pytest.mark.parametrize("numbers", NUMBERS)
def test_a_product_with_a_transpose_is_the_same(numbers: int) -> None:
    """To the bit: pairs of A^T are read as its columns."""
    A, B = matrix(24, 192, numbers, 1), matrix(192, 64, numbers, 2)
    pairs = words.as_pairs(as_rows(B, numbers), 64, numbers)
    expected, found = np.zeros((2, 24 * 64), np.float32)

    add_product(numbers, as_rows(A, numbers), pairs, expected, 24, 192 // numbers, 64)
    columns = words.as_pairs(as_rows(A.T, numbers), 24, numbers)
    add_transposed_product(numbers, columns, pairs, found, 24, 192 // numbers, 64)
    np.testing.assert_array_equal(found, expected)


def test_a_transpose_of_16_by_16() -> None:
    a = np.arange(16 * 20, dtype=np.uint32)
    out = np.zeros(16 * 18, np.uint32)
    _transpose(a, out)
    np.testing.assert_array_equal(out.reshape(16, 18)[:, :16], a.reshape(16, 20)[:, :16].T)
    assert not out.reshape(16, 18)[:, 16:].any()


@words.jit
def _transpose(a: np.ndarray, out: np.ndarray) -> None:
    transpose_16(a, 0, 20, out, 0, 18)


@pytest.mark.parametrize("numbers", NUMBERS)
def test_the_layouts_hold_the_same_numbers(numbers: int) -> None:
    x = matrix(128, 64, numbers, 5)
    rows = as_rows(x, numbers)
    bits = x.view(torch.int16 if numbers == 2 else torch.int32).numpy()

    pairs = words.as_pairs(rows, 64, numbers).view(bits.dtype)
    np.testing.assert_array_equal(
        pairs.reshape(128 // numbers, 64, numbers).swapaxes(1, 2).reshape(128, 64), bits
    )
    width = 64 // numbers
    columns = words.as_columns(rows, width).reshape(2, width, 64)
    np.testing.assert_array_equal(columns.swapaxes(1, 2).reshape(128, width), rows.reshape(128, -1))


@pytest.mark.parametrize("numbers", NUMBERS)
def test_rounding_to_words_is_pytorchs(numbers: int) -> None:
    x = gaussian(64, 64, seed=7)
    stored = x if numbers == 1 else x.bfloat16()
    rows = as_rows(stored, numbers)
    found = np.zeros_like(rows)
    words.round_to_rows(x.flatten().numpy(), numbers, found)
    np.testing.assert_array_equal(found, rows)
    words.round_to_pairs(x.flatten().numpy(), 64, numbers, found)
    np.testing.assert_array_equal(found, words.as_pairs(rows, 64, numbers))
