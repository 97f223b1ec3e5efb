"""Other codebooks than NF4: one entry in a dict, and all three backends use it."""

from collections.abc import Iterator

import pytest
import torch
from gpu import guarded
from helpers import gaussian, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weights import packed_weight

import minilora
from minilora import ops
from minilora.kernels.cpu import lora as cpu_lora
from minilora.kernels.cpu import matmul as cpu_matmul
from minilora.kernels.cpu import nf4 as cpu
from minilora.kernels.gpu import lora as gpu_lora
from minilora.kernels.gpu import matmul as gpu_matmul
from minilora.kernels.gpu import nf4 as gpu
from minilora.kernels.reference import codebooks
from minilora.kernels.reference import nf4 as reference

# Not symmetric, not evenly spaced, and zero is level 2: nothing of NF4 fits by chance.
SKEWED = (
    -0.9, -0.33, 0.0, 0.01, 0.02, 0.05, 0.07, 0.11, 0.2, 0.3, 0.41, 0.5, 0.62, 0.77, 0.9, 1.0,
)  # fmt: skip

# Its codes are in no order, and the highest level has a code above 7.
SHUFFLED = tuple(SKEWED[7 * code % 16] for code in range(16))
ADDED = {"skewed": SKEWED, "shuffled": SHUFFLED}


@pytest.fixture(params=[*ADDED, "fp4"], autouse=True)
def quant_type(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name, levels in ADDED.items():
            patch.setitem(codebooks.CODEBOOKS, name, levels)
        yield request.param


SHAPES = ((1,), (65,), (7, 33), (33, 192))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_quantize_gives_the_same_bytes(
    dtype: torch.dtype, block_size: int, quant_type: str
) -> None:
    for shape in SHAPES:
        x = gaussian(*shape, dtype=dtype)
        expected = reference.quantize(x, block_size, quant_type)
        assert same_bits(cpu.quantize(x, block_size, quant_type), expected)
        assert same_bits(ops.quantize(x, block_size, quant_type), expected)
        with guarded() as buffers:
            found = gpu.quantize(buffers.hold(x), block_size, quant_type)
            assert same_bits(found, expected)


@dtypes
@pytest.mark.parametrize("double", [False, True])
def test_dequantize_gives_the_same_bits(dtype: torch.dtype, double: bool, quant_type: str) -> None:
    for shape in SHAPES:
        w = packed_weight(gaussian(*shape), 64, double, quant_type)
        expected = reference.dequantize(w, dtype)
        assert same_bits(cpu.dequantize(w, dtype), expected)
        assert same_bits(ops.dequantize(w, dtype), expected)
        with guarded() as buffers:
            assert same_bits(gpu.dequantize(buffers.hold_weight(w), dtype), expected)


@settings(max_examples=25)
@given(n=st.integers(1, 700), seed=st.integers(0, 2**31), zeros=st.sampled_from([0.0, 0.5, 1.0]))
def test_a_code_is_that_of_the_nearest_level(n: int, seed: int, zeros: float) -> None:
    x = gaussian(n, seed=seed).double()
    x[torch.rand(n, generator=torch.Generator().manual_seed(seed)) < zeros] = 0
    for quant_type in (*ADDED, "fp4"):
        levels = codebooks.levels(quant_type).double()
        w = packed_weight(x, 64, False, quant_type)
        absmax = w.absmax.double().repeat_interleave(64)[:n]

        found = (reference.dequantize(w, torch.float64) - x).abs()
        nearest = (levels * absmax[:, None] - x[:, None]).abs().amin(1)
        assert (found <= nearest + 2**-22 * absmax).all()
        assert same_bits(cpu.quantize(x, 64, quant_type), (w.packed, w.absmax))


def test_a_block_of_zeros_and_the_last_nibble_have_the_code_of_zero(quant_type: str) -> None:
    levels = codebooks.CODEBOOKS[quant_type]
    zero, one = levels.index(0.0), levels.index(1.0)
    x = torch.cat([torch.zeros(64), torch.ones(1)])
    for quantize in (reference.quantize, cpu.quantize, gpu.quantize):
        packed, absmax = quantize(x, 64, quant_type)
        assert (packed[:32] == (zero << 4 | zero)).all()
        assert packed[32] == (one << 4 | zero)
        assert absmax.tolist() == [0.0, 1.0]


def bound(x: Tensor, W: Tensor, roundings: int) -> Tensor:
    """The error of x W^T: roundings of weights and results to x's dtype, and of float32 sums."""
    relative = roundings * torch.finfo(x.dtype).eps / 2 + (x.shape[1] + 8) * 2**-24
    return 1.01 * relative * (x.double().abs() @ W.abs().T)


@pytest.mark.parametrize("M", [1, 9, 40])
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_agree_with_float64_on_every_backend(
    M: int, block_size: int, dtype: torch.dtype, quant_type: str
) -> None:
    O, I = 96, 128
    w = packed_weight(gaussian(O, I), block_size, True, quant_type)
    W = reference.dequantize(w, torch.float64)
    x, dy = gaussian(M, I, dtype=dtype), gaussian(M, O, dtype=dtype)
    assert torch.equal(ops.nf4_linear(x, w, None), cpu_matmul.nf4_linear(x, w, None))

    with guarded() as buffers:
        held = buffers.hold_weight(w)
        y = gpu_matmul.nf4_linear(buffers.hold(x), held, None)
        dx = gpu_matmul.nf4_linear_backward(buffers.hold(dy), held)
    for found in (y.cpu(), cpu_matmul.nf4_linear(x, w, None)):
        error = (found.double() - x.double() @ W.T).abs()
        assert (error <= bound(x, W, roundings=2)).all()
    for found in (dx.cpu(), cpu_matmul.nf4_linear_backward(dy, w)):
        error = (found.double() - dy.double() @ W).abs()
        assert (error <= bound(dy, W.T, roundings=2)).all()


def test_products_with_a_low_rank_term_agree_with_float64(quant_type: str) -> None:
    O, I, M, r = 96, 128, 5, 4
    w = packed_weight(gaussian(O, I), 64, True, quant_type)
    x, z, B = (gaussian(*size, dtype=torch.bfloat16) for size in ((M, I), (M, r), (O, r)))
    wide = torch.cat([reference.dequantize(w, torch.float64), 0.5 * B.double()], dim=1)
    both = torch.cat([x, z], dim=1)
    exact = both.double() @ wide.T

    with guarded() as buffers:
        held = buffers.hold_weight(w)
        parts = buffers.hold(z), buffers.hold(B), 0.5
        y = gpu_lora.nf4_lora_linear(buffers.hold(x), held, None, *parts)
    # On the CPU the result is rounded before the term is added, and after.
    for found in (y.cpu(), cpu_lora.nf4_lora_linear(x, w, None, z, B, 0.5)):
        assert ((found.double() - exact).abs() <= bound(both, wide, roundings=3)).all()


def test_a_weight_of_another_type_trains_and_compiles(quant_type: str) -> None:
    packed, absmax = ops.quantize(gaussian(64, 128), 64, quant_type)
    w = minilora.NF4Weight(
        packed, absmax, None, None, torch.Size((64, 128)), torch.float32, 64, quant_type
    )
    x = gaussian(3, 128).requires_grad_()
    y = minilora.nf4_linear(x, w)
    y.sum().backward()
    W = w.dequantize().double()
    assert ((y.double() - x.double() @ W.T).abs() <= bound(x.detach(), W, roundings=2)).all()
    assert x.grad is not None
    error = (x.grad.double() - torch.ones(3, 64).double() @ W).abs()
    assert (error <= bound(torch.ones(3, 64), W.T, roundings=2)).all()


def test_a_name_without_a_codebook_is_refused() -> None:
    words = r"quant_type='nf3': there is a codebook for 'nf4', 'fp4', 'skewed', 'shuffled'"
    for quantize in (reference.quantize, cpu.quantize, gpu.quantize):
        with pytest.raises(ValueError, match=words):
            quantize(torch.ones(64), 64, "nf3")


def test_the_caller_s_default_dtype_and_device_do_not_matter(quant_type: str) -> None:
    codebooks.levels.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = codebooks.levels(quant_type)
    finally:
        torch.set_default_dtype(torch.float32)
    expected = torch.tensor(codebooks.CODEBOOKS[quant_type])
    assert same_bits(found, expected)
