"""The products of kernels/gpu on every path.

Against float32 sums rounded once, against float64, and for odd sizes, strides and ranks.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from allocating import allocating_with
from gpu import DEVICE, INTERPRETED, Buffers, guarded, on_device
from helpers import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weights import packed_weight

from minilora.kernels.gpu import choose, lora, matmul
from minilora.kernels.gpu.runtime import LowRank
from minilora.kernels.reference import nf4 as reference
from minilora.kernels.reference.codebooks import levels
from minilora.kernels.reference.nf4 import PackedWeight

HALVES = (torch.bfloat16, torch.float16)
SKINNY = {"path": "skinny"}
DENSE = {"path": "dense"}
LINES = [*choose.lines("forward"), *choose.lines("backward")]
TILES = [line for line in LINES if line["path"] == "tile"]
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def weight(O: int, I: int, block_size: int = 64, double: bool = True, seed: int = 0) -> Any:
    return packed_weight(0.1 * gaussian(O, I, seed=seed), block_size, double)


def forward(
    x: Tensor, w: PackedWeight, bias: Tensor | None, low: LowRank | None, line: Any
) -> Tensor:
    """The product in guarded memory, brought back to the CPU."""
    with guarded() as buffers:
        term = LowRank(*map(buffers.hold, low[:2]), low.scale) if low else None
        held = buffers.hold_weight(w)
        return matmul.forward(buffers.hold(x), held, buffers.hold(bias), term, line).cpu()


def backward(dy: Tensor, w: PackedWeight, low: LowRank | None, line: Any) -> Tensor:
    with guarded() as buffers:
        term = LowRank(*map(buffers.hold, low[:2]), low.scale) if low else None
        return matmul.backward(buffers.hold(dy), buffers.hold_weight(w), term, line).cpu()


def skinny_formula(x: Tensor, w: PackedWeight, wide: torch.dtype) -> Tensor:
    """The formula of skinny.py summed in `wide`.

    Blocks of levels rounded to the dtype of x, each times its absmax.
    """
    O, I = w.shape
    blocks = I // w.block_size
    absmax = w.absmax
    if w.absmax2 is not None and w.offset is not None:
        absmax = reference.double_dequantize(absmax, w.absmax2, w.offset)

    codes = torch.stack([w.packed >> 4, w.packed & 15], dim=1).view(O, blocks, w.block_size)
    rounded = levels(w.quant_type).to(x.dtype).to(wide)[codes.int()]
    sums = torch.einsum("mbk,obk->mob", x.to(wide).view(-1, blocks, w.block_size), rounded)
    return (sums * absmax.view(O, -1).to(wide)).sum(2)


# Oracle: sums in float32, rounded once.


def units_apart(found: Tensor, expected: Tensor) -> Tensor:
    """The number of steps between two results among the numbers of their 16-bit dtype."""

    def order(t: Tensor) -> Tensor:
        bits = t.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (order(found) - order(expected)).abs()


def compare(
    dtype: torch.dtype, results: list[tuple[Tensor, Tensor]], magnitudes: list[Tensor]
) -> None:
    """At least 99.8 % (float16) or 99.9 % (bfloat16) of all outputs are the float32 sum rounded.

    The rest are off by two roundings at most: two units of their own, or, where a sum cancels, the
    error of the float32 sums themselves.
    """
    equal = torch.cat([(a == b.to(dtype)).flatten() for a, b in results]).double().mean()
    assert equal >= (0.998 if dtype == torch.float16 else 0.999), equal

    for (found, expected), magnitude in zip(results, magnitudes, strict=True):
        near = units_apart(found, expected.to(dtype)) <= 2
        cancelled = (found - expected).abs() <= 2**-14 * magnitude
        assert (near | cancelled).all()


@halves
@pytest.mark.parametrize("line", TILES, ids=lambda line: f"{line['BM']}x{line['BO']}x{line['BI']}")
def test_tiles_equal_float32_sums_rounded_once(dtype: torch.dtype, line: dict[str, Any]) -> None:
    results, magnitudes = [], []
    for (O, I), M in (((100, 256), 1), ((65, 128), 3), ((192, 576), 17), ((130, 512), 130)):
        if I % line["BI"]:
            continue
        w = weight(O, I)
        W = reference.dequantize(w, dtype).float()
        x, dy = gaussian(M, I, dtype=dtype), gaussian(M, O, dtype=dtype)

        results.append((forward(x, w, None, None, line), x.float() @ W.T))
        magnitudes.append(x.float().abs() @ W.abs().T)
        results.append((backward(dy, w, None, line), dy.float() @ W))
        magnitudes.append(dy.float().abs() @ W.abs())
    compare(dtype, results, magnitudes)


@halves
def test_skinny_equals_its_own_float32_sums_rounded_once(dtype: torch.dtype) -> None:
    shapes = ((100, 256), (65, 128), (192, 576), (256, 1024), (130, 512))
    results, magnitudes = [], []
    for (O, I), M in zip(shapes, (1, 9, 16, 33, 64), strict=True):
        w, x = weight(O, I), gaussian(M, I, dtype=dtype)
        expected = skinny_formula(x, w, torch.float32)
        results.append((forward(x, w, None, None, SKINNY), expected))
        magnitudes.append(x.float().abs() @ reference.dequantize(w, torch.float32).abs().T)
    compare(dtype, results, magnitudes)


@halves
def test_skinny_is_as_near_to_the_unrounded_weight_as_dequantize_is(dtype: torch.dtype) -> None:
    w, x = weight(256, 1024), gaussian(16, 1024, dtype=dtype)
    exact = x.double() @ reference.dequantize(w, torch.float64).T
    rounded = x.double() @ reference.dequantize(w, dtype).double().T
    found = skinny_formula(x, w, torch.float64)

    def error(y: Tensor) -> Tensor:
        return (y - exact).square().mean().sqrt()

    assert error(found) < 1.2 * error(rounded)


# Property: within rounding of float64, for anything that a caller may pass.


@given(
    M=st.sampled_from([1, 3, 7, 16, 17, 33, 130]),
    O=st.sampled_from([1, 17, 64, 65, 96, 200]),
    I=st.sampled_from([64, 128, 192, 256, 512]),
    block_size=st.sampled_from([32, 64, 128, 256, 512]),
    double=st.booleans(),
    dtype=st.sampled_from(HALVES),
    with_bias=st.booleans(),
    r=st.sampled_from([0, 1, 5, 16, 20, 70]),
    layout=st.sampled_from(["rows", "columns", "gaps", "one row repeated"]),
    pick=st.integers(0, 99),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=120)
def test_forward_and_backward_are_within_rounding_of_float64(
    M: int,
    O: int,
    I: int,
    block_size: int,
    double: bool,
    dtype: torch.dtype,
    with_bias: bool,
    r: int,
    layout: str,
    pick: int,
    seed: int,
) -> None:
    # A divisor of I: other block sizes take the dense path, tested below.
    block_size = min(block_size, I & -I)
    w = weight(O, I, block_size, double, seed)
    exact = reference.dequantize(w, torch.float64)

    for direction in ("forward", "backward"):
        is_forward = direction == "forward"
        wide, tall = (I, O) if is_forward else (O, I)
        W = exact if is_forward else exact.T
        x = laid_out(gaussian(M, wide, dtype=dtype, seed=seed), layout)
        bias = gaussian(O, dtype=dtype, seed=seed) if with_bias and is_forward else None
        right = gaussian(tall, r, dtype=dtype, seed=seed + 2)
        right = right if pick % 2 else right.T.contiguous().T
        low = LowRank(gaussian(M, r, dtype=dtype, seed=seed + 1), right, 0.75) if r else None

        lines = [DENSE, *(t for t in TILES if I % t["BI"] == 0)]
        lines += [SKINNY] if is_forward and M <= 64 and block_size >= 64 else []
        line = lines[pick % len(lines)]
        if line is DENSE and INTERPRETED and layout == "gaps":
            # PyTorch's own product on a CPU with AVX512-BF16 multiplies the element behind a row of
            # odd length by zero: NaN, where the guard bytes are.
            x = x.contiguous()

        found = forward(x, w, bias, low, line) if is_forward else backward(x, w, low, line)
        expected, error = float64_product(x, W, bias, low, roundings=5 if line is DENSE else 2)
        assert found.dtype == dtype and found.shape == (M, tall)
        excess = (found.double() - expected).abs() - error
        assert (excess <= 0).all(), (line, excess.max())


def float64_product(
    x: Tensor, W: Tensor, bias: Tensor | None, low: LowRank | None, roundings: int
) -> tuple[Tensor, Tensor]:
    """Returns the product in float64 and the error that its roundings allow.

    Roundings to the dtype of x: of W or its levels, of the result; on the dense path also of the
    product before bias and term are added, and of the scaled factor. Sums in float32 run over the
    columns and the rank. A number so small that it is denormal errs by half of the spacing of the
    denormals, a weight by that times what it multiplies.
    """
    expected = x.double() @ W.T
    magnitude = x.double().abs() @ W.abs().T
    for part, size in addends(low, bias):
        expected = expected + part
        magnitude = magnitude + size

    info = torch.finfo(x.dtype)
    terms = W.shape[1] + (low.left.shape[1] if low else 0) + 2
    error = 1.01 / 2 * (roundings * info.eps + terms * 2**-23) * magnitude
    denormal = info.eps * info.smallest_normal
    error = error + roundings * denormal / 2 * (1 + x.double().abs().sum(1, keepdim=True))
    return expected, error


def addends(low: LowRank | None, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    if low:
        left, right = low.left.double(), low.right.double()
        yield low.scale * left @ right.T, low.scale * left.abs() @ right.abs().T
    if bias is not None:
        yield bias.double(), bias.double().abs()


def laid_out(t: Tensor, layout: str) -> Tensor:
    """A tensor of t's shape in other strides."""
    match layout:
        case "columns":
            return t.T.contiguous().T
        case "gaps":
            return torch.cat([t, t], dim=1)[:, : t.shape[1]]
        case "one row repeated":
            return t[:1].expand(t.shape)
    return t


CHOICES = pytest.mark.parametrize(
    "choice", [SKINNY, DENSE, TILES[0], TILES[-1]], ids=lambda c: f"{c['path']}{c.get('BM', '')}"
)


@halves
@CHOICES
def test_factors_of_the_low_rank_term_in_any_strides(
    dtype: torch.dtype, choice: dict[str, Any]
) -> None:
    (O, I), M, r = (200, 128), 5, 20
    w, x = weight(O, I), gaussian(M, I, dtype=dtype)
    left, right = gaussian(M, r, dtype=dtype), gaussian(O, r, dtype=dtype)
    expected = forward(x, w, None, LowRank(left, right, 0.5), choice)
    for a, b in (
        (laid_out(left, "columns"), right),
        (left, laid_out(right, "columns")),
        (left, laid_out(right, "gaps")),
    ):
        assert torch.equal(forward(x, w, None, LowRank(a, b, 0.5), choice), expected)


def test_rows_of_x_far_apart_are_reached() -> None:
    # 9 rows: more than 2^31 elements from the first to the last.
    apart = 2**28 + 2**20
    w, small = weight(64, 64), gaussian(9, 64).bfloat16()
    try:
        memory = torch.empty(8 * apart + 64, dtype=torch.bfloat16, device=DEVICE)
    except (RuntimeError, torch.OutOfMemoryError):
        pytest.skip("no 4.6 GB of address space here")

    # Untouched pages cost nothing.
    far = memory.as_strided((9, 64), (apart, 1))
    far[:] = small.to(DEVICE)
    for choice in (SKINNY, TILES[0]):
        found = matmul.forward(far, on_device(w), None, None, choice).cpu()
        assert torch.equal(found, forward(small, w, None, None, choice))


@halves
def test_x_and_codes_that_are_not_aligned_give_the_same_bits(dtype: torch.dtype) -> None:
    (O, I), M = (65, 128), 5
    w, x = weight(O, I), gaussian(M, I, dtype=dtype)
    with guarded() as buffers:
        shifted = buffers.hold(torch.cat([x.flatten()[:1], x.flatten()]))[1:].view(M, I)
        codes = buffers.hold(torch.cat([w.absmax[:1], w.absmax]))[1:]
        held = buffers.hold_weight(w)._replace(absmax=codes)
        for choice in (SKINNY, TILES[0], DENSE):
            found = matmul.forward(shifted, held, None, None, choice)
            assert torch.equal(found.cpu(), forward(x, w, None, None, choice))


@halves
def test_packed_bytes_that_are_not_aligned_are_dequantized_whole(dtype: torch.dtype) -> None:
    w, x = weight(65, 128), gaussian(5, 128, dtype=dtype)
    with guarded() as buffers:
        packed = buffers.hold(torch.cat([w.packed[:1], w.packed]))[1:]
        held = buffers.hold_weight(w)._replace(packed=packed)
        found = matmul.forward(buffers.hold(x), held, None, None)
        assert torch.equal(found.cpu(), forward(x, w, None, None, DENSE))
        with pytest.raises(ValueError, match=r"'skinny'.* does not take 5 rows"):
            matmul.forward(buffers.hold(x), held, None, None, SKINNY)


@halves
@pytest.mark.parametrize("leading", [(), (1,), (5,), (3, 7), (2, 100), (0,), (4, 0)], ids=str)
def test_the_path_from_the_table_with_leading_dimensions(
    leading: tuple[int, ...], dtype: torch.dtype
) -> None:
    w = weight(96, 128)
    W = reference.dequantize(w, torch.float64)
    x, dy = gaussian(*leading, 128, dtype=dtype), gaussian(*leading, 96, dtype=dtype)
    z, u = gaussian(*leading, 4, dtype=dtype), gaussian(*leading, 4, dtype=dtype)
    A, B = gaussian(4, 128, dtype=dtype), gaussian(96, 4, dtype=dtype)

    with guarded() as buffers:
        hold = buffers.hold
        held = buffers.hold_weight(w)
        found = [
            matmul.nf4_linear(hold(x), held, None),
            matmul.nf4_linear_backward(hold(dy), held),
            lora.nf4_lora_linear(hold(x), held, None, hold(z), hold(B), 2.0),
            lora.nf4_lora_linear_backward(hold(dy), held, hold(u), hold(A), 2.0),
        ]

    y, dx = x.double() @ W.T, dy.double() @ W
    expected = [y, dx, y + 2 * z.double() @ B.double().T, dx + 2 * u.double() @ A.double()]
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        if a.numel():
            tolerance = 4 * torch.finfo(dtype).eps * max(1, b.abs().max())
            assert (a.cpu().double() - b).abs().max() <= tolerance


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((33, 128), torch.float32),
        ((33, 128), torch.float64),
        ((33, 70), torch.float32),
        ((33, 70), torch.float64),
        ((33, 70), torch.bfloat16),
    ],
    ids=str,
)
def test_wide_floats_and_blocks_across_rows_multiply_the_dequantized_weight(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    w = weight(*shape)
    x, dy = gaussian(5, shape[1], dtype=dtype), gaussian(5, shape[0], dtype=dtype)
    W = reference.dequantize(w, dtype).to(DEVICE)
    y = torch.nn.functional.linear(x.to(DEVICE), W).cpu()
    assert torch.equal(forward(x, w, None, None, None), y)
    assert torch.equal(backward(dy, w, None, None), (dy.to(DEVICE) @ W).cpu())


# Memory and determinism.


class Sizes(Buffers):
    """Buffers that remember the largest."""

    largest = 0

    def empty(self, *size: Any, **kind: Any) -> Tensor:
        t = super().empty(*size, **kind)
        self.largest = max(self.largest, t.nbytes)
        return t


@pytest.mark.parametrize("line", [SKINNY, *TILES], ids=lambda line: line["path"])
def test_fused_paths_never_hold_a_dense_weight(line: dict[str, Any]) -> None:
    O, I = 192, 256
    w = on_device(weight(O, I))
    x, dy = gaussian(2, I).bfloat16().to(DEVICE), gaussian(2, O).bfloat16().to(DEVICE)
    sizes = Sizes()
    with allocating_with(sizes.empty):
        matmul.forward(x, w, None, None, line)
        if line["path"] == "tile":
            matmul.backward(dy, w, None, line)
    assert 0 < sizes.largest < O * I // 4


@pytest.mark.skipif(INTERPRETED, reason="numpy always gives the same bits; a GPU has to show it")
def test_the_same_bits_every_time() -> None:
    w, x = weight(128, 1024), gaussian(4, 1024).bfloat16()
    first = forward(x, w, None, None, SKINNY)
    assert all(torch.equal(first, forward(x, w, None, None, SKINNY)) for _ in range(3))


# Errors.


def test_a_product_of_what_does_not_fit_is_refused_by_name() -> None:
    w = on_device(weight(96, 128))
    x = torch.ones(3, 128, device=DEVICE).bfloat16()
    bias = torch.ones(96, device=DEVICE).bfloat16()
    smaller = w._replace(shape=(96, 64))
    x_does_not_fit = r"x \(3, 127\) does not fit a weight \(96, 128\): its last size must be 128"
    rows_do_not_fit = (
        r"'skinny'.* does not take 65 rows of torch\.bfloat16 "
        r"and a weight \(96, 128\) in blocks of 64"
    )

    with pytest.raises(ValueError, match=x_does_not_fit):
        matmul.nf4_linear(x[:, 1:], w, bias)
    with pytest.raises(TypeError, match=r"x is torch\.int64: the kernel takes float32"):
        matmul.nf4_linear(x.long(), w, bias)
    with pytest.raises(TypeError, match=r"bias is torch\.float32: the kernel takes bfloat16"):
        matmul.nf4_linear(x, w, bias.float())
    with pytest.raises(ValueError, match=r"bias is \(95,\): a weight \(96, 128\) takes one of"):
        matmul.nf4_linear(x, w, bias[1:])
    with pytest.raises(ValueError, match=r"packed has 6144 elements, contiguous: a weight"):
        matmul.nf4_linear(x[:, :64], smaller, bias)
    with pytest.raises(ValueError, match=r"a product takes a weight \[out, in\], not \(12288,\)"):
        matmul.nf4_linear(x, w._replace(shape=(12288,)), None)
    with pytest.raises(ValueError, match=rows_do_not_fit):
        matmul.forward(x[:1].expand(65, 128), w, None, None, SKINNY)
    with pytest.raises(ValueError, match=r"dy \(3, 128\) does not fit"):
        matmul.nf4_linear_backward(x, w)


def test_a_low_rank_term_that_does_not_fit_is_refused_by_name() -> None:
    w = on_device(weight(96, 128))
    x = torch.ones(3, 128, device=DEVICE).bfloat16()
    left = torch.ones(3, 4, device=DEVICE).bfloat16()
    right = torch.ones(96, 4, device=DEVICE).bfloat16()

    too_short = r"the low-rank term's right factor is \(95, 4\), not \(96, 4\)"
    with pytest.raises(ValueError, match=too_short):
        matmul.forward(x, w, None, LowRank(left, right[1:], 1.0))
    with pytest.raises(TypeError, match=r"the low-rank term's left factor is torch\.float32"):
        matmul.forward(x, w, None, LowRank(left.float(), right, 1.0))
