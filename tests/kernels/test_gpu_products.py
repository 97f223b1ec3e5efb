"""The Triton products, on every path: against float32 sums rounded once, against float64, for odd sizes, strides and ranks."""

import json
from typing import Any

import pytest
import torch
from gpu import DEVICE, INTERPRETED, Buffers, gaussian, guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minilora.kernels.gpu import choose, lora, matmul, permute, runtime
from minilora.kernels.gpu.runtime import tl, triton
from minilora.kernels.reference import nf4 as reference

HALVES = (torch.bfloat16, torch.float16)
SKINNY = {"path": "skinny"}
DENSE = {"path": "dense"}
TILES = [
    line
    for direction in ("forward", "backward")
    for line in choose.lines(direction)
    if line["path"] == "tile"
]
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def weight(O: int, I: int, block_size: int, double: bool, seed: int = 0) -> tuple[Any, ...]:
    packed, absmax = reference.quantize(0.1 * gaussian(O, I, seed=seed), block_size)
    return packed, *(reference.double_quantize(absmax) if double else (absmax, None, None))


def decoded(w: Any, shape: tuple[int, int], dtype: torch.dtype, block_size: int) -> Tensor:
    return reference.dequantize(*w, shape, dtype, block_size)


def forward(
    x: Tensor, w: Any, bias: Tensor | None, low: Any, shape: Any, block_size: int, line: Any
) -> Tensor:
    """The product in guarded memory, brought back to the CPU."""
    with guarded() as buffers:
        term = matmul.LowRank(*map(buffers.hold, low[:2]), low[2]) if low else None
        w = tuple(map(buffers.hold, w))
        return matmul.forward(
            buffers.hold(x), w, buffers.hold(bias), term, shape, block_size, line
        ).cpu()


def backward(dy: Tensor, w: Any, low: Any, shape: Any, block_size: int, line: Any) -> Tensor:
    with guarded() as buffers:
        term = matmul.LowRank(*map(buffers.hold, low[:2]), low[2]) if low else None
        return matmul.backward(
            buffers.hold(dy), tuple(map(buffers.hold, w)), term, shape, block_size, line
        ).cpu()


def skinny_exact(
    x: Tensor,
    w: Any,
    shape: tuple[int, int],
    dtype: torch.dtype,
    block_size: int,
    wide: torch.dtype,
) -> Tensor:
    """What skinny.py says that it computes, summed in `wide`: blocks of levels rounded to dtype, each times its absmax."""
    O, I = shape
    packed, absmax, absmax2, offset = w
    if absmax2 is not None:
        absmax = reference.double_dequantize(absmax, absmax2, offset)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(O, I // block_size, block_size)
    levels = reference.CODE.to(dtype).to(wide)[codes.int()]
    sums = torch.einsum("mbk,obk->mob", x.to(wide).view(-1, I // block_size, block_size), levels)
    return (sums * absmax.view(O, -1).to(wide)).sum(2)


# ---- oracle: sums in float32, rounded once


def units(found: Tensor, expected: Tensor) -> Tensor:
    """How many numbers of their dtype lie between two results, as if they were whole numbers."""

    def order(t: Tensor) -> Tensor:
        bits = t.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (order(found) - order(expected)).abs()


def compare(
    dtype: torch.dtype, results: list[tuple[Tensor, Tensor]], magnitudes: list[Tensor]
) -> None:
    """At least 99.8 % (float16) or 99.9 % (bfloat16) of all outputs equal the float32 sum rounded once. The rest are off by two
    roundings at most: two units of their own, or, where a sum cancels, the float32 sums' own error."""
    equal = torch.cat([(a == b.to(dtype)).flatten() for a, b in results]).double().mean()
    assert equal >= (0.998 if dtype == torch.float16 else 0.999), equal
    for (found, expected), magnitude in zip(results, magnitudes, strict=True):
        assert (
            (units(found, expected.to(dtype)) <= 2)
            | ((found - expected).abs() <= 2**-14 * magnitude)
        ).all()


@halves
@pytest.mark.parametrize("line", TILES, ids=lambda line: f"{line['BM']}x{line['BO']}x{line['BI']}")
def test_tiles_equal_float32_sums_rounded_once(dtype: torch.dtype, line: dict[str, Any]) -> None:
    results, magnitudes = [], []
    for (O, I), M in (((100, 256), 1), ((65, 128), 3), ((192, 576), 17), ((130, 512), 130)):
        w, shape = weight(O, I, 64, True), (O, I)
        W = decoded(w, shape, dtype, 64).float()
        x, dy = gaussian(M, I, dtype=dtype), gaussian(M, O, dtype=dtype)
        if I % line["BI"] == 0:
            results.append((forward(x, w, None, None, shape, 64, line), x.float() @ W.T))
            results.append((backward(dy, w, None, shape, 64, line), dy.float() @ W))
            magnitudes += [x.float().abs() @ W.abs().T, dy.float().abs() @ W.abs()]
    compare(dtype, results, magnitudes)


@halves
def test_skinny_equals_its_own_float32_sums_rounded_once(dtype: torch.dtype) -> None:
    results, magnitudes = [], []
    for (O, I), M in (
        ((100, 256), 1),
        ((65, 128), 3),
        ((192, 576), 8),
        ((256, 1024), 9),
        ((130, 512), 16),
    ):
        w, x = weight(O, I, 64, True), gaussian(M, I, dtype=dtype)
        results.append(
            (
                forward(x, w, None, None, (O, I), 64, SKINNY),
                skinny_exact(x, w, (O, I), dtype, 64, torch.float32),
            )
        )
        magnitudes.append(x.float().abs() @ decoded(w, (O, I), torch.float32, 64).abs().T)
    compare(dtype, results, magnitudes)


@halves
def test_skinny_is_as_near_to_the_unrounded_weight_as_dequantize_is(dtype: torch.dtype) -> None:
    O, I, M = 256, 1024, 16
    w, x = weight(O, I, 64, True), gaussian(M, I, dtype=dtype)
    exact = x.double() @ decoded(w, (O, I), torch.float64, 64).T
    rounded = x.double() @ decoded(w, (O, I), dtype, 64).double().T
    found = skinny_exact(x, w, (O, I), dtype, 64, torch.float64)
    assert (found - exact).square().mean().sqrt() < 1.2 * (rounded - exact).square().mean().sqrt()


# ---- property: within rounding of float64, for anything that a caller may pass


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
    block_size = min(
        block_size, I & -I
    )  # a divisor of I: what does not divide it takes the dense path, tested below
    w, shape = weight(O, I, block_size, double, seed), (O, I)
    exact = decoded(w, shape, torch.float64, block_size)
    bias = gaussian(O, dtype=dtype, seed=seed) if with_bias else None
    for direction in ("forward", "backward"):
        wide, tall = (I, O) if direction == "forward" else (O, I)
        x = laid_out(gaussian(M, wide, dtype=dtype, seed=seed), layout)
        W = exact if direction == "forward" else exact.T
        right = gaussian(tall, r, dtype=dtype, seed=seed + 2)
        right = right if pick % 2 else right.T.contiguous().T
        low = (gaussian(M, r, dtype=dtype, seed=seed + 1), right, 0.75) if r else None
        lines = [DENSE, *(t for t in TILES if I % t["BI"] == 0)]
        lines += [SKINNY] if direction == "forward" and M <= 16 and block_size >= 64 else []
        line = lines[pick % len(lines)]
        if direction == "forward":
            found = forward(x, w, bias, low, shape, block_size, line)
        else:
            found = backward(x, w, low, shape, block_size, line)
        expected, magnitude = x.double() @ W.T, x.double().abs() @ W.abs().T
        for part, size in parts(low, bias if direction == "forward" else None):
            expected, magnitude = expected + part, magnitude + size
        # Roundings to dtype: of W or its levels, of the result; on the dense path also of the product before bias and term, and of
        # the scaled factor. Sums in float32: over the columns and the rank.
        roundings, terms = (5 if line is DENSE else 2), wide + r + 2
        # A number so small that it is denormal errs by half of their spacing, weights by that times what they multiply.
        error = 1.01 / 2 * (roundings * torch.finfo(dtype).eps + terms * 2**-23) * magnitude
        denormal = torch.finfo(dtype).eps * torch.finfo(dtype).smallest_normal
        error = error + roundings * denormal / 2 * (1 + x.double().abs().sum(1, keepdim=True))
        assert found.dtype == dtype and found.shape == (M, tall)
        assert ((found.double() - expected).abs() <= error).all(), (
            line,
            ((found.double() - expected).abs() - error).max(),
        )


def parts(low: Any, bias: Tensor | None) -> Any:
    if low:
        left, right, scale = low
        yield (
            scale * left.double() @ right.double().T,
            scale * left.double().abs() @ right.double().abs().T,
        )
    if bias is not None:
        yield bias.double(), bias.double().abs()


def laid_out(t: Tensor, layout: str) -> Tensor:
    """t's shape in other strides."""
    match layout:
        case "columns":
            return t.T.contiguous().T
        case "gaps":
            return torch.cat([t, t], dim=1)[:, : t.shape[1]]
        case "one row repeated":
            return t[:1].expand(t.shape)
    return t


@halves
@pytest.mark.parametrize(
    "choice", [SKINNY, DENSE, TILES[0], TILES[-1]], ids=lambda c: f"{c['path']}{c.get('BM', '')}"
)
def test_factors_of_the_low_rank_term_in_any_strides(
    dtype: torch.dtype, choice: dict[str, Any]
) -> None:
    (O, I), M, r = (200, 128), 5, 20
    w, x = weight(O, I, 64, True), gaussian(M, I, dtype=dtype)
    left, right = gaussian(M, r, dtype=dtype), gaussian(O, r, dtype=dtype)
    expected = forward(x, w, None, (left, right, 0.5), (O, I), 64, choice)
    for a, b in (
        (left.T.contiguous().T, right),
        (left, right.T.contiguous().T),
        (left, torch.cat([right, right], 1)[:, :r]),
    ):
        assert torch.equal(forward(x, w, None, (a, b, 0.5), (O, I), 64, choice), expected)


def test_rows_of_x_far_apart_are_reached() -> None:
    apart = 2**28 + 2**20  # 9 rows: more than 2^31 elements from the first to the last
    w, small = weight(64, 64, 64, True), gaussian(9, 64).bfloat16()
    try:
        far = torch.empty(8 * apart + 64, dtype=torch.bfloat16, device=DEVICE).as_strided(
            (9, 64), (apart, 1)
        )
    except (RuntimeError, torch.OutOfMemoryError):
        pytest.skip("no 4.6 GB of address space here")
    far[:] = small.to(DEVICE)  # untouched pages cost nothing
    held = tuple(None if t is None else t.to(DEVICE) for t in w)
    for choice in (SKINNY, TILES[0]):
        found = matmul.forward(far, held, None, None, (64, 64), 64, choice).cpu()
        assert torch.equal(found, forward(small, w, None, None, (64, 64), 64, choice))


@halves
def test_what_is_not_aligned_gives_the_same_bits(dtype: torch.dtype) -> None:
    (O, I), M = (65, 128), 5
    w, x = weight(O, I, 64, True), gaussian(M, I, dtype=dtype)
    with guarded() as buffers:
        for choice in (SKINNY, TILES[0], DENSE):
            expected = forward(x, w, None, None, (O, I), 64, choice)
            shifted = buffers.hold(torch.cat([x.flatten()[:1], x.flatten()]))[1:].view(M, I)
            codes = buffers.hold(torch.cat([w[1][:1], w[1]]))[1:]
            rest = tuple(map(buffers.hold, w[2:]))
            found = matmul.forward(
                shifted, (buffers.hold(w[0]), codes, *rest), None, None, (O, I), 64, choice
            )
            assert torch.equal(found.cpu(), expected)
        packed = buffers.hold(torch.cat([w[0][:1], w[0]]))[
            1:
        ]  # its words cannot be loaded as such: decoded whole
        found = matmul.forward(shifted, (packed, codes, *rest), None, None, (O, I), 64)
        assert torch.equal(found.cpu(), forward(x, w, None, None, (O, I), 64, DENSE))
        with pytest.raises(ValueError, match=r"'skinny'.* does not take 5 rows"):
            matmul.forward(shifted, (packed, codes, *rest), None, None, (O, I), 64, SKINNY)


@halves
def test_the_library_s_own_choice_with_leading_dimensions(dtype: torch.dtype) -> None:
    w, shape = weight(96, 128, 64, True), (96, 128)
    W = decoded(w, shape, torch.float64, 64)
    for leading in ((), (1,), (5,), (3, 7), (2, 100), (0,), (4, 0)):
        x, dy = gaussian(*leading, 128, dtype=dtype), gaussian(*leading, 96, dtype=dtype)
        z, u, A, B = (
            gaussian(*size, dtype=dtype)
            for size in ((*leading, 4), (*leading, 4), (4, 128), (96, 4))
        )
        with guarded() as buffers:
            hold = buffers.hold
            held = tuple(map(hold, w))
            found = [
                matmul.nf4_linear(hold(x), *held, None, shape, 64),
                matmul.nf4_linear_backward(hold(dy), *held, shape, 64),
                lora.nf4_lora_linear(hold(x), *held, None, hold(z), hold(B), 2.0, shape, 64),
                lora.nf4_lora_linear_backward(hold(dy), *held, hold(u), hold(A), 2.0, shape, 64),
            ]
        y, dx = x.double() @ W.T, dy.double() @ W
        expected = [y, dx, y + 2 * z.double() @ B.double().T, dx + 2 * u.double() @ A.double()]
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape and a.dtype == dtype
            assert a.numel() == 0 or (a.cpu().double() - b).abs().max() <= 4 * torch.finfo(
                dtype
            ).eps * max(1, b.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_floats_and_blocks_across_rows_multiply_the_decoded_weight(dtype: torch.dtype) -> None:
    for shape, block_size, kind in (
        ((33, 128), 64, dtype),
        ((33, 70), 64, dtype),
        ((33, 70), 64, torch.bfloat16),
    ):
        w = weight(*shape, block_size, True)
        x, dy = gaussian(5, shape[1], dtype=kind), gaussian(5, shape[0], dtype=kind)
        W = decoded(w, shape, kind, block_size).to(DEVICE)
        found = forward(x, w, None, None, shape, block_size, None)
        assert torch.equal(found, torch.nn.functional.linear(x.to(DEVICE), W).cpu())
        assert torch.equal(
            backward(dy, w, None, shape, block_size, None), (dy.to(DEVICE) @ W).cpu()
        )


# ---- the table of levels by byte permutes


@triton.jit
def look_up(words, level, out, SIZE: tl.constexpr, PTX: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    p0, p1, p2, p3 = permute.levels(tl.load(words + i), level, PTX)
    tl.store(out + 4 * i, p0)
    tl.store(out + 4 * i + 1, p1)
    tl.store(out + 4 * i + 2, p2)
    tl.store(out + 4 * i + 3, p3)


@halves
@pytest.mark.parametrize(
    "ptx",
    [
        False,
        pytest.param(True, marks=pytest.mark.skipif(runtime.PORTABLE, reason="AMD has no PTX")),
    ],
)
def test_every_half_of_a_word_gives_its_levels(dtype: torch.dtype, ptx: bool) -> None:
    half = torch.arange(2**16, dtype=torch.int64)
    for words in (half | 0x5A3C0000, half << 16 | 0x5A3C):
        words = words.to(torch.int32)
        out = torch.empty(2**16, 4, dtype=torch.int32, device=DEVICE)
        look_up[(16,)](words.to(DEVICE), reference.CODE.to(DEVICE, dtype), out, SIZE=4096, PTX=ptx)
        bytes_ = words.view(torch.uint8).view(-1, 4)
        codes = torch.stack([bytes_ >> 4, bytes_ & 15], dim=2).view(-1, 8)
        assert torch.equal(out.cpu().view(dtype).view(-1, 8), reference.CODE.to(dtype)[codes.int()])


# ---- what a product keeps to itself


class Sizes(Buffers):
    def empty(self, *size: Any, **kind: Any) -> Tensor:
        t = super().empty(*size, **kind)
        self.largest = max(getattr(self, "largest", 0), t.nbytes)
        return t


@pytest.mark.parametrize("line", [SKINNY, *TILES], ids=lambda line: line["path"])
def test_fused_paths_never_hold_a_dense_weight(
    line: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    O, I = 192, 256
    w, x, dy = weight(O, I, 64, True), gaussian(2, I).bfloat16(), gaussian(2, O).bfloat16()
    sizes = Sizes()
    monkeypatch.setattr(torch, "empty", sizes.empty)
    w = tuple(None if t is None else t.to(DEVICE) for t in w)
    matmul.forward(x.to(DEVICE), w, None, None, (O, I), 64, line)
    if line["path"] == "tile":
        matmul.backward(dy.to(DEVICE), w, None, (O, I), 64, line)
    assert 0 < sizes.largest < O * I // 4


@pytest.mark.skipif(INTERPRETED, reason="numpy always gives the same bits; a card has to show it")
def test_the_same_bits_every_time() -> None:
    w, x = weight(128, 1024, 64, True), gaussian(4, 1024).bfloat16()
    first = forward(x, w, None, None, (128, 1024), 64, SKINNY)
    assert all(
        torch.equal(first, forward(x, w, None, None, (128, 1024), 64, SKINNY)) for _ in range(3)
    )


# ---- the choice, and what is refused


def test_the_table_is_read_from_the_top() -> None:
    assert choose.choose("forward", 1, 4096, 4096, 64)["path"] == "skinny"
    assert (
        choose.choose("forward", 1, 4096, 4096, 32)["path"] == "tile"
    )  # the skinny path scales whole 64s
    assert choose.choose("forward", 100, 4096, 4096, 64)["path"] == "tile"
    assert choose.choose("backward", 1, 4096, 4096, 64)["path"] == "tile"
    for M, I, block_size in ((10**5, 4096, 64), (1, 100, 64), (1, 96, 32), (1, 128, 256)):
        assert choose.choose("forward", M, 4096, I, block_size) == DENSE


def test_the_table_in_the_file_is_sound() -> None:
    table = json.loads(choose.TABLE.read_text())
    assert table.keys() == {"measured on", "forward", "backward"}
    for direction in ("forward", "backward"):
        *tried, last = table[direction]
        assert last == DENSE
        assert [line["rows"] for line in tried] == sorted(line["rows"] for line in tried)
        for line in tried:
            keys = {"rows", "path"} | (
                {"BM", "BO", "BI", "warps", "stages"} if line["path"] == "tile" else set()
            )
            assert keys <= line.keys() <= keys | {"weights"}
            assert line["path"] != "skinny" or (line["rows"] <= 16 and direction == "forward")


def test_what_does_not_fit_is_refused_by_name() -> None:
    w = tuple(t.to(DEVICE) for t in weight(96, 128, 64, True))
    x, bias = torch.ones(3, 128, device=DEVICE).bfloat16(), torch.ones(96, device=DEVICE).bfloat16()

    def call(x: Tensor = x, bias: Tensor = bias, shape: Any = (96, 128), low: Any = None) -> Tensor:
        return matmul.forward(x, w, bias, low, shape, 64)

    with pytest.raises(
        ValueError,
        match=r"x \(3, 127\) does not fit a weight \(96, 128\): its last size must be 128",
    ):
        call(x[:, 1:])
    with pytest.raises(TypeError, match=r"x is torch\.int64: the kernel takes float32"):
        call(x.long())
    with pytest.raises(TypeError, match=r"bias is torch\.float32: the kernel takes bfloat16"):
        call(bias=bias.float())
    with pytest.raises(
        ValueError, match=r"bias is \(95,\): a weight \(96, 128\) takes one of \(96,\)"
    ):
        call(bias=bias[1:])
    with pytest.raises(
        ValueError, match=r"packed has 6144 elements, contiguous: a weight \(96, 64\)"
    ):
        call(x[:, :64], shape=(96, 64))
    left, right = (
        torch.ones(3, 4, device=DEVICE).bfloat16(),
        torch.ones(96, 4, device=DEVICE).bfloat16(),
    )
    with pytest.raises(
        ValueError, match=r"the low-rank term's right factor is \(95, 4\), not \(96, 4\)"
    ):
        call(low=matmul.LowRank(left, right[1:], 1.0))
    with pytest.raises(TypeError, match=r"the low-rank term's left factor is torch\.float32"):
        call(low=matmul.LowRank(left.float(), right, 1.0))
    with pytest.raises(
        ValueError,
        match=r"'skinny'.* does not take 17 rows of torch\.bfloat16 and a weight \(96, 128\) in blocks of 64",
    ):
        matmul.forward(x[:1].expand(17, 128), w, None, None, (96, 128), 64, SKINNY)
    with pytest.raises(ValueError, match=r"dy \(3, 128\) does not fit"):
        matmul.backward(x, w, None, (96, 128), 64)
