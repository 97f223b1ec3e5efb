"""kernels/gpu/nf4.py against the reference, bit for bit.

Guard bytes surround every buffer, and every output starts as NaN.
"""

import pytest
import torch
from gpu import DEVICE, guarded, on_device
from helpers import gaussian, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weights import packed_weight

from minilora.kernels.gpu import nf4, runtime
from minilora.kernels.reference import nf4 as reference
from minilora.kernels.reference.codebooks import MAP8, levels, midpoints, thresholds
from minilora.kernels.reference.nf4 import PackedWeight

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1,), (7,), (63,), (64,), (65,), (1000,), (4097,), (192, 576), (7, 33), (3, 5, 64))
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def assert_quantizes_as_the_reference(x: Tensor, block_size: int) -> None:
    with guarded() as buffers:
        found = nf4.quantize(buffers.hold(x), block_size)
        assert same_bits(found, reference.quantize(x, block_size))


def assert_dequantizes_as_the_reference(w: PackedWeight, dtype: torch.dtype) -> None:
    with guarded() as buffers:
        found = nf4.dequantize(buffers.hold_weight(w), dtype)
        assert same_bits(found, reference.dequantize(w, dtype))


# Oracle: the reference.


@dtypes
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_round_trip_with_every_block_size_and_dtype(block_size: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = gaussian(*shape).to(dtype)
        assert_quantizes_as_the_reference(x, block_size)
        for double in (False, True):
            assert_dequantizes_as_the_reference(packed_weight(x, block_size, double), dtype)


@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 1000])
def test_round_trip_of_double_quantization(blocks: int) -> None:
    random = gaussian(blocks).abs()
    equal = torch.full((blocks,), 0.3)
    for absmax in (random, equal, torch.zeros(blocks), random * 1e-39):
        expected = reference.double_quantize(absmax)
        with guarded() as buffers:
            assert same_bits(nf4.double_quantize(buffers.hold(absmax)), expected)
            back = nf4.double_dequantize(*map(buffers.hold, expected))
            assert same_bits(back, reference.double_dequantize(*expected))


def test_values_on_and_beside_every_threshold() -> None:
    middle = thresholds("nf4")
    above = torch.nextafter(middle, torch.tensor(2.0))
    below = torch.nextafter(middle, torch.tensor(-2.0))

    # One block whose absmax is 1: nothing is rounded on the way.
    x = torch.cat([torch.ones(1), middle, above, below, levels("nf4"), -middle])
    x = torch.cat([x, torch.zeros(128 - x.numel())])
    assert_quantizes_as_the_reference(x, 128)

    # Normalized values on the thresholds of the 8-bit map, as far as float32 allows.
    absmax = torch.cat([midpoints(MAP8), torch.ones(1)]) - MAP8.mean() + 1
    with guarded() as buffers:
        found = nf4.double_quantize(buffers.hold(absmax))
        assert same_bits(found, reference.double_quantize(absmax))


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-38, 1e-41, 1e37])
def test_zeros_denormals_and_the_largest_numbers(scale: float) -> None:
    x = gaussian(130).abs() * scale if scale == 0 else gaussian(130) * scale
    assert_quantizes_as_the_reference(x, 64)
    assert_dequantizes_as_the_reference(packed_weight(x), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_between_two_16_bit_numbers_round_to_even(dtype: torch.dtype) -> None:
    # All pairs of codes, in blocks with an absmax of their own.
    every_byte = torch.arange(256, dtype=torch.uint8).repeat(64)
    eps = torch.finfo(dtype).eps
    near_one = 1 + eps * (torch.arange(256) + 0.5)
    powers = 2.0 ** torch.arange(-100, 100).repeat(2)[:256] * (1 + eps / 2)

    absmax = torch.cat([near_one, powers])
    w = PackedWeight(every_byte, absmax, None, None, (512, 64), 64)
    assert_dequantizes_as_the_reference(w, dtype)


# Property: any length and content.


@given(
    n=st.integers(1, 6000),
    block_size=st.sampled_from(BLOCK_SIZES),
    dtype=st.sampled_from(FLOATS[:3]),
    scale=st.sampled_from([1.0, 1e-6, 1e-30, 1e4]),
    seed=st.integers(0, 2**31),
    gap=st.integers(0, 1),
)
@settings(max_examples=100)
def test_any_length_and_content(
    n: int, block_size: int, dtype: torch.dtype, scale: float, seed: int, gap: int
) -> None:
    x = (gaussian(n * (1 + gap), seed=seed) * scale).to(dtype)[:: 1 + gap]
    assert_quantizes_as_the_reference(x, block_size)

    absmax = reference.quantize(x, block_size)[1]
    with guarded() as buffers:
        found = nf4.double_quantize(buffers.hold(absmax))
        assert same_bits(found, reference.double_quantize(absmax))
    for double in (False, True):
        assert_dequantizes_as_the_reference(packed_weight(x, block_size, double), dtype)


def test_packed_bytes_that_are_not_aligned_to_a_word() -> None:
    w = packed_weight(gaussian(512))
    with guarded() as buffers:
        shifted = buffers.hold(torch.cat([w.packed[:1], w.packed]))[1:]
        held = buffers.hold_weight(w)._replace(packed=shifted)
        found = nf4.dequantize(held, torch.bfloat16)
        assert same_bits(found, reference.dequantize(w, torch.bfloat16))


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_dequantizing_into_rows_with_gaps_leaves_the_gaps_alone(dtype: torch.dtype) -> None:
    # Blocks cross rows.
    w = packed_weight(gaussian(33, 72), double=True)
    with guarded() as buffers:
        wide = buffers.empty(33, 80, dtype=dtype)
        nf4.dequantize_into(wide[:, :72], buffers.hold_weight(w))
        assert same_bits(wide[:, :72].contiguous(), reference.dequantize(w, dtype))
        assert wide[:, 72:].isnan().all()


def test_gaps_that_are_no_whole_words_are_refused() -> None:
    w = on_device(packed_weight(gaussian(33, 72)))
    wide = torch.zeros(33, 76, device=DEVICE)
    with pytest.raises(ValueError, match="rows of 72, 76 apart"):
        nf4.dequantize_into(wide[:, :72], w)


def test_an_empty_weight_dequantizes_to_an_empty_tensor() -> None:
    nothing = torch.zeros(0, device=DEVICE)
    w = PackedWeight(nothing.byte(), nothing, None, None, (0, 64), 64)
    assert nf4.dequantize(w, torch.bfloat16).shape == (0, 64)


# Errors, before anything is launched.


@pytest.mark.parametrize("block_size", [0, 16, 48, 8192])
def test_a_block_size_that_no_kernel_takes_is_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match=rf"block_size={block_size}: the kernels take 32, 64"):
        nf4.quantize(torch.ones(64, device=DEVICE), block_size)


def test_a_dtype_that_no_kernel_takes_is_refused() -> None:
    w = on_device(packed_weight(gaussian(4, 64), double=True))
    every = r"x is torch\.int32: the kernel takes float32 or float16 or bfloat16 or float64"
    with pytest.raises(TypeError, match=every):
        nf4.quantize(torch.ones(64, dtype=torch.int32, device=DEVICE), 64)
    with pytest.raises(TypeError, match=r"dtype=torch\.int8: the kernel writes"):
        nf4.dequantize(w, torch.int8)
    with pytest.raises(TypeError, match=r"codes is torch\.int32"):
        nf4.double_dequantize(w.absmax.int(), w.absmax2, w.offset)


def test_parts_that_are_no_weight_are_refused_by_name() -> None:
    w = on_device(packed_weight(gaussian(4, 64), double=True))
    strided = w.packed.repeat_interleave(2)[::2]
    too_few = r"packed has 128 elements, contiguous: a weight \(5, 64\) in blocks of 64 needs 160"
    for wrong, error, words in (
        ({"packed": w.packed.view(torch.int8)}, TypeError, r"packed is torch\.int8"),
        ({"absmax": w.absmax.float()}, TypeError, r"absmax is torch\.float32: .* takes uint8"),
        ({"offset": None}, ValueError, "absmax2 and offset belong together"),
        ({"shape": (5, 64)}, ValueError, too_few),
        ({"packed": strided}, ValueError, "packed has 128 elements, strided"),
        ({"absmax": w.absmax.to("meta")}, ValueError, "absmax is on meta, the rest on"),
        ({"quant_type": "nf3"}, ValueError, "quant_type='nf3': there is a codebook for 'nf4'"),
    ):
        with pytest.raises(error, match=words):
            nf4.dequantize(w._replace(**wrong), torch.float32)


def test_a_cpu_tensor_is_refused_where_kernels_are_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    words = (
        r"x is on cpu: a Triton kernel runs on a GPU \(or interpreted, with TRITON_INTERPRET=1\)"
    )
    with pytest.raises(ValueError, match=words):
        nf4.quantize(torch.ones(64), 64)
