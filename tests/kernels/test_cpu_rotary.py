"""Rotary position embeddings on the CPU: PyTorch's bits, forward and backward."""

import pytest
import torch
from helpers import gaussian, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minilora.kernels.cpu import rotary as cpu
from minilora.kernels.reference import rotary as reference

DTYPES = (torch.float32, torch.bfloat16)


def inputs(
    B: int, heads: int, L: int, D: int, dtype: torch.dtype, angles: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """x, cos and sin. The halves of cos and sin differ, which no model asks for."""
    return (
        gaussian(B, L, heads, D, dtype=dtype).transpose(1, 2),
        gaussian(angles, L, D, dtype=dtype, seed=1),
        gaussian(angles, L, D, dtype=dtype, seed=2),
    )


@given(
    B=st.integers(1, 3),
    heads=st.integers(1, 4),
    L=st.integers(1, 20),
    half=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    repeated=st.booleans(),
)
def test_the_bits_of_the_reference(
    B: int, heads: int, L: int, half: int, dtype: torch.dtype, repeated: bool
) -> None:
    given_ = inputs(B, heads, L, 2 * half, dtype, 1 if repeated else B)
    assert same_bits(cpu.rotary(*given_), reference.rotary(*given_))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_is_that_of_autograd(dtype: torch.dtype) -> None:
    x, cos, sin = inputs(2, 3, 7, 16, dtype)
    x.requires_grad_()
    dy = gaussian(2, 3, 7, 16, dtype=dtype, seed=3)
    (expected,) = torch.autograd.grad(reference.rotary(x, cos, sin), x, dy)
    # Autograd adds zeros, which makes -0 a 0.
    assert torch.equal(cpu.rotary(dy, cos, reference.turned_back(sin)), expected)


def test_turning_back_undoes_it() -> None:
    """With the cosine and sine of one angle for both elements of a pair."""
    angle = gaussian(1, 5, 8, dtype=torch.float64).repeat(1, 1, 2)
    x, cos, sin = gaussian(2, 3, 5, 16, dtype=torch.float64), angle.cos(), angle.sin()
    y = reference.rotary(x, cos, sin)
    torch.testing.assert_close(reference.rotary(y, cos, reference.turned_back(sin)), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_threads_change_nothing(dtype: torch.dtype) -> None:
    x, cos, sin = inputs(3, 9, 40, 64, dtype)
    expected = cpu.rotary(x, cos, sin)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = cpu.rotary(x.mT.contiguous().mT, cos.mT.contiguous().mT, sin)
    finally:
        torch.set_num_threads(before)
    assert same_bits(found, expected)


def test_other_dtypes_are_left_to_the_reference() -> None:
    for dtype in (torch.float64, torch.float16):
        given_ = inputs(1, 2, 3, 4, dtype)
        assert same_bits(cpu.rotary(*given_), reference.rotary(*given_))
    x, cos, sin = inputs(1, 2, 3, 4, torch.bfloat16)
    assert cpu.rotary(x, cos.float(), sin.float()).dtype == torch.float32
    with pytest.raises(RuntimeError, match="size"):
        cpu.rotary(x, cos[:, :2], sin[:, :2])
