"""NF4 itself: the codebook, the bytes against bitsandbytes, and the Numba room against the plain one, bit for bit."""

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import minilora
from minilora.kernels.cpu import nf4 as cpu
from minilora.kernels.reference import nf4 as reference

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = ((1,), (63,), (64,), (65,), (1000,), (4097,), (576, 576), (192, 576), (7, 33))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
rooms = pytest.mark.parametrize("room", [reference, cpu], ids=["reference", "cpu"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def bnb() -> Iterator[Any]:
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is the oracle of the bytes"
    )
    with torch.compiler.set_stance("force_eager"):  # it compiles its fallbacks: seconds for nothing
        yield functional


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit: 0.0 is not -0.0, and a NaN equals itself."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return (
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(integer), b.view(integer))
    )


def codes(packed: Tensor) -> Tensor:
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten()


# ---- oracle: the codebook, the 8-bit map and the thresholds


def test_derived_codebook_is_the_published_one_to_an_ulp() -> None:
    # The levels are scaled so that the largest is 1: an ulp of float32 there is 2^-23.
    published = torch.tensor(reference.NF4, dtype=torch.float64)
    assert (reference.derive_nf4() - published).abs().max() < 2**-23
    assert torch.equal(reference.CODE.double(), published), "the digits are float32 numbers"


def test_published_digits_follow_bit_for_bit_from_probabilities_in_float32() -> None:
    def half(levels: int) -> Tensor:
        p = torch.linspace(0.9677083, 0.5, levels + 1)[
            :-1
        ]  # float32, as in the code that made the digits
        return torch.special.ndtri(p.double()).float()

    levels = torch.cat([-half(7), torch.zeros(1), half(8)]).sort().values
    assert same(levels / levels.max(), reference.CODE)


def test_map8_is_the_dynamic_map_of_bitsandbytes_in_256_ascending_values(bnb: Any) -> None:
    assert (reference.MAP8.diff() > 0).all() and same(
        reference.MAP8, bnb.create_dynamic_map(signed=True).float()
    )
    assert reference.MAP8.shape == (256,)


def test_the_8_bit_map_has_the_same_bits_on_a_processor_without_vector_instructions() -> None:
    """Or bytes that were quantized on one machine would decode to other weights on another."""
    code = "from minilora.kernels.reference import nf4; import torch; print(nf4.MAP8.view(torch.int32).tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(reference.MAP8.view(torch.int32).tolist())


@pytest.mark.parametrize("code", [reference.CODE, reference.MAP8], ids=["nf4", "map8"])
def test_thresholds_are_midpoints_rounded_to_float32(code: Tensor) -> None:
    # The sum of two neighbours is exact in float64, so this is the midpoint rounded once.
    assert same(reference.midpoints(code), ((code[:-1].double() + code[1:].double()) / 2).float())


@rooms
@pytest.mark.parametrize("scale", [1.0, 2.0**-9], ids=str)
def test_codes_change_just_above_a_threshold(room: ModuleType, scale: float, bnb: Any) -> None:
    t = reference.midpoints(reference.CODE)
    below, above = torch.nextafter(t, torch.tensor(-2.0)), torch.nextafter(t, torch.tensor(2.0))
    x = (
        torch.cat([torch.ones(1), t, below, above, torch.zeros(18)]) * scale
    )  # a power of two: nothing is rounded
    j = torch.arange(15)
    packed, _ = room.quantize(x, 64)
    assert codes(packed)[:46].tolist() == [15, *j.tolist(), *j.tolist(), *(j + 1).tolist()]
    assert same(packed, bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")[0].flatten())


@rooms
def test_codes_beside_a_threshold_come_from_the_reciprocal_of_absmax(
    room: ModuleType, bnb: Any
) -> None:
    # x * (1 / absmax) and x / absmax differ in a last bit now and then, and so does the code of an x that lies there.
    absmax = gaussian(2000, 1).abs() + 0.1
    near = reference.midpoints(reference.CODE).repeat(4) * absmax
    for step in (15, 30, 45):
        near[:, step:] = torch.nextafter(near[:, step:], torch.tensor(9.0))
    x = torch.cat([absmax, near, torch.zeros(2000, 3)], dim=1)
    assert (x / absmax != x * (1 / absmax)).any()
    assert same(
        room.quantize(x, 64)[0], bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")[0].flatten()
    )


# ---- oracle: bitsandbytes


@rooms
@dtypes
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        *((shape, 64) for shape in SHAPES),
        *(((3, 4098), size) for size in BLOCK_SIZES),
    ],  # 4098: blocks cross the rows
    ids=str,
)
def test_bytes_absmax_and_values_equal_bitsandbytes(
    room: ModuleType, dtype: torch.dtype, shape: tuple[int, ...], block_size: int, bnb: Any
) -> None:
    x = gaussian(*shape, dtype=dtype)
    expected, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type="nf4")
    packed, absmax = room.quantize(x, block_size)
    assert same(packed, expected.flatten()) and same(absmax, state.absmax)
    dense = room.dequantize(packed, absmax, None, None, shape, dtype, block_size)
    assert same(
        dense, bnb.dequantize_4bit(expected, state).view(shape)
    )  # 1-D comes back from bitsandbytes as [1, n]


@rooms
def test_blocks_of_zeros_equal_bitsandbytes(room: ModuleType, bnb: Any) -> None:
    x = gaussian(5, 64)
    x[1], x[3] = 0.0, -0.0
    expected, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")
    packed, absmax = room.quantize(x, 64)
    assert same(packed, expected.flatten()) and same(absmax, state.absmax)
    assert (codes(packed).view(5, 64)[1] == 7).all() and absmax[1] == 0
    assert same(
        room.dequantize(packed, absmax, None, None, (5, 64), torch.float32, 64)[[1, 3]],
        torch.zeros(2, 64),
    )


@rooms
@dtypes
@pytest.mark.parametrize("shape", [(1, 130), (257, 64), (576, 576), (3, 8222)], ids=str)
def test_a_double_quantized_state_of_bitsandbytes_decodes_to_its_values(
    room: ModuleType, dtype: torch.dtype, shape: tuple[int, int], bnb: Any
) -> None:
    packed, state = bnb.quantize_4bit(
        gaussian(*shape, dtype=dtype), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    dense = room.dequantize(
        packed.flatten(), state.absmax, state.state2.absmax, state.offset, shape, dtype, 64
    )
    assert same(dense, bnb.dequantize_4bit(packed, state))


# ---- oracle: double quantization, exact nearest (bitsandbytes' own table on the CPU is not)


@rooms
@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 5184, 20000])
def test_double_quantization_rounds_to_the_nearest_of_map8(room: ModuleType, blocks: int) -> None:
    absmax = gaussian(blocks).abs() + 2.0
    quantized, absmax2, offset = room.double_quantize(absmax)
    assert same(offset, torch.tensor(math.fsum(absmax.tolist()) / blocks))
    edges = reference.midpoints(reference.MAP8)
    for g, group in enumerate((absmax - offset).split(256)):
        assert same(absmax2[g], group.abs().max())
        nearest = (
            torch.bucketize(group * (1 / absmax2[g]), edges)
            if absmax2[g] > 0
            else torch.zeros(len(group))
        )
        assert torch.equal(quantized[g * 256 : (g + 1) * 256], nearest.to(torch.uint8))
    assert absmax2.shape == (-(-blocks // 256),)


@rooms
def test_double_quantization_codes_change_just_above_a_threshold(room: ModuleType) -> None:
    edges = reference.midpoints(reference.MAP8)
    for y in (
        edges,
        torch.nextafter(edges, torch.tensor(-2.0)),
        torch.nextafter(edges, torch.tensor(2.0)),
    ):
        absmax = torch.cat(
            [torch.ones(1), y, -torch.ones(1), -y]
        )  # two groups, and their mean is 0
        quantized, _, offset = room.double_quantize(absmax)
        assert offset == 0 and torch.equal(
            quantized, (absmax[:, None] > edges).sum(1).to(torch.uint8)
        )


@rooms
@pytest.mark.parametrize(
    "beside", [[0.7, 0.7], [0.2, 1.2]], ids=["everywhere equal", "beside another group"]
)
def test_a_group_of_equal_absmax_has_code_0_and_decodes_to_the_offset(
    room: ModuleType, beside: list[float]
) -> None:
    absmax = torch.full((512,), 0.7)
    absmax[256:] = torch.tensor(beside).repeat(128)  # the mean stays 0.7
    quantized, absmax2, offset = room.double_quantize(absmax)
    assert absmax2[0] == 0 and (quantized[:256] == 0).all() and same(offset, torch.tensor(0.7))
    assert same(room.double_dequantize(quantized, absmax2, offset)[:256], absmax[:256])


# ---- property: the rooms agree


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


def assert_rooms_agree(x: Tensor, block_size: int, dtype: torch.dtype) -> None:
    packed, absmax = reference.quantize(x, block_size)
    for a, b in zip((packed, absmax), cpu.quantize(x, block_size), strict=True):
        assert same(a, b)
    double = reference.double_quantize(absmax)
    for a, b in zip(double, cpu.double_quantize(absmax), strict=True):
        assert same(a, b)
    assert same(reference.double_dequantize(*double), cpu.double_dequantize(*double))
    for record in ((absmax, None, None), double):
        layout = x.shape, dtype, block_size
        assert same(
            reference.dequantize(packed, *record, *layout), cpu.dequantize(packed, *record, *layout)
        )


@settings(max_examples=400)
@given(
    x=weights,
    block_size=st.sampled_from(BLOCK_SIZES),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
)
def test_cpu_room_equals_reference_room(x: Tensor, block_size: int, dtype: torch.dtype) -> None:
    assert_rooms_agree(x, block_size, dtype)


@settings(max_examples=60)
@given(
    n=st.integers(1, 700),
    block_size=st.sampled_from((32, 64)),
    exponent=st.integers(-149, -120),
    seed=st.integers(0, 99),
)
def test_rooms_agree_and_zero_stays_zero_where_float32_is_subnormal(
    n: int, block_size: int, exponent: int, seed: int
) -> None:
    x = gaussian(n, seed=seed) * 2.0**exponent
    x[::3] = 0
    assert_rooms_agree(x, block_size, torch.float32)
    dense = reference.dequantize(
        *reference.quantize(x, block_size), None, None, x.shape, x.dtype, block_size
    )
    assert (dense[::3] == 0).all()


# ---- property: the laws


@settings(max_examples=200)
@given(x=weights, block_size=st.sampled_from(BLOCK_SIZES))
def test_quantizing_a_dequantized_weight_changes_nothing(x: Tensor, block_size: int) -> None:
    w = minilora.quantize_nf4(x, block_size, double_quant=False)
    # The smallest level is 0.08 absmax: a normal number of the dtype, or its rounding can reach the next level.
    assume((w.absmax[w.absmax > 0] > torch.finfo(x.dtype).tiny / 0.07).all())
    assert same(
        minilora.quantize_nf4(w.dequantize(), block_size, double_quant=False).dequantize(),
        w.dequantize(),
    )


@rooms
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("block_size", [32, 512])
def test_every_byte_decodes(room: ModuleType, dtype: torch.dtype, block_size: int) -> None:
    absmax = torch.full((512 // block_size,), 1 + 2**-8)  # -1 and 1 times this are ties in bfloat16
    dense = room.dequantize(
        torch.arange(256).to(torch.uint8), absmax, None, None, (256, 2), dtype, block_size
    )
    level = torch.tensor([level * (1 + 2**-8) for level in reference.NF4]).to(dtype)
    assert same(dense, torch.stack([level.repeat_interleave(16), level.repeat(16)], dim=1))


@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (2, 3, 65), (64, 300), (273, 1)], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_any_shape_comes_back_and_nbytes_are_the_formula(
    shape: tuple[int, ...], double_quant: bool, block_size: int
) -> None:
    x = gaussian(*shape, dtype=torch.bfloat16)
    w = minilora.quantize_nf4(x, block_size, double_quant)
    assert w.shape == x.shape and w.dtype == x.dtype and w.dequantize().shape == x.shape
    nf4_bytes = importlib.import_module(
        "minilora.reports.planning"
    ).nf4_bytes  # `minilora.plan` itself is the function
    assert w.nbytes == nf4_bytes(x.numel(), block_size, double_quant)


def test_a_square_of_4096_takes_4_127_bits_a_weight_and_4_5_without_double_quantization() -> None:
    x = torch.zeros(4096, 4096, dtype=torch.bfloat16)
    assert round(minilora.quantize_nf4(x).nbytes * 8 / x.numel(), 3) == 4.127
    assert minilora.quantize_nf4(x, double_quant=False).nbytes * 8 / x.numel() == 4.5


def test_a_transposed_weight_is_quantized_in_its_own_order() -> None:
    x = gaussian(65, 33).T
    a, b = minilora.quantize_nf4(x), minilora.quantize_nf4(x.contiguous())
    assert (
        same(a.packed, b.packed)
        and same(reference.quantize(x, 64)[0], a.packed)
        and a.shape == (33, 65)
    )


# ---- errors

ones, quantize, dequantize = torch.ones(64), minilora.quantize_nf4, minilora.dequantize_nf4


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: quantize(ones.long()), TypeError, "int64"),
        (lambda: quantize(ones.bool()), TypeError, "bool"),
        (lambda: quantize([1.0, 2.0]), TypeError, "list"),  # type: ignore[arg-type]
        (lambda: quantize(torch.ones(0, 64)), ValueError, r"\(0, 64\)"),
        (lambda: quantize(ones.to("meta")), ValueError, "meta"),
        (lambda: quantize(ones * math.nan), ValueError, "NaN"),
        (
            lambda: quantize(torch.tensor([1.0, math.inf], dtype=torch.bfloat16)),
            ValueError,
            "infinity",
        ),
        (
            lambda: quantize(torch.tensor([1.0, -math.inf], dtype=torch.float16)),
            ValueError,
            "infinity",
        ),
        (
            lambda: quantize(torch.tensor([1e300], dtype=torch.float64)),
            ValueError,
            "infinity",
        ),  # it is, in float32
        *(
            (lambda size=size: quantize(ones, size), ValueError, f"block_size={size}.*64")
            for size in (0, -64, 16, 63, 96, 8192)
        ),
        (lambda: dequantize(quantize(ones), torch.uint8), TypeError, "uint8"),
        (lambda: dequantize(quantize(ones), torch.complex64), TypeError, "complex64"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    call: Callable[[], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        call()
