"""RMSNorm on the CPU: the reference's roundings, with sums in another order."""

import pytest
import torch
from helpers import gaussian, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minilora.kernels.cpu import rms_norm as cpu
from minilora.kernels.reference import rms_norm as reference
from minilora.kernels.reference.rms_norm import Weighting

DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-5


def inputs(rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and dy."""
    x = 3 * gaussian(rows, size)
    return x.to(dtype), gaussian(size, seed=1).to(dtype), gaussian(rows, size, seed=2).to(dtype)


def exact(x: Tensor, w: Tensor, dy: Tensor, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """y and dx by autograd in float64."""
    x = x.double().requires_grad_()
    n = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    y = n * (w.double() + (weighting is Weighting.ONE_PLUS))
    (dx,) = torch.autograd.grad(y, x, dy.double())
    return y.detach(), dx


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighting", Weighting)
def test_it_is_as_exact_as_the_reference(weighting: Weighting, dtype: torch.dtype) -> None:
    for rows, size in [(300, 576), (700, 67)]:
        x, w, dy = inputs(rows, size, dtype)
        errors = []
        for kernels in (cpu, reference):
            y, r = kernels.rms_norm(x, w, EPS, weighting)
            dx = kernels.rms_norm_backward(dy, x, w, r, weighting)
            found = zip((y, dx), exact(x, w, dy, weighting), strict=True)
            errors.append([(t.double() - e).norm().item() for t, e in found])
        # Two sums of the same terms in different orders: over 40,000 elements their errors are as
        # large within some per cent.
        for ours, plain in zip(*errors, strict=True):
            assert ours <= 1.05 * plain


@given(
    rows=st.integers(0, 40),
    size=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    weighting=st.sampled_from(Weighting),
)
def test_with_exact_sums_it_is_the_reference(
    rows: int, size: int, dtype: torch.dtype, weighting: Weighting
) -> None:
    """Small integers: their squares have the same sum in any order."""
    x, w, _ = inputs(rows, size, dtype)
    x = x.round()
    for found, expected in zip(
        cpu.rms_norm(x, w, EPS, weighting), reference.rms_norm(x, w, EPS, weighting), strict=True
    ):
        assert same_bits(found, expected)


@given(rows=st.integers(0, 40), size=st.integers(1, 600), dtype=st.sampled_from(DTYPES))
def test_the_gradient_is_within_its_roundings(rows: int, size: int, dtype: torch.dtype) -> None:
    x, w, dy = inputs(rows, size, dtype)
    weighting = Weighting.BEFORE_ROUNDING
    _, r = reference.rms_norm(x, w, EPS, weighting)
    found = cpu.rms_norm_backward(dy, x, w, r, weighting)
    _, expected = exact(x, w, dy, weighting)

    # |mean(dn n)| is at most the mean of |dn n|, and a sum of I terms has at most I roundings.
    n, dn = (x * r).double(), (dy.double() * w.double())
    terms = dn.abs() + n.abs() * (dn * n).abs().mean(-1, keepdim=True)
    bound = (size + 8) * 2**-24 * r * terms
    if dtype == torch.bfloat16:
        bound += 2**-8 * expected.abs()
    assert ((found - expected).abs() <= bound + 1e-37).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_threads_change_nothing(dtype: torch.dtype) -> None:
    x, w, dy = inputs(400, 130, dtype)
    weighting = Weighting.AFTER_ROUNDING
    before = torch.get_num_threads()
    results = []
    try:
        for threads, stride in [(1, 1), (3, 1), (3, 2)]:
            torch.set_num_threads(threads)
            a, b, c = (t.repeat_interleave(stride, -1)[..., ::stride] for t in (x, w, dy))
            y, r = cpu.rms_norm(a.view(20, 20, 130), b, EPS, weighting)
            dx = cpu.rms_norm_backward(c.view(20, 20, 130), a.view(20, 20, 130), b, r, weighting)
            assert y.shape == dx.shape == (20, 20, 130) and r.shape == (20, 20, 1)
            results.append((y, r, dx))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_is_not_finite_is_that_of_pytorch(dtype: torch.dtype) -> None:
    x, w, dy = inputs(5, 40, dtype)
    x[0, 3], x[1, 7], x[2] = torch.nan, torch.inf, 0
    dy[3, 0] = torch.nan
    for weighting in Weighting:
        y, r = cpu.rms_norm(x, w, EPS, weighting)
        expected, _ = reference.rms_norm(x, w, EPS, weighting)
        torch.testing.assert_close(y, expected, equal_nan=True)
        assert y[0].isnan().all() and y[1].isnan().sum() == 1 and not y[2].any()

        dx = cpu.rms_norm_backward(dy, x, w, r, weighting)
        assert dx.isfinite().all(-1).tolist() == [False, False, True, False, True]


def test_r_is_float32_whatever_the_default_dtype_is() -> None:
    x, w, _ = inputs(5, 40, torch.bfloat16)
    try:
        torch.set_default_dtype(torch.bfloat16)
        _, r = cpu.rms_norm(x, w, EPS, Weighting.ONE_PLUS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert r.dtype == torch.float32 and r.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_left_to_the_reference(dtype: torch.dtype) -> None:
    x, w, dy = inputs(5, 40, dtype)
    y, r = cpu.rms_norm(x, w, EPS, Weighting.ONE_PLUS)
    assert same_bits(y, reference.rms_norm(x, w, EPS, Weighting.ONE_PLUS)[0])
    dx = cpu.rms_norm_backward(dy, x, w, r, Weighting.ONE_PLUS)
    assert same_bits(dx, reference.rms_norm_backward(dy, x, w, r, Weighting.ONE_PLUS))


def test_a_weight_of_another_size_is_an_error() -> None:
    x, _, _ = inputs(5, 40, torch.float32)
    with pytest.raises(RuntimeError, match="size"):
        cpu.rms_norm(x, torch.ones(39), EPS, Weighting.AFTER_ROUNDING)
