"""4-bit weights: the bytes against bitsandbytes, and the CPU backend against the reference.

Both comparisons are bit for bit.
"""

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import gaussian, same_bits
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import minilora
from minilora.kernels.cpu import nf4 as cpu
from minilora.kernels.reference import codebooks
from minilora.kernels.reference import nf4 as reference
from minilora.kernels.reference.nf4 import PackedWeight

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = ((1,), (63,), (64,), (65,), (1000,), (4097,), (576, 576), (192, 576), (7, 33))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
backends = pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

LEVELS = codebooks.levels("nf4")


@pytest.fixture(scope="module")
def bnb() -> Iterator[Any]:
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="the bytes are compared with bitsandbytes'"
    )
    # It compiles its fallbacks, which takes seconds and changes nothing here.
    with torch.compiler.set_stance("force_eager"):
        yield functional


def codes(packed: Tensor) -> Tensor:
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten()


def plain_weight(
    packed: Tensor, absmax: Tensor, shape: tuple[int, ...], block_size: int = 64
) -> PackedWeight:
    """A weight whose absmax is not quantized."""
    return PackedWeight(packed, absmax, None, None, shape, block_size)


@backends
@pytest.mark.parametrize("scale", [1.0, 2.0**-9], ids=str)
def test_codes_change_just_above_a_threshold(backend: ModuleType, scale: float, bnb: Any) -> None:
    t = codebooks.midpoints(LEVELS)
    below = torch.nextafter(t, torch.tensor(-2.0))
    above = torch.nextafter(t, torch.tensor(2.0))
    # The scale is a power of two: nothing is rounded.
    x = torch.cat([torch.ones(1), t, below, above, torch.zeros(18)]) * scale
    packed, _ = backend.quantize(x, 64)

    j = torch.arange(15)
    assert codes(packed)[:46].tolist() == [15, *j.tolist(), *j.tolist(), *(j + 1).tolist()]
    expected, _ = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")
    assert same_bits(packed, expected.flatten())


@backends
def test_codes_beside_a_threshold_come_from_the_reciprocal_of_absmax(
    backend: ModuleType, bnb: Any
) -> None:
    # x * (1 / absmax) and x / absmax differ in the last bit now and then, and so does the code of
    # an x that lies there.
    absmax = gaussian(2000, 1).abs() + 0.1
    near = codebooks.midpoints(LEVELS).repeat(4) * absmax
    for step in (15, 30, 45):
        near[:, step:] = torch.nextafter(near[:, step:], torch.tensor(9.0))
    x = torch.cat([absmax, near, torch.zeros(2000, 3)], dim=1)
    assert (x / absmax != x * (1 / absmax)).any()

    packed, _ = backend.quantize(x, 64)
    expected, _ = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")
    assert same_bits(packed, expected.flatten())


# Blocks cross the rows of a weight with 4098 columns.
SHAPES_AND_BLOCKS = [(shape, 64) for shape in SHAPES]
SHAPES_AND_BLOCKS += [((3, 4098), size) for size in BLOCK_SIZES]


@backends
@dtypes
@pytest.mark.parametrize(("shape", "block_size"), SHAPES_AND_BLOCKS, ids=str)
def test_bytes_absmax_and_values_equal_bitsandbytes(
    backend: ModuleType, dtype: torch.dtype, shape: tuple[int, ...], block_size: int, bnb: Any
) -> None:
    x = gaussian(*shape, dtype=dtype)
    expected, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type="nf4")
    packed, absmax = backend.quantize(x, block_size)
    assert same_bits(packed, expected.flatten())
    assert same_bits(absmax, state.absmax)

    dense = backend.dequantize(plain_weight(packed, absmax, shape, block_size), dtype)
    # bitsandbytes returns a 1-D weight as [1, n].
    assert same_bits(dense, bnb.dequantize_4bit(expected, state).view(shape))


@backends
def test_blocks_of_zeros_equal_bitsandbytes(backend: ModuleType, bnb: Any) -> None:
    x = gaussian(5, 64)
    x[1], x[3] = 0.0, -0.0
    expected, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")
    packed, absmax = backend.quantize(x, 64)
    assert same_bits(packed, expected.flatten())
    assert same_bits(absmax, state.absmax)

    assert (codes(packed).view(5, 64)[1] == 7).all()
    assert absmax[1] == 0
    dense = backend.dequantize(plain_weight(packed, absmax, (5, 64)), torch.float32)
    assert same_bits(dense[[1, 3]], torch.zeros(2, 64))


@backends
@dtypes
@pytest.mark.parametrize("shape", [(1, 130), (257, 64), (576, 576), (3, 8222)], ids=str)
def test_a_double_quantized_state_of_bitsandbytes_is_dequantized_to_its_values(
    backend: ModuleType, dtype: torch.dtype, shape: tuple[int, int], bnb: Any
) -> None:
    packed, state = bnb.quantize_4bit(
        gaussian(*shape, dtype=dtype), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    constants = state.absmax, state.state2.absmax, state.offset
    dense = backend.dequantize(PackedWeight(packed.flatten(), *constants, shape, 64), dtype)
    assert same_bits(dense, bnb.dequantize_4bit(packed, state))


# Double quantization is held to the exact nearest code: bitsandbytes' CPU build looks codes up in
# a table of its own, which is not exact.


@backends
@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 5184, 20000])
def test_double_quantization_rounds_to_the_nearest_of_map8(
    backend: ModuleType, blocks: int
) -> None:
    absmax = gaussian(blocks).abs() + 2.0
    quantized, absmax2, offset = backend.double_quantize(absmax)
    assert same_bits(offset, torch.tensor(math.fsum(absmax.tolist()) / blocks))
    assert absmax2.shape == (-(-blocks // 256),)

    edges = codebooks.midpoints(codebooks.MAP8)
    for g, group in enumerate((absmax - offset).split(256)):
        assert same_bits(absmax2[g], group.abs().max())
        nearest = torch.zeros(len(group))
        if absmax2[g] > 0:
            nearest = torch.bucketize(group * (1 / absmax2[g]), edges)
        assert torch.equal(quantized[g * 256 : (g + 1) * 256], nearest.to(torch.uint8))


@backends
def test_double_quantization_codes_change_just_above_a_threshold(backend: ModuleType) -> None:
    edges = codebooks.midpoints(codebooks.MAP8)
    below = torch.nextafter(edges, torch.tensor(-2.0))
    above = torch.nextafter(edges, torch.tensor(2.0))
    for y in (edges, below, above):
        # Two groups, and their mean is 0.
        absmax = torch.cat([torch.ones(1), y, -torch.ones(1), -y])
        quantized, _, offset = backend.double_quantize(absmax)
        assert offset == 0
        assert torch.equal(quantized, (absmax[:, None] > edges).sum(1).to(torch.uint8))


@backends
@pytest.mark.parametrize(
    "beside", [[0.7, 0.7], [0.2, 1.2]], ids=["everywhere equal", "beside another group"]
)
def test_a_group_of_equal_absmax_has_code_0_and_is_dequantized_to_the_offset(
    backend: ModuleType, beside: list[float]
) -> None:
    absmax = torch.full((512,), 0.7)
    # The mean stays 0.7.
    absmax[256:] = torch.tensor(beside).repeat(128)
    quantized, absmax2, offset = backend.double_quantize(absmax)
    assert absmax2[0] == 0
    assert (quantized[:256] == 0).all()
    assert same_bits(offset, torch.tensor(0.7))
    assert same_bits(backend.double_dequantize(quantized, absmax2, offset)[:256], absmax[:256])


def scaled(n: int, dtype: torch.dtype, exponent: int, zeros: float, seed: int) -> Tensor:
    """A Gaussian weight of this scale, part of it zero, so that whole blocks of zeros occur."""
    x = gaussian(n, dtype=torch.float64, seed=seed) * 10.0**exponent
    x[torch.rand(n, generator=torch.Generator().manual_seed(seed)) < zeros] = 0
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


weights = st.builds(
    scaled,
    n=st.one_of(st.integers(1, 300), st.integers(1, 40_000)),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    exponent=st.integers(-30, 30),
    zeros=st.sampled_from([0.0, 0.0, 0.5, 0.99]),
    seed=st.integers(0, 2**31),
)


def assert_backends_agree(x: Tensor, block_size: int, dtype: torch.dtype) -> None:
    packed, absmax = reference.quantize(x, block_size)
    assert same_bits(cpu.quantize(x, block_size), (packed, absmax))
    double = reference.double_quantize(absmax)
    assert same_bits(cpu.double_quantize(absmax), double)
    assert same_bits(cpu.double_dequantize(*double), reference.double_dequantize(*double))

    for constants in ((absmax, None, None), double):
        w = PackedWeight(packed, *constants, tuple(x.shape), block_size)
        assert same_bits(cpu.dequantize(w, dtype), reference.dequantize(w, dtype))


@settings(max_examples=400)
@given(
    x=weights,
    block_size=st.sampled_from(BLOCK_SIZES),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
)
def test_cpu_backend_equals_reference_backend(
    x: Tensor, block_size: int, dtype: torch.dtype
) -> None:
    assert_backends_agree(x, block_size, dtype)


@settings(max_examples=60)
@given(
    n=st.integers(1, 700),
    block_size=st.sampled_from((32, 64)),
    exponent=st.integers(-149, -120),
    seed=st.integers(0, 99),
)
def test_backends_agree_and_zero_stays_zero_where_float32_is_subnormal(
    n: int, block_size: int, exponent: int, seed: int
) -> None:
    x = gaussian(n, seed=seed) * 2.0**exponent
    x[::3] = 0
    assert_backends_agree(x, block_size, torch.float32)
    w = plain_weight(*reference.quantize(x, block_size), tuple(x.shape), block_size)
    assert (reference.dequantize(w, x.dtype)[::3] == 0).all()


@settings(max_examples=200)
@given(x=weights, block_size=st.sampled_from(BLOCK_SIZES))
def test_quantizing_a_dequantized_weight_changes_nothing(x: Tensor, block_size: int) -> None:
    w = minilora.quantize_nf4(x, block_size, double_quant=False)
    # The smallest level is 0.08 absmax: a normal number of the dtype, or its rounding can reach
    # the next level.
    assume((w.absmax[w.absmax > 0] > torch.finfo(x.dtype).tiny / 0.07).all())
    dense = w.dequantize()
    again = minilora.quantize_nf4(dense, block_size, double_quant=False)
    assert same_bits(again.dequantize(), dense)


@backends
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("block_size", [32, 512])
def test_every_byte_is_dequantized(
    backend: ModuleType, dtype: torch.dtype, block_size: int
) -> None:
    # -1 and 1 times this absmax are ties in bfloat16.
    absmax = torch.full((512 // block_size,), 1 + 2**-8)
    every_byte = torch.arange(256).to(torch.uint8)
    dense = backend.dequantize(plain_weight(every_byte, absmax, (256, 2), block_size), dtype)

    levels = torch.tensor([level * (1 + 2**-8) for level in codebooks.NF4]).to(dtype)
    expected = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    assert same_bits(dense, expected)


@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (2, 3, 65), (64, 300), (273, 1)], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_any_shape_comes_back_and_nbytes_are_the_formula(
    shape: tuple[int, ...], double_quant: bool, block_size: int
) -> None:
    x = gaussian(*shape, dtype=torch.bfloat16)
    w = minilora.quantize_nf4(x, block_size, double_quant)
    assert (w.shape, w.dtype) == (x.shape, x.dtype)
    assert w.dequantize().shape == x.shape

    packed = -(-x.numel() // 2)
    blocks = -(-x.numel() // block_size)
    constants = blocks + 4 * -(-blocks // 256) + 4 if double_quant else 4 * blocks
    assert w.nbytes == packed + constants


def test_a_square_of_4096_takes_4_127_bits_per_weight_and_4_5_without_double_quantization() -> None:
    x = torch.zeros(4096, 4096, dtype=torch.bfloat16)
    assert round(minilora.quantize_nf4(x).nbytes * 8 / x.numel(), 3) == 4.127
    assert minilora.quantize_nf4(x, double_quant=False).nbytes * 8 / x.numel() == 4.5


def test_a_transposed_weight_is_quantized_in_its_own_order() -> None:
    x = gaussian(65, 33).T
    w = minilora.quantize_nf4(x)
    assert same_bits(w.packed, minilora.quantize_nf4(x.contiguous()).packed)
    assert same_bits(w.packed, reference.quantize(x, 64)[0])
    assert w.shape == (33, 65)


ONES = torch.ones(64)
BLOCK_SIZES_REFUSED = (0, -64, 16, 63, 96, 8192)


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (ONES.long(), TypeError, "int64"),
        (ONES.bool(), TypeError, "bool"),
        ([1.0, 2.0], TypeError, "list"),
        (torch.ones(0, 64), ValueError, r"\(0, 64\)"),
        (ONES.to("meta"), ValueError, "meta"),
        (ONES * math.nan, ValueError, "NaN"),
        (torch.tensor([1.0, math.inf], dtype=torch.bfloat16), ValueError, "infinity"),
        (torch.tensor([1.0, -math.inf], dtype=torch.float16), ValueError, "infinity"),
        # In float32 it is infinity.
        (torch.tensor([1e300], dtype=torch.float64), ValueError, "infinity"),
    ],
)
def test_a_weight_that_cannot_be_quantized_is_refused_by_name(
    weight: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        minilora.quantize_nf4(weight)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        *(
            (
                lambda size=size: minilora.quantize_nf4(ONES, size),
                ValueError,
                f"block_size={size}.*64",
            )
            for size in BLOCK_SIZES_REFUSED
        ),
        (
            lambda: minilora.quantize_nf4(ONES, quant_type="nf3"),
            ValueError,
            "quant_type='nf3'.*'nf4', 'fp4'",
        ),
        (
            lambda: minilora.dequantize_nf4(minilora.quantize_nf4(ONES), torch.uint8),
            TypeError,
            "uint8",
        ),
        (
            lambda: minilora.dequantize_nf4(minilora.quantize_nf4(ONES), torch.complex64),
            TypeError,
            "complex64",
        ),
    ],
)
def test_an_unknown_format_is_refused_by_name(
    call: Callable[[], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        call()
