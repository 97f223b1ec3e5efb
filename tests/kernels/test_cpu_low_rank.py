"""kernels/cpu/low_rank.py: each product against float64, within the bounds of its sums.

A sum of n products in float32 has an error of at most n 2^-24 times the sum of their magnitudes. A
result in bfloat16 is rounded once, by at most 2^-8 of itself.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import gaussian, same_bits
from hypothesis import given
from hypothesis import strategies as st
from kernel_dtypes import BF16, F32, ROUNDING, every_dtype
from torch import Tensor

import minilora
from minilora.kernels.cpu import low_rank as module
from minilora.kernels.cpu.low_rank import contract, project
from minilora.kernels.reference import lora as reference

Matrices = tuple[Tensor, Tensor, Tensor]


def matrices(M: int, N: int, r: int, dtype: torch.dtype, seed: int = 0) -> Matrices:
    """P [M, N], T [M, r] and F [r, N]."""
    shapes = ((M, N), (M, r), (r, N))
    P, T, F = (gaussian(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(shapes))
    return P, T, F


# Product -> the function, the equation, and the number of products in a sum.
PRODUCTS: dict[str, tuple[Any, Any, Callable[[int, int], int]]] = {
    "project": (
        lambda P, T, F, s: project(P, F),
        lambda P, T, F, s: P @ F.T,
        lambda M, N: N,
    ),
    "contract": (
        lambda P, T, F, s: contract(T, P, s),
        lambda P, T, F, s: s * T.T @ P,
        # The sum of a chunk is added to the others, and multiplied by a scale that is rounded too.
        lambda M, N: M + 3,
    ),
}
every_product = pytest.mark.parametrize("product", PRODUCTS)


def check(product: str, P: Tensor, T: Tensor, F: Tensor, scale: float, roundings: int = 1) -> None:
    function, equation, terms = PRODUCTS[product]
    found = function(P, T, F, scale)
    exact = equation(P.double(), T.double(), F.double(), scale)
    sizes = equation(P.double().abs(), T.double().abs(), F.double().abs(), abs(scale))

    assert found.dtype == P.dtype and found.shape == exact.shape
    sums = terms(*P.shape) * 2**-24 * sizes
    rounding = roundings * ROUNDING.get(P.dtype, 0.0)
    error = (found.double() - exact).abs()
    assert (error <= sums + rounding * (exact.abs() + sums)).all()


@every_dtype
@every_product
@given(
    M=st.integers(0, 45),
    blocks=st.integers(1, 5),
    groups=st.integers(1, 8),
    scale=st.sampled_from([1.0, -0.3, 2.0]),
    seed=st.integers(0, 99),
)
def test_a_product_is_within_the_bound_of_float64(
    product: str, dtype: torch.dtype, M: int, blocks: int, groups: int, scale: float, seed: int
) -> None:
    M, N, r = 2 * M, 32 * blocks, 8 * groups
    P, T, F = matrices(M, N, r, dtype, seed)
    assert module._is_fast(P, T, F)
    check(product, P, T, F, scale)
    # As B^T: the factor's columns are contiguous.
    check(product, P.T.contiguous().T, T.T.contiguous().T, F.T.contiguous().T, scale)


@every_dtype
@every_product
def test_the_error_is_no_larger_than_that_of_pytorch(
    product: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, equation, _ = PRODUCTS[product]
    P, T, F = matrices(1024, 576, 8, dtype)
    exact = equation(P.double(), T.double(), F.double(), 1.7)

    def error() -> float:
        return float((function(P, T, F, 1.7).double() - exact).square().mean().sqrt())

    ours = error()
    monkeypatch.setattr(module, "_is_fast", lambda *_: False)
    # In bfloat16 both errors are that of rounding the result, to a thousandth.
    assert 0 < ours <= 1.001 * error()


@every_dtype
@every_product
def test_the_number_of_threads_does_not_change_a_bit(product: str, dtype: torch.dtype) -> None:
    # More rows than a chunk, and shares that end inside a group of rows or of columns.
    P, T, F = matrices(1026, 416, 16, dtype)
    function = PRODUCTS[product][0]
    expected = function(P, T, F, 1.5)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert same_bits(function(P, T, F, 1.5), expected)
    finally:
        torch.set_num_threads(before)


@every_dtype
@every_product
def test_without_openmp_the_result_is_the_same(
    product: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread pool divides pairs anywhere, not at multiples of 16."""
    P, T, F = matrices(1026, 416, 8, dtype)
    function = PRODUCTS[product][0]
    expected = function(P, T, F, 1.5)
    monkeypatch.setattr(module.team, "_OPENMP", {})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert same_bits(function(P, T, F, 1.5), expected)
    finally:
        torch.set_num_threads(before)


@every_dtype
@every_product
def test_nan_and_infinity_come_out_where_they_should(product: str, dtype: torch.dtype) -> None:
    function, equation, _ = PRODUCTS[product]
    for which in range(3):
        for value in (float("nan"), float("inf"), -float("inf")):
            held = matrices(38, 64, 8, dtype)
            held[which][5, 3] = value
            found = function(*held, 2.0).double()
            expected = equation(*(t.double() for t in held), 2.0)
            assert torch.equal(found.isnan(), expected.isnan())
            infinite = expected.isinf()
            assert torch.equal(found.isinf(), infinite)
            assert torch.equal(found[infinite], expected[infinite])


@pytest.mark.parametrize(
    ("M", "N", "r", "dtype"),
    [
        (7, 64, 8, BF16),
        (8, 70, 8, F32),
        (8, 64, 3, F32),
        (8, 64, 12, BF16),
        (8, 64, 8, torch.float64),
    ],
    ids=str,
)
@every_product
def test_pytorch_multiplies_what_the_kernels_do_not_take(
    product: str, M: int, N: int, r: int, dtype: torch.dtype
) -> None:
    P, T, F = matrices(M, N, r, dtype)
    assert not module._is_fast(P, T, F)
    # `contract` rounds the product and its multiple.
    check(product, P, T, F, 1.7, roundings=2)


@every_dtype
@every_product
def test_pytorch_multiplies_on_processors_without_avx512(
    product: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AVX512", False)
    monkeypatch.setattr(module, "AVX512_BF16", False)
    P, T, F = matrices(64, 64, 8, dtype)
    assert not module._is_fast(P, T, F)
    check(product, P, T, F, 1.7, roundings=2)


def test_factors_that_do_not_fit_are_refused() -> None:
    P, T, F = matrices(64, 64, 8, F32)
    wrong: list[Callable[[], Any]] = [
        lambda: project(P, F[:, :32]),
        lambda: project(P, F.bfloat16()),
        lambda: contract(T[:32], P, 1.0),
        lambda: contract(T.bfloat16(), P, 1.0),
    ]
    for call in wrong:
        with pytest.raises(RuntimeError):
            call()


def test_the_call_is_laid_out_as_the_kernels_read_it() -> None:
    # team.py reads how much there is from the first field, and writes the kernel to the second.
    assert (module._Call.pairs.offset, module._Call.kernel.offset) == (0, 8)
    assert ctypes.sizeof(module._Call) == module._CALL.itemsize


@every_dtype
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_layers_gradients_are_those_of_float64(dtype: torch.dtype, dropout: float) -> None:
    """Sizes that the kernels take; the layer's own rounding of W, z and u is in the oracle."""
    w = minilora.quantize_nf4(gaussian(96, 128, dtype=dtype))
    x, dy = gaussian(64, 128, dtype=dtype), gaussian(64, 96, dtype=dtype, seed=1)
    A, B = gaussian(8, 128, dtype=dtype, seed=2) / 8, gaussian(96, 8, dtype=dtype, seed=3) / 8
    leaves = [t.requires_grad_() for t in (x, A, B)]

    torch.manual_seed(0)
    y = minilora.lora_linear(x, w, A, B, 2.0, dropout=dropout)
    found = torch.autograd.grad(y, leaves, dy)

    torch.manual_seed(0)
    seed = torch.randint(1 << 62, ())
    kept = torch.ones(64, 128, dtype=torch.float64)
    if dropout:
        kept = minilora.ops.dropout(kept, dropout, seed)
    exact = [t.detach().double() for t in (x, A, B)]
    W, exact_dy = w.dequantize(dtype).double(), dy.double()
    exact_x, exact_A, exact_B = exact
    zero = torch.zeros_like(W)
    _, dA, dB = reference.gradients(exact_x * kept, zero, exact_A, exact_B, 2.0, exact_dy)
    dx = exact_dy @ W + 2.0 * kept * (exact_dy @ exact_B @ exact_A)

    # Relative to the whole gradient: one rounding of u or z, and one or two of the result.
    for gradient, expected in zip(found, (dx, dA, dB), strict=True):
        error = (gradient.double() - expected).norm() / expected.norm()
        assert error < (2**-8 if dtype == BF16 else 2**-20)
