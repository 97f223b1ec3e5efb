"""NF4Linear and QLoRALinear: what they hold; every copy, cast and save leaves a weight's bits."""

import copy
import io
from typing import Any

import pytest
import torch
from helpers import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from linears import random_linear, with_adapter
from torch import Tensor, nn

import minilora
from minilora import NF4Linear, NF4Weight, QLoRALinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (out, in, block size): whole blocks, short last blocks, blocks that cross rows, less than a block.
shapes = st.tuples(st.integers(1, 37), st.integers(1, 70), st.sampled_from([32, 64, 128]))


def bits(weight: NF4Weight) -> tuple[Tensor, ...]:
    """A quantized weight as bytes."""
    tensors = [t for t in weight.tensors if t is not None]
    return tuple(t.reshape(-1).view(torch.uint8).clone() for t in tensors)


def saved(thing: Any, *, weights_only: bool) -> Any:
    """What torch.load returns of what torch.save wrote."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_of_a_quantized_layer_is_an_nf4_weight(
    dtype: torch.dtype, double_quant: bool
) -> None:
    dense = random_linear(12, 21, dtype=dtype).eval()
    layer = NF4Linear.from_linear(dense, block_size=32, double_quant=double_quant)
    expected = minilora.quantize_nf4(dense.weight, 32, double_quant)
    w = layer.weight
    assert isinstance(w, NF4Weight)
    assert (w.dtype, w.shape, w.device, w.block_size) == (dtype, (12, 21), dense.weight.device, 32)
    assert (w.absmax2 is not None) == (w.offset is not None) == double_quant
    assert same_bits(bits(w), bits(expected))
    assert layer.bias is dense.bias
    assert not layer.training

    parts = [p for n, p in layer.named_parameters() if n != "bias"]
    assert not any(p.requires_grad for p in parts)
    assert not any(p.is_floating_point() for p in parts), "a cast would change it"


@given(shapes, st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=25)
def test_every_copy_cast_and_save_keeps_every_bit(
    shape: tuple[int, int, int], dtype: torch.dtype, double_quant: bool, bias: bool, injected: bool
) -> None:
    o, i, block_size = shape
    layer = NF4Linear.from_linear(
        random_linear(o, i, bias, dtype), block_size=block_size, double_quant=double_quant
    )
    model = nn.Sequential(layer)
    if injected:
        minilora.inject(model, r=1)
    expected, dense = bits(model[0].weight), model[0].weight.dequantize()

    copies: list[Any] = [copy.deepcopy(model), saved(model, weights_only=False)]
    copies.append(copy.deepcopy(model).to(torch.bfloat16))
    copies.append(copy.deepcopy(model).half())
    copies.append(copy.deepcopy(model).float())
    copies.append(copy.deepcopy(model).half().float().to("cpu", torch.bfloat16))
    for c in copies:
        weight = c[0].weight
        assert same_bits(bits(weight), expected)
        assert weight.dtype == dtype
        assert torch.equal(weight.dequantize(), dense)
    assert copies[0][0].packed.data_ptr() != model[0].packed.data_ptr()


@given(shapes, st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=25)
def test_a_state_dict_round_trips_strictly(
    shape: tuple[int, int, int], dtype: torch.dtype, double_quant: bool, bias: bool, injected: bool
) -> None:
    o, i, block_size = shape

    def make(seed: int) -> nn.Sequential:
        base = random_linear(o, i, bias, dtype, seed)
        model = nn.Sequential(
            NF4Linear.from_linear(base, block_size=block_size, double_quant=double_quant)
        )
        return minilora.inject(model, r=1, seed=seed) if injected else model

    one, other = make(1), make(2)
    other.load_state_dict(saved(one.state_dict(), weights_only=True), strict=True)
    assert same_bits(bits(other[0].weight), bits(one[0].weight))
    assert same_bits(tuple(other.state_dict().values()), tuple(one.state_dict().values()))
    x = torch.ones(1, i, dtype=dtype)
    assert torch.equal(other(x), one(x))


@pytest.mark.parametrize("injected", [True, False])
@pytest.mark.parametrize(
    ("o", "i", "dtype", "block_size", "names"),
    [
        # As many bytes.
        (20, 12, torch.float32, 64, ["[20, 12]", "[12, 20]"]),
        (12, 20, torch.bfloat16, 64, ["bfloat16", "float32"]),
        (12, 20, torch.float32, 32, ["blocks of 32", "blocks of 64"]),
    ],
)
def test_a_state_dict_of_another_layout_is_refused_by_name(
    o: int, i: int, dtype: torch.dtype, block_size: int, names: list[str], injected: bool
) -> None:
    def model(layer: nn.Linear, block_size: int) -> nn.ModuleDict:
        made = nn.ModuleDict({"up": NF4Linear.from_linear(layer, block_size=block_size)})
        return minilora.inject(made, r=2) if injected else made

    state = model(random_linear(o, i, False, dtype), block_size).state_dict()
    with pytest.raises(RuntimeError, match=r"up\.nf4_layout") as error:
        model(random_linear(12, 20, False), 64).load_state_dict(state)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("injected", [True, False])
def test_compute_dtype_is_the_products_and_not_the_outputs(
    injected: bool, dtype: torch.dtype
) -> None:
    dense = random_linear(12, 20)
    layer: nn.Module = NF4Linear.from_linear(dense, compute_dtype=dtype)
    x, w = torch.randn(5, 20), minilora.quantize_nf4(dense.weight)
    expected = minilora.nf4_linear(x, w, dense.bias)
    low = minilora.nf4_linear(x.to(dtype), w, dense.bias).float()
    y = (with_adapter(layer, r=2) if injected else layer)(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, low)
    assert torch.equal(y, expected) == (dtype == torch.float32)


def test_repr_says_what_a_layer_is() -> None:
    quantized = NF4Linear.from_linear(random_linear(64, 128))
    text = repr(quantized)
    assert text.startswith("NF4Linear(128, 64, bias=True, nf4, ")
    assert f"{8 * quantized.weight.nbytes / (64 * 128):.3f} bits" in text
    assert "LoRA(r=4, alpha=8, dropout=0)" in repr(QLoRALinear(quantized, r=4))


def test_a_quantized_layer_has_a_matrix_for_a_weight() -> None:
    with pytest.raises(ValueError, match="two dimensions"):
        NF4Linear(minilora.quantize_nf4(torch.ones(2, 3, 4)))


@pytest.mark.parametrize("replaced", ["A", "B"])
def test_a_factor_that_is_no_parameter_any_more_takes_part(replaced: str) -> None:
    """Sharding and weight normalization put a plain tensor in the parameter's place."""
    layer = QLoRALinear(NF4Linear.from_linear(random_linear(32, 64)), r=4)
    adapter, x = layer.adapters["default"], torch.ones(2, 64, dtype=torch.float64)
    torch.nn.init.ones_(adapter.B)
    factor = 2 * getattr(adapter, replaced).detach()
    with torch.no_grad():
        layer.active = ()
        base = layer(x)
        layer.active = ("default",)
        update = layer(x) - base
        delattr(adapter, replaced)
        setattr(adapter, replaced, factor)
        torch.testing.assert_close(layer(x) - base, 2 * update)
