"""kernels/cpu/dense.py: both products against float64, within the bounds of their sums.

A sum of n products in float32 has an error of at most n 2^-24 times the sum of their magnitudes. A
result in bfloat16 is rounded once, by at most 2^-8 of itself.
"""

import pytest
import torch
from helpers import gaussian, same_bits
from hypothesis import given
from hypothesis import strategies as st
from kernel_dtypes import BF16, F32, ROUNDING, every_dtype
from torch import Tensor

from minilora.kernels.cpu import dense as cpu
from minilora.kernels.reference import dense as reference


def operands(M: int, V: int, H: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """h, g and W."""
    shapes = (M, H), (M, V), (V, H)
    h, g, W = (gaussian(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    return h, g, W


def both(h: Tensor, g: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    assert cpu._is_fast(h, W, g) and cpu._is_fast(g, W, h)
    z = torch.full_like(g, torch.nan)
    assert cpu.product(h, W, z) is z
    return z, cpu.product_backward(g, W)


def check(found: Tensor, L: Tensor, R: Tensor) -> None:
    exact, size = L.double() @ R.double(), L.double().abs() @ R.double().abs()
    sums = (len(R) + 1) * 2**-24 * size
    error = (found.double() - exact).abs()
    assert found.dtype == L.dtype and found.shape == exact.shape
    assert (error <= sums + ROUNDING[L.dtype] * (exact.abs() + sums)).all()


@every_dtype
@given(M=st.integers(8, 41), V=st.integers(1, 9), H=st.integers(1, 5))
def test_each_product_against_float64(dtype: torch.dtype, M: int, V: int, H: int) -> None:
    h, g, W = operands(M, 32 * V, 32 * H, dtype)
    z, dh = both(h, g, W)
    check(z, h, W.T)
    check(dh, g, W)


@every_dtype
def test_sums_of_several_parts_and_panels_side_by_side(dtype: torch.dtype) -> None:
    """More words than a panel has, and more columns than one part has; not multiples of either."""
    h, g, W = operands(21, 2080, 1184, dtype)
    z, dh = both(h, g, W)
    check(z, h, W.T)
    check(dh, g, W)


@every_dtype
def test_rows_and_threads_change_no_bit(dtype: torch.dtype) -> None:
    h, g, W = operands(50, 1056, 96, dtype)
    expected = both(h, g, W)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = both(h, g, W)
        first = both(h[:13], g[:13], W)
    finally:
        torch.set_num_threads(before)
    assert all(map(same_bits, found, expected))
    assert all(map(same_bits, first, [t[:13] for t in expected]))


@every_dtype
def test_it_is_no_less_exact_than_blas(dtype: torch.dtype) -> None:
    """A vocabulary of 8,192 words: its sums are of parts, whose errors do not add up."""
    h, g, W = operands(64, 8192, 96, dtype)
    products = zip((*both(h, g, W), h @ W.T, g @ W), 2 * [(h, W.T), (g, W)], strict=True)
    errors = [(y.double() - L.double() @ R.double()).norm().item() for y, (L, R) in products]
    # In bfloat16 all are rounded once; in float32 the order of a sum is another one.
    slack = {BF16: 1.01, F32: 2.0}[dtype]
    assert errors[0] <= slack * errors[2] and errors[1] <= slack * errors[3]


@every_dtype
def test_other_sizes_and_strides_are_left_to_the_reference(dtype: torch.dtype) -> None:
    h, g, W = operands(9, 64, 32, dtype)
    strided = cpu.product(h.T.contiguous().T, W, torch.empty_like(g))
    assert same_bits(strided, both(h, g, W)[0])
    for weight, out in [(W.T.contiguous().T, g), (W, g.T.contiguous().T)]:
        z = cpu.product(h, weight, torch.empty_like(out))
        assert same_bits(z, reference.product(h, weight, torch.empty_like(out)))
        dh = cpu.product_backward(out, weight)
        check(dh, out, weight)

    for M, V, H in [(7, 64, 32), (9, 63, 32), (9, 64, 31)]:
        h, g, W = operands(M, V, H, dtype)
        assert same_bits(cpu.product(h, W, torch.empty_like(g)), h @ W.T)
        assert same_bits(cpu.product_backward(g, W), g @ W)


def test_what_does_not_fit_is_refused_by_pytorch() -> None:
    h, g, W = operands(9, 64, 32, F32)
    with pytest.raises(RuntimeError, match="shapes"):
        cpu.product(h[:, :31], W, g)
    with pytest.raises(RuntimeError, match="shapes"):
        cpu.product_backward(g[:, :32], W)
    with pytest.raises(RuntimeError, match="dtype"):
        cpu.product(h, W.double(), g)
    double = [t.double() for t in (h, W, g)]
    assert same_bits(cpu.product(*double), double[0] @ double[1].T)
