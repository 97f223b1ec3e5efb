"""The Triton room of nf4.py against the reference, bit for bit; guard bytes round every buffer, NaN in every output."""

from typing import Any

import pytest
import torch
from gpu import DEVICE, gaussian, guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minilora.kernels.gpu import nf4, runtime
from minilora.kernels.reference import nf4 as reference

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1,), (7,), (63,), (64,), (65,), (1000,), (4097,), (192, 576), (7, 33), (3, 5, 64))
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def same(found: Any, expected: Any) -> bool:
    """Equal in dtype, shape and every bit; of tensors or of tuples of them."""
    if isinstance(expected, tuple):
        return all(map(same, found, expected))
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.itemsize]
    alike = found.dtype == expected.dtype and found.shape == expected.shape
    return alike and torch.equal(found.cpu().view(bits), expected.view(bits))


# ---- oracle: the reference


@dtypes
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size_and_dtype_there_and_back(block_size: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = gaussian(*shape).to(dtype)
        packed, absmax = reference.quantize(x, block_size)
        double = reference.double_quantize(absmax)
        with guarded() as buffers:
            assert same(nf4.quantize(buffers.hold(x), block_size), (packed, absmax))
            for state in ((absmax, None, None), double):
                found = nf4.dequantize(
                    *map(buffers.hold, (packed, *state)), shape, dtype, block_size
                )
                assert same(found, reference.dequantize(packed, *state, shape, dtype, block_size))


def test_double_quantization_there_and_back() -> None:
    for blocks in (1, 2, 255, 256, 257, 1000):
        for absmax in (
            gaussian(blocks).abs(),
            torch.full((blocks,), 0.3),
            torch.zeros(blocks),
            gaussian(blocks).abs() * 1e-39,
        ):
            expected = reference.double_quantize(absmax)
            with guarded() as buffers:
                found = nf4.double_quantize(buffers.hold(absmax))
                assert same(found, expected)
                assert same(
                    nf4.double_dequantize(*map(buffers.hold, expected)),
                    reference.double_dequantize(*expected),
                )


def test_values_on_and_beside_every_threshold() -> None:
    middle = reference.midpoints(reference.CODE)
    up, down = (torch.nextafter(middle, torch.tensor(sign * 2.0)) for sign in (1, -1))
    x = torch.cat([torch.ones(1), middle, up, down, reference.CODE, -middle])
    x = torch.cat(
        [x, torch.zeros(128 - x.numel())]
    )  # one block whose absmax is 1: nothing is rounded on the way
    with guarded() as buffers:
        assert same(nf4.quantize(buffers.hold(x), 128), reference.quantize(x, 128))
    levels = reference.MAP8
    mean = levels.mean()  # an absmax whose normalised values lie on the 8-bit map's thresholds, as far as float32 allows
    absmax = torch.cat([reference.midpoints(levels), torch.ones(1)]) - mean + 1
    with guarded() as buffers:
        assert same(nf4.double_quantize(buffers.hold(absmax)), reference.double_quantize(absmax))


def test_zeros_denormals_and_the_largest_numbers() -> None:
    for x in (
        torch.zeros(130),
        torch.full((130,), -0.0),
        gaussian(130) * 1e-38,
        gaussian(130) * 1e-41,
        gaussian(130) * 1e37,
    ):
        packed, absmax = reference.quantize(x, 64)
        with guarded() as buffers:
            assert same(nf4.quantize(buffers.hold(x), 64), (packed, absmax))
            found = nf4.dequantize(
                *map(buffers.hold, (packed, absmax, None, None)), (130,), torch.float32, 64
            )
            assert same(
                found, reference.dequantize(packed, absmax, None, None, (130,), torch.float32, 64)
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_that_fall_between_two_16_bit_numbers_round_to_even(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).repeat(
        64
    )  # all pairs of codes, in blocks with an absmax of their own
    eps = torch.finfo(dtype).eps
    absmax = torch.cat(
        [
            1 + eps * (torch.arange(256) + 0.5),
            2.0 ** torch.arange(-100, 100).repeat(2)[:256] * (1 + eps / 2),
        ]
    )
    args = every, absmax, None, None, (512, 64), dtype, 64
    with guarded() as buffers:
        assert same(
            nf4.dequantize(*map(buffers.hold, args[:4]), *args[4:]), reference.dequantize(*args)
        )


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
    packed, absmax = reference.quantize(x, block_size)
    double = reference.double_quantize(absmax)
    with guarded() as buffers:
        assert same(nf4.quantize(buffers.hold(x), block_size), (packed, absmax))
        assert same(nf4.double_quantize(buffers.hold(absmax)), double)
        for state in ((absmax, None, None), double):
            found = nf4.dequantize(*map(buffers.hold, (packed, *state)), (n,), dtype, block_size)
            assert same(found, reference.dequantize(packed, *state, (n,), dtype, block_size))


def test_packed_bytes_that_are_not_aligned_to_a_word() -> None:
    packed, absmax = reference.quantize(gaussian(512), 64)
    with guarded() as buffers:
        shifted = buffers.hold(torch.cat([packed[:1], packed]))[1:]
        found = nf4.dequantize(
            shifted, buffers.hold(absmax), None, None, (512,), torch.bfloat16, 64
        )
        assert same(
            found, reference.dequantize(packed, absmax, None, None, (512,), torch.bfloat16, 64)
        )


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_decoding_into_rows_with_gaps_leaves_the_gaps_alone(dtype: torch.dtype) -> None:
    packed, absmax = reference.quantize(gaussian(33, 72), 64)  # blocks cross rows
    double = reference.double_quantize(absmax)
    with guarded() as buffers:
        wide = buffers.empty(33, 80, dtype=dtype)
        nf4.dequantize_into(wide[:, :72], *map(buffers.hold, (packed, *double)), 64)
        assert same(
            wide[:, :72].contiguous(), reference.dequantize(packed, *double, (33, 72), dtype, 64)
        )
        assert wide[:, 72:].isnan().all()


def test_nothing_to_do_is_done() -> None:
    nothing = torch.zeros(0, device=DEVICE)
    assert nf4.dequantize(
        nothing.byte(), nothing, None, None, (0, 64), torch.bfloat16, 64
    ).shape == (0, 64)


# ---- refusals, before anything is launched


def weight(device: Any = None) -> list[Any]:
    packed, absmax = reference.quantize(gaussian(4, 64), 64)
    return [t.to(device or DEVICE) for t in (packed, *reference.double_quantize(absmax))]


def test_what_a_kernel_does_not_take_is_refused_by_name() -> None:
    packed, codes, absmax2, offset = weight()

    def dequantize(
        *w: Any, shape: Any = (4, 64), dtype: torch.dtype = torch.float32, block: int = 64
    ) -> Tensor:
        return nf4.dequantize(*w, shape, dtype, block)

    with pytest.raises(
        TypeError,
        match=r"x is torch\.int32: the kernel takes float32 or float16 or bfloat16 or float64",
    ):
        nf4.quantize(torch.ones(64, dtype=torch.int32, device=DEVICE), 64)
    for block in (0, 16, 48, 8192):
        with pytest.raises(ValueError, match=rf"block_size={block}: the kernels take 32, 64"):
            nf4.quantize(torch.ones(64, device=DEVICE), block)
    with pytest.raises(TypeError, match=r"dtype=torch\.int8: the kernel writes"):
        dequantize(packed, codes, absmax2, offset, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"packed is torch\.int8: the kernel takes uint8"):
        dequantize(packed.view(torch.int8), codes, absmax2, offset)
    with pytest.raises(TypeError, match=r"absmax is torch\.float32: the kernel takes uint8"):
        dequantize(packed, codes.float(), absmax2, offset)
    with pytest.raises(ValueError, match="absmax2 and offset belong together"):
        dequantize(packed, codes, absmax2, None)
    with pytest.raises(
        ValueError,
        match=r"packed has 128 elements, contiguous: a weight \(5, 64\) in blocks of 64 needs 160",
    ):
        dequantize(packed, codes, absmax2, offset, shape=(5, 64))
    with pytest.raises(ValueError, match="packed has 128 elements, strided"):
        dequantize(packed.repeat_interleave(2)[::2], codes, absmax2, offset)
    with pytest.raises(ValueError, match=r"absmax is on meta, the rest on"):
        dequantize(packed, codes.to("meta"), absmax2, offset)
    with pytest.raises(TypeError, match=r"codes is torch\.int32"):
        nf4.double_dequantize(codes.int(), absmax2, offset)


def test_a_cpu_tensor_is_refused_where_kernels_are_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    with pytest.raises(
        ValueError,
        match=r"x is on cpu: a Triton kernel runs on a GPU \(or interpreted, with TRITON_INTERPRET=1\)",
    ):
        nf4.quantize(torch.ones(64), 64)
