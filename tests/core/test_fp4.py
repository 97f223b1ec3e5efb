"""FP4: the bytes and values of bitsandbytes, and what is equal of its double quantization.

What NF4's tests say of blocks, shapes and dtypes holds for any codebook; here is what is different:
codes that are not in the order of their levels, and a zero that has two of them.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import gaussian, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minilora
from minilora.kernels.cpu import nf4 as cpu
from minilora.kernels.reference import codebooks
from minilora.kernels.reference import nf4 as reference
from minilora.kernels.reference.nf4 import PackedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
backends = pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


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


def scaled(blocks: int, block_size: int, exponent: int, zeros: float, seed: int) -> Tensor:
    """Whole blocks of Gaussian numbers of some scale, part of them zero."""
    x = gaussian(blocks, block_size, seed=seed) * 10.0**exponent
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < zeros] = 0
    return x


# bitsandbytes' CPU build divides in an incomplete last block, and in rows that are not whole blocks
# it dequantizes with the absmax of another: here a row is a block.
weights = st.builds(
    scaled,
    blocks=st.integers(1, 40),
    block_size=st.sampled_from((32, 64, 128, 256, 512, 1024, 2048, 4096)),
    exponent=st.integers(-30, 30),
    zeros=st.sampled_from([0.0, 0.0, 0.5, 0.99]),
    seed=st.integers(0, 2**31),
)


@backends
@settings(max_examples=60)
@given(x=weights, dtype=st.sampled_from(DTYPES))
def test_bytes_and_values_equal_bitsandbytes(
    backend: ModuleType, x: Tensor, dtype: torch.dtype, bnb: Any
) -> None:
    block_size = x.shape[1]
    x = x.clamp(-6e4, 6e4).to(dtype)
    expected, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type="fp4")
    packed, absmax = backend.quantize(x, block_size, "fp4")
    assert same_bits(packed, expected.flatten())
    assert same_bits(absmax, state.absmax)

    w = PackedWeight(packed, absmax, None, None, tuple(x.shape), block_size, "fp4")
    # Some of its loops decode the second zero as -0, which is equal and has other bits.
    assert torch.equal(backend.dequantize(w, dtype), bnb.dequantize_4bit(expected, state))


@backends
@dtypes
@pytest.mark.parametrize("n", [1, 63, 65, 1000, 4097], ids=str)
def test_bytes_of_an_incomplete_block_equal_bitsandbytes(
    backend: ModuleType, dtype: torch.dtype, n: int, bnb: Any
) -> None:
    x = gaussian(n, dtype=dtype)
    expected, state = bnb.quantize_4bit(x, blocksize=64, quant_type="fp4")
    packed, absmax = backend.quantize(x, 64, "fp4")
    assert same_bits(packed, expected.flatten())
    assert same_bits(absmax, state.absmax)


@backends
def test_codes_change_just_above_a_threshold(backend: ModuleType, bnb: Any) -> None:
    t = codebooks.thresholds("fp4")
    below, above = torch.nextafter(t, torch.tensor(-2.0)), torch.nextafter(t, torch.tensor(2.0))
    # The largest is 1, so nothing is rounded.
    x = torch.cat([torch.ones(1), below, t, above, torch.zeros(18)])
    packed, _ = backend.quantize(x, 64, "fp4")

    order = codebooks.ascending_codes("fp4")
    assert torch.equal(
        codes(packed)[:46], torch.cat([order[[12 + 3]], *2 * [order[:15]], order[1:]])
    )
    expected, _ = bnb.quantize_4bit(x, blocksize=64, quant_type="fp4")
    assert same_bits(packed, expected.flatten())


@backends
def test_zero_stays_zero_and_has_the_first_of_its_codes(backend: ModuleType) -> None:
    x = torch.tensor([0.0, -0.0, 1e-4, -1e-4]).repeat(16)
    x[-1] = 1.0
    packed, absmax = backend.quantize(x, 64, "fp4")
    assert codes(packed)[:4].tolist() == [0, 0, 8, 0]
    w = PackedWeight(packed, absmax, None, None, (64,), 64, "fp4")
    assert same_bits(backend.dequantize(w, torch.float32)[:-1], torch.zeros(63))


@backends
@dtypes
def test_a_double_quantized_state_of_bitsandbytes_is_dequantized_to_its_values(
    backend: ModuleType, dtype: torch.dtype, bnb: Any
) -> None:
    x = gaussian(300, 128, dtype=dtype)
    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="fp4", compress_statistics=True)
    constants = state.absmax, state.state2.absmax, state.offset
    w = PackedWeight(packed.flatten(), *constants, (300, 128), 64, "fp4")
    assert torch.equal(backend.dequantize(w, dtype), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_double_quantized_codes_are_those_of_bitsandbytes_or_nearer(
    quant_type: str, bnb: Any
) -> None:
    """The packed codes are its own. Its 8-bit codes come from a table, which is not exact."""
    x = 0.02 * gaussian(2048, 2048)
    expected, state = bnb.quantize_4bit(
        x, blocksize=64, quant_type=quant_type, compress_statistics=True
    )
    w = minilora.quantize_nf4(x, quant_type=quant_type)
    assert w.absmax2 is not None and w.offset is not None
    assert same_bits(w.packed, expected.flatten())

    differ = w.absmax != state.absmax
    assert 0 < differ.float().mean() < 0.005, "0.16 % of 65,536 blocks"
    exact = reference.quantize(x, 64, quant_type)[1]
    ours = reference.double_dequantize(w.absmax, w.absmax2, w.offset)
    theirs = reference.double_dequantize(state.absmax, state.state2.absmax, state.offset)
    assert ((ours - exact).abs() < (theirs - exact).abs())[differ].all()


@dtypes
def test_a_quantized_layer_computes_what_bitsandbytes_layer_computes(
    dtype: torch.dtype, bnb: Any
) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    linear = nn.Linear(128, 64, bias=False, dtype=dtype)
    theirs = Linear4bit(128, 64, bias=False, compute_dtype=dtype, quant_type="fp4")
    options = {"requires_grad": False, "compress_statistics": False, "quant_type": "fp4"}
    weight: Any = Params4bit(linear.weight.detach(), **options)
    theirs.weight = weight.to("cpu")

    model = minilora.quantize(nn.Sequential(linear), quant_type="fp4", double_quant=False)
    x = gaussian(5, 128, dtype=dtype)
    x_theirs = x.clone().requires_grad_()
    x_ours = x.clone().requires_grad_()
    y, expected = model(x_ours), theirs.train()(x_theirs)
    assert torch.equal(y, expected)

    y.sum().backward()
    expected.sum().backward()
    assert x_ours.grad is not None and x_theirs.grad is not None
    tolerance = 64 * torch.finfo(dtype).eps
    assert torch.allclose(x_ours.grad, x_theirs.grad, rtol=tolerance, atol=tolerance)


def test_a_model_in_fp4_trains_and_its_state_does_not_load_into_one_in_nf4() -> None:
    def model(quant_type: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            linear = nn.Linear(64, 64)
        return minilora.quantize(nn.Sequential(linear), quant_type=quant_type)

    fp4 = model("fp4")
    assert "fp4" in repr(fp4)
    with pytest.raises(RuntimeError, match=r"in fp4, in blocks of 64, the model .* in nf4"):
        model("nf4").load_state_dict(fp4.state_dict())
    again = model("fp4")
    again.load_state_dict(fp4.state_dict())

    x = gaussian(3, 64)
    assert torch.equal(again(x), fp4(x))
    minilora.inject(fp4, r=4)
    fp4(x).square().sum().backward()
    assert all(p.grad is not None for p in minilora.adapter_parameters(fp4))
    assert type(minilora.merge(fp4).get_submodule("0")) is nn.Linear
