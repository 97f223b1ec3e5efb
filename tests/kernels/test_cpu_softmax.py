"""The cross-entropy of rows of logits on the CPU, against float64.

With logits of a size s, f - max f has an error of at most 2^-23 s, and exp of it that much of
itself. The exponentials and their sum, of parts in float64, add some roundings.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import gaussian, same_bits
from hypothesis import given
from hypothesis import strategies as st
from kernel_dtypes import ROUNDING
from torch import Tensor

from minilora.kernels.cpu import softmax as cpu
from minilora.kernels.reference import softmax as reference

DTYPES = (torch.float32, torch.bfloat16)

# Roundings of a sum of 1,024 exponentials in sixteen or more parts, and of what follows.
_ROUNDINGS = 64


def inputs(N: int, V: int, dtype: torch.dtype, size: float = 4.0) -> tuple[Tensor, Tensor]:
    """z and y."""
    return (size * gaussian(N, V)).to(dtype), torch.arange(N) * 7919 % V


def exact(z: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The losses and the gradient, by autograd in float64."""
    z = z.double().requires_grad_()
    losses = F.cross_entropy(scale * z, y, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    return losses.detach(), gradient


def check(z: Tensor, y: Tensor, scale: float) -> None:
    gradient = z.clone()
    losses = cpu.softmax_cross_entropy_(gradient, y, scale)
    true_losses, true_gradient = exact(z, y, scale)
    assert losses.dtype == torch.float32 and gradient.dtype == z.dtype

    size = (scale * z.double()).abs().amax(-1)
    relative = 2**-24 * (_ROUNDINGS + 4 * size)
    assert ((losses.double() - true_losses).abs() <= relative * (1 + size)).all()

    # Of the label p - 1 is rounded, an error of 2^-24.
    error = (gradient.double() - true_gradient).abs()
    allowed = relative[:, None] * (true_gradient.abs() + 2**-24 * abs(scale))
    allowed.scatter_add_(1, y[:, None], (2 * relative * abs(scale))[:, None])
    assert (error <= allowed + ROUNDING[z.dtype] * (true_gradient.abs() + allowed)).all()


@given(
    N=st.integers(1, 5),
    V=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([0.1, 4.0, 40.0]),
    shift=st.sampled_from([0.0, 500.0, -500.0]),
    scale=st.sampled_from([1.0, 0.0625, -2.0, 0.0]),
)
def test_against_float64(
    N: int, V: int, dtype: torch.dtype, size: float, shift: float, scale: float
) -> None:
    z, y = inputs(N, V, dtype, size)
    check(z + shift, y, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1024, 1025, 49152])
def test_long_rows(V: int, dtype: torch.dtype) -> None:
    check(*inputs(3, V, dtype), 1.0)


def test_the_error_of_a_sum_does_not_grow_with_the_vocabulary() -> None:
    """262,143 exponentials of 0.18: sixteen sums of them in float32 lose many times as much."""
    V = 1 << 18
    z = torch.zeros(1, V)
    z[0, 0] = 1.7
    losses = cpu.softmax_cross_entropy_(z, torch.tensor([0]))
    top = z.new_tensor(1.7).double()
    expected = (1 + (V - 1) * torch.exp(-top)).log()
    assert losses.item() == pytest.approx(expected.item(), rel=2**-23)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_threads_change_nothing(dtype: torch.dtype) -> None:
    z, y = inputs(70, 1003, dtype)
    whole, rows = z.clone(), z.clone()
    expected = cpu.softmax_cross_entropy_(whole, y)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = [
            cpu.softmax_cross_entropy_(r, t)
            for r, t in zip(rows.split(33), y.split(33), strict=True)
        ]
    finally:
        torch.set_num_threads(before)
    assert same_bits(torch.cat(found), expected) and same_bits(rows, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", ["one", "label", "all"])
def test_nan_and_infinity_come_out_as_of_the_reference(
    where: str, value: float, dtype: torch.dtype
) -> None:
    z, y = inputs(2, 9, dtype)
    z[0, {"one": (int(y[0]) + 1) % 9, "label": int(y[0]), "all": slice(None)}[where]] = value
    given_ = [z.clone(), z.clone()]
    losses = [
        kernels.softmax_cross_entropy_(g, y)
        for kernels, g in zip((cpu, reference), given_, strict=True)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(*given_, rtol=2 * ROUNDING[dtype], atol=1e-6, equal_nan=True)


def test_what_it_does_not_take_is_left_to_the_reference() -> None:
    z, y = inputs(6, 10, torch.float32)
    for made, options in [
        (z.double(), {}),
        (z.half(), {}),
        (z, {"softcap": 3.0}),
        (z.T.contiguous().T, {}),
        (z[:0], {}),
    ]:
        found, expected = made.clone(), made.clone()
        labels = y[: len(made)]
        a = cpu.softmax_cross_entropy_(found, labels, **options)
        b = reference.softmax_cross_entropy_(expected, labels, **options)
        assert same_bits(a, b) and same_bits(found, expected)
