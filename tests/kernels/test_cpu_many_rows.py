"""kernels/cpu/many_rows.py and panels.py: each product against float64, within its bounds.

A sum of n products in float32 has an error of at most n 2^-24 times the sum of their magnitudes. A
result in bfloat16 is rounded once, by at most 2^-8 of itself.
"""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import gaussian, same_bits
from hypothesis import given
from hypothesis import strategies as st
from kernel_dtypes import BF16, F32, ROUNDING, every_dtype
from torch import Tensor

import minilora
from minilora import ops
from minilora.kernels.cpu import many_rows, panels, runtime
from minilora.kernels.cpu.avx512 import AVX512, AVX512_BF16
from minilora.kernels.cpu.moves import pair_rows
from minilora.kernels.cpu.nf4 import levels_of
from minilora.kernels.reference.nf4 import PackedWeight

both_ways = pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])


def packed(O: int, I: int, block_size: int = 64, double: bool = True) -> PackedWeight:
    w = minilora.quantize_nf4(gaussian(O, I, seed=9), block_size=block_size, double_quant=double)
    return PackedWeight(*ops._flatten(w))


def operands(
    M: int, w: PackedWeight, r: int, dtype: torch.dtype, forward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """L, T and F of a product with w."""
    O, I = w.shape
    K, N = (I, O) if forward else (O, I)
    shapes = (M, K), (M, r), (N, r) if forward else (r, N)
    L, T, F = (gaussian(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    return L, T, F


def dense(w: PackedWeight, dtype: torch.dtype) -> Tensor:
    """W as the product sees it: rounded to the dtype of the rows."""
    return torch.ops.minilora.dequantize(*w, dtype).double()


def check(
    w: PackedWeight, L: Tensor, T: Tensor | None, F: Tensor | None, scale: float, forward: bool
) -> None:
    assert many_rows.is_fast(L, w, T, F, forward=forward)
    found = many_rows.product(L, w, T, F, scale, forward=forward)

    W = dense(w, L.dtype)
    R = W.T if forward else W
    exact, size, terms = L.double() @ R, L.double().abs() @ R.abs(), len(R)
    if T is not None and F is not None:
        F = F.T if forward else F
        exact += scale * (T.double() @ F.double())
        size += abs(scale) * (T.double().abs() @ F.double().abs())
        # The sum is scaled and added.
        terms += len(F) + 2

    assert found.dtype == L.dtype and found.shape == exact.shape
    sums = (terms + 1) * 2**-24 * size
    error = (found.double() - exact).abs()
    assert (error <= sums + ROUNDING[L.dtype] * (exact.abs() + sums)).all()


@every_dtype
@both_ways
@given(
    M=st.integers(8, 41),
    panels_of_O=st.integers(1, 5),
    blocks=st.integers(1, 3),
    block_size=st.sampled_from([64, 128]),
    r=st.sampled_from([0, 2, 4, 8, 10, 64]),
    double=st.booleans(),
    scale=st.sampled_from([2.0, 0.3, -1.0, 0.0]),
)
def test_a_product_is_within_the_roundings_of_its_sum(
    dtype: torch.dtype,
    forward: bool,
    M: int,
    panels_of_O: int,
    blocks: int,
    block_size: int,
    r: int,
    double: bool,
    scale: float,
) -> None:
    w = packed(32 * panels_of_O, blocks * block_size, block_size, double)
    L, T, F = operands(M, w, r, dtype, forward)
    if r:
        check(w, L, T, F, scale, forward)
    else:
        check(w, L, None, None, scale, forward)


@every_dtype
@both_ways
@pytest.mark.parametrize("size", [1024, 1088, 2112, 2176])
def test_long_sums_are_made_of_parts(dtype: torch.dtype, forward: bool, size: int) -> None:
    """Around one and two chunks of 512 words, of one number or two."""
    w = packed(32, size) if forward else packed(size, 64)
    check(w, *operands(9, w, 8, dtype, forward), 2.0, forward)


@pytest.mark.skipif(not AVX512, reason="no AVX-512")
def test_the_parts_of_a_long_sum_are_as_exact_as_those_of_blas() -> None:
    """In one sequential sum of 8,192 products errors would grow to five times as much."""
    w = packed(64, 8192)
    x, W = gaussian(64, 8192), dense(w, F32)
    exact = x.double() @ W.T
    error = (many_rows.product(x, w, forward=True) - exact).norm()
    assert error < 2 * (x @ W.float().T - exact).norm()


@pytest.mark.skipif(not AVX512_BF16, reason="no AVX512-BF16")
@both_ways
def test_an_update_below_the_rounding_of_y_is_not_lost(forward: bool) -> None:
    """y = x W^T + 2^-11, rounded once: the mean moves by 2^-11, if y were rounded before by 0."""
    w = packed(256, 256)
    L, T, F = operands(256, w, 2, BF16, forward)
    L /= 8
    T.fill_(1)
    F.fill_(2**-12)
    if forward:
        updated = torch.ops.minilora.nf4_lora_linear(L, *w, None, T, F, 1.0).double()
    else:
        updated = torch.ops.minilora.nf4_lora_linear_backward(L, *w, T, F, 1.0).double()
    plain = many_rows.product(L, w, forward=forward).double()

    large = plain.abs() > 0.5
    assert large.float().mean() > 0.3
    shift = (updated - plain)[large].mean().item()
    assert 0.7 * 2**-11 < shift < 1.3 * 2**-11

    twice = (plain + 2**-11).bfloat16().double()
    assert abs((twice - plain)[large].mean().item()) < 0.3 * 2**-11, "the test cannot tell"


@every_dtype
@both_ways
def test_neither_threads_nor_other_rows_change_a_bit(dtype: torch.dtype, forward: bool) -> None:
    w = packed(224, 192)
    L, T, F = operands(45, w, 8, dtype, forward)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(many_rows.product(L, w, T, F, 0.7, forward=forward))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(y, found[0]) for y in found[1:])

    few = many_rows.product(L[3:14], w, T[3:14], F, 0.7, forward=forward)
    assert same_bits(few, found[0][3:14])


@every_dtype
@both_ways
def test_rows_may_be_strided_and_batched(dtype: torch.dtype, forward: bool) -> None:
    w = packed(96, 64)
    L, T, F = operands(24, w, 8, dtype, forward)
    expected = many_rows.product(L, w, T, F, 1.5, forward=forward)

    L, T = (t.view(2, 3, 4, -1).transpose(0, 2) for t in (L, T))
    F = F.T.contiguous().T
    found = many_rows.product(L, w, T, F, 1.5, forward=forward)
    assert same_bits(found, expected.view(2, 3, 4, -1).transpose(0, 2))


@pytest.mark.skipif(not AVX512, reason="no AVX-512")
@both_ways
def test_one_wrong_number_stays_in_its_row_and_column(forward: bool) -> None:
    w = packed(96, 64)
    L, T, F = operands(11, w, 8, F32, forward)
    clean = many_rows.product(L, w, T, F, 1.0, forward=forward)
    L[4, 7] = torch.nan
    found = many_rows.product(L, w, T, F, 1.0, forward=forward)
    assert found[4].isnan().all()
    others = torch.arange(11) != 4
    assert same_bits(found[others], clean[others])


def test_what_does_not_fit_is_left_to_pytorch() -> None:
    w = packed(64, 128)
    x, z, B = operands(16, w, 8, F32, forward=True)

    def is_fast(*args: Any, weight: PackedWeight = w) -> bool:
        first, *rest = args
        return many_rows.is_fast(first, weight, *rest, forward=True)

    assert is_fast(x, z, B) == AVX512
    assert not is_fast(x[:7], z[:7], B), "fewer than eight rows"
    assert not is_fast(x[:, :64], z, B)
    assert not is_fast(x, z[:9], B)
    assert not is_fast(x, z, B[:32])
    assert not is_fast(x, z[:, :7], B[:, :7]), "a word holds two"
    assert not is_fast(x, z.bfloat16(), B)
    assert not is_fast(x, z, B.double())
    assert not is_fast(x.double(), z.double(), B.double())
    assert not is_fast(x.half())
    assert not is_fast(x.to("meta"))
    assert not is_fast(x, weight=packed(48, 128)), "a panel has 32 columns"
    assert not is_fast(x, weight=packed(64, 128, block_size=32)), "64 weights share a scale"
    assert not is_fast(x[:, :96].contiguous(), weight=packed(64, 96, block_size=64))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, z, B: (x[:, :64], z, B),
        lambda x, z, B: (x, z[:9], B),
        lambda x, z, B: (x, z, B[:32]),
        lambda x, z, B: (x, z.bfloat16(), B),
        lambda x, z, B: (x, z, B.double()),
    ],
    ids=["columns of x", "rows of z", "rows of B", "dtype of z", "dtype of B"],
)
def test_the_operator_refuses_what_does_not_fit(wrong: Any) -> None:
    """Reading it would run past the end of a tensor."""
    w = packed(64, 128)
    x, z, B = wrong(*operands(16, w, 8, F32, forward=True))
    with pytest.raises(RuntimeError):
        torch.ops.minilora.nf4_lora_linear(x, *w, None, z, B, 1.0)


@pytest.mark.parametrize("columns", [64, 256])
@pytest.mark.parametrize("rows", [1, 2, 16])
def test_every_product_refuses_rows_of_another_length(rows: int, columns: int) -> None:
    """Two halves are not a row, nor is one row two: they have as many numbers."""
    w = packed(64, 128)
    x, dy = gaussian(rows, columns), gaussian(rows, columns // 2)
    operators = torch.ops.minilora
    for call in (
        lambda: operators.nf4_linear(x, *w, None),
        lambda: operators.nf4_inference(x, *w, None),
        lambda: operators.nf4_linear_backward(dy, *w),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            call()


@every_dtype
@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
def test_the_operators_use_it(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, adapter: bool
) -> None:
    """The BLAS path differs by its roundings alone."""
    w, bias = packed(96, 128), gaussian(96, dtype=dtype, seed=5)
    x, z, B = operands(16, w, 8, dtype, forward=True)
    dy, u, A = operands(16, w, 8, dtype, forward=False)

    def products() -> tuple[Tensor, Tensor]:
        if adapter:
            return (
                torch.ops.minilora.nf4_lora_linear(x, *w, bias, z, B, 0.7),
                torch.ops.minilora.nf4_lora_linear_backward(dy, *w, u, A, 0.7),
            )
        return (
            torch.ops.minilora.nf4_linear(x, *w, bias),
            torch.ops.minilora.nf4_linear_backward(dy, *w),
        )

    calls = []
    real = many_rows.product

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(options)
        return real(*args, **options)

    monkeypatch.setattr(many_rows, "product", counted)
    found = products()
    assert calls == [{"forward": True}, {"forward": False}]

    monkeypatch.setattr(many_rows, "is_fast", lambda *args, **options: False)
    for ours, blas in zip(found, products(), strict=True):
        bound = 1e-5 if dtype == F32 else 2 * 2**-8
        torch.testing.assert_close(ours, blas, rtol=bound, atol=bound * blas.abs().max().item())
    assert len(calls) == 2


# -- panels --------------------------------------------------------------------------------------


def weight_of(w: PackedWeight) -> panels.Weight:
    """The arrays of a packed weight."""
    none = np.empty(0, np.float32)
    absmax = runtime.array(w.absmax), none.view(np.uint8), none, np.float32(0)
    if w.absmax2 is not None and w.offset is not None:
        offset = np.float32(w.offset.item())
        absmax = none, runtime.array(w.absmax), runtime.array(w.absmax2), offset
    arrays = runtime.array(w.packed), *absmax, levels_of(w.quant_type)
    return panels.Weight(*w.shape, w.block_size, *arrays)


def words(x: Tensor) -> np.ndarray:
    """The rows of a matrix as words."""
    return x.contiguous().view(torch.int32).numpy().view(np.uint32).ravel()


@every_dtype
@pytest.mark.parametrize("double", [False, True], ids=["absmax", "double quantized"])
def test_panels_hold_the_weights_to_the_bit(dtype: torch.dtype, double: bool) -> None:
    w = packed(96, 192, double=double)
    W = torch.ops.minilora.dequantize(*w, dtype)
    numbers, unsigned = (2, np.uint16) if dtype == BF16 else (1, np.uint32)

    # Two panels of W^T, of rows 0 to 64; and one, the second half of a block of rows.
    size = 192 // numbers * 32
    for first, last in ((0, 64), (32, 64), (64, 96)):
        found = np.zeros(2 * size, np.uint32)
        panels.decode_rows(weight_of(w), unsigned, first, last, found)
        expected = np.zeros_like(found)
        for row in range(first, last, 32):
            at = row % 64 // 32 * size
            expected[at : at + size] = words(W[row : row + 32]).reshape(32, -1).T.ravel()
        np.testing.assert_array_equal(found, expected)

    found = np.zeros(2 * 96 // numbers * 32, np.uint32)
    panels.decode_columns(weight_of(w), unsigned, 64, found)
    expected = []
    for start in (64, 96):
        columns = runtime.bits(W[:, start : start + 32].contiguous()).reshape(-1, numbers, 32)
        pairs = columns[:, 0].astype(np.uint32)
        if numbers == 2:
            pairs |= columns[:, 1].astype(np.uint32) << 16
        expected.append(pairs.ravel())
    np.testing.assert_array_equal(found, np.concatenate(expected))


@runtime.jit
def _pair(x: Any, low: int, high: int, out: Any, target: int) -> None:
    pair_rows(x, low, high, out, target)


def test_rows_are_paired() -> None:
    x = np.arange(100, dtype=np.uint16)
    out = np.zeros(40, np.uint32)
    _pair(x, 3, 50, out, 5)
    expected = x[3:35].astype(np.uint32) | x[50:82].astype(np.uint32) << 16
    np.testing.assert_array_equal(out[5:37], expected)
    assert not out[:5].any() and not out[37:].any()

    _pair(x.astype(np.uint32), 3, 50, out, 5)
    np.testing.assert_array_equal(out[5:37], x[3:35])
