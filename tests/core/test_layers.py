"""The two layers: what LoRALinear and NF4Linear hold, how they start, and that every copy, cast and save keeps a weight's bits."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minilora
from minilora import LoRALinear, NF4Linear, NF4Weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (out, in, block size): whole blocks, short last blocks, blocks that cross rows, less than one block
shapes = st.tuples(st.integers(1, 37), st.integers(1, 70), st.sampled_from([32, 64, 128]))


def linear(
    o: int = 12, i: int = 20, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Linear:
    layer = nn.Linear(i, o, bias=bias, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return layer


def bits(layer: Any) -> list[Tensor]:
    """A quantized weight as bytes."""
    return [t.reshape(-1).view(torch.uint8).clone() for t in layer.weight.tensors if t is not None]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


# ---- LoRALinear


@pytest.mark.parametrize("r", [1, 5, 16])
def test_a_is_gaussian_with_std_one_over_r_and_b_is_zero(r: int) -> None:
    layer = LoRALinear(nn.Linear(20_000, 24), r=r, name="x")
    a = layer.lora_A.detach().double() * r
    n = a.numel()
    # five standard errors: of the mean 1/sqrt(n), of the standard deviation 1/sqrt(2n), of the kurtosis sqrt(24/n)
    assert abs(a.mean()) < 5 / math.sqrt(n)
    assert abs(a.std() - 1) < 5 / math.sqrt(2 * n)
    assert abs((a**4).mean() / (a**2).mean() ** 2 - 3) < 5 * math.sqrt(24 / n)
    assert layer.lora_A.shape == (r, 20_000) and layer.lora_B.shape == (24, r)
    assert not layer.lora_B.any()


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_are_float32_whatever_the_base_and_the_default(
    dtype: torch.dtype, default: torch.dtype
) -> None:
    base = linear(dtype=dtype)
    reference = LoRALinear(copy.deepcopy(base), r=4, name="x").lora_A
    torch.set_default_dtype(default)  # as transformers does while it loads
    try:
        layers = (
            LoRALinear(copy.deepcopy(base), r=4, name="x"),
            LoRALinear(NF4Linear.from_linear(base), r=4, name="x"),
        )
    finally:
        torch.set_default_dtype(torch.float32)
    for layer in layers:
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
        assert torch.equal(layer.lora_A, reference)


def test_a_depends_on_name_and_seed_and_on_nothing_else() -> None:
    def drawn(name: str = "a.b", seed: int = 0) -> Tensor:
        return LoRALinear(linear(), r=4, name=name, seed=seed).lora_A.detach()

    first = drawn()
    torch.manual_seed(123)
    torch.randn(77)
    assert torch.equal(drawn(), first)
    others = [drawn("a.c"), drawn(seed=1), drawn(seed=2**32), drawn("a.c", seed=1)]
    for i, other in enumerate(others):
        assert not any(torch.equal(other, t) for t in [first, *others[:i]])


def test_drawing_an_adapter_leaves_the_global_generator_alone() -> None:
    base = linear()
    state = torch.get_rng_state()
    LoRALinear(base, r=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_does_not_depend_on_what_else_is_injected_or_in_which_order() -> None:
    def model(*names: str) -> nn.ModuleDict:
        return nn.ModuleDict({n: linear() for n in names})

    one = minilora.inject(model("q", "k", "v"), r=4)
    other = minilora.inject(model("v", "x", "q"), r=4, targets=["q", "v"])
    for n in ("q", "v"):
        assert torch.equal(one[n].lora_A, other[n].lora_A)
    assert not torch.equal(one["q"].lora_A, one["v"].lora_A)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_a_wrapped_layer_looks_like_its_base(
    quantized: bool, bias: bool, dtype: torch.dtype
) -> None:
    dense = linear(12, 20, bias, dtype)
    base = NF4Linear.from_linear(dense) if quantized else dense
    weight, old_bias = base.weight, base.bias
    layer = LoRALinear(base, r=3)
    assert (layer.in_features, layer.out_features) == (20, 12)
    assert layer.bias is old_bias and (old_bias is not None) == bias
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device) == (
        (12, 20),
        dtype,
        torch.device("cpu"),
    )
    if quantized:
        assert isinstance(layer.weight, NF4Weight) and torch.equal(
            layer.weight.dequantize(), weight.dequantize()
        )
    else:
        assert layer.weight is weight
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


@pytest.mark.parametrize("quantized", [True, False])
def test_inject_leaves_the_keys_of_the_base_as_they_are(quantized: bool) -> None:
    model = nn.Sequential(linear(16, 20), nn.ReLU(), nn.Sequential(linear(12, 16, bias=False)))
    if quantized:
        minilora.quantize(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    after = minilora.inject(model, r=4).state_dict()
    assert set(after) - set(before) == {f"{n}.lora_{x}" for n in ("0", "2.0") for x in "AB"}
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_dropout_acts_in_training_and_on_the_adapters_path_alone() -> None:
    layer, x = LoRALinear(base := linear(), r=4, dropout=0.5), torch.randn(5, 20)
    dense = nn.functional.linear(x, layer.weight, layer.bias)
    assert base.weight is None, "the base's parameters are the layer's now"
    assert torch.equal(layer(x), dense)
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    layer.dropout = 0.0
    assert torch.equal(layer.train()(x), layer.eval()(x))


# ---- NF4Linear


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_of_a_quantized_layer_is_an_nf4_weight(
    dtype: torch.dtype, double_quant: bool
) -> None:
    dense = linear(12, 21, dtype=dtype).eval()
    layer = NF4Linear.from_linear(dense, block_size=32, double_quant=double_quant)
    expected = minilora.quantize_nf4(dense.weight, 32, double_quant)
    w = layer.weight
    assert isinstance(w, NF4Weight)
    assert (w.dtype, w.shape, w.device, w.block_size) == (dtype, (12, 21), dense.weight.device, 32)
    assert (w.absmax2 is not None) == (w.offset is not None) == double_quant
    assert_same_bits(
        bits(layer), [t.reshape(-1).view(torch.uint8) for t in expected.tensors if t is not None]
    )
    assert layer.bias is dense.bias and not layer.training
    assert not any(p.requires_grad for n, p in layer.named_parameters() if n != "bias")
    assert not any(p.is_floating_point() for n, p in layer.named_parameters() if n != "bias"), (
        "a cast would change it"
    )


@given(shapes, st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=25)
def test_every_copy_cast_and_save_keeps_every_bit(
    shape: tuple[int, int, int], dtype: torch.dtype, double_quant: bool, bias: bool, injected: bool
) -> None:
    o, i, block_size = shape
    layer = NF4Linear.from_linear(
        linear(o, i, bias, dtype), block_size=block_size, double_quant=double_quant
    )
    model = nn.Sequential(layer)
    if injected:
        minilora.inject(model, r=1)
    expected, dense = bits(model[0]), model[0].weight.dequantize()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies: list[Any] = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    copies += [
        copy.deepcopy(model).to(torch.bfloat16),
        copy.deepcopy(model).half(),
        copy.deepcopy(model).float(),
    ]
    copies += [copy.deepcopy(model).half().float().to("cpu", torch.bfloat16)]
    for c in copies:
        assert_same_bits(bits(c[0]), expected)
        assert c[0].weight.dtype == dtype and torch.equal(c[0].weight.dequantize(), dense)
    assert copies[0][0].packed.data_ptr() != model[0].packed.data_ptr()


@given(shapes, st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=25)
def test_a_state_dict_round_trips_strictly(
    shape: tuple[int, int, int], dtype: torch.dtype, double_quant: bool, bias: bool, injected: bool
) -> None:
    o, i, block_size = shape

    def make(seed: int) -> nn.Sequential:
        base = linear(o, i, bias, dtype, seed)
        model = nn.Sequential(
            NF4Linear.from_linear(base, block_size=block_size, double_quant=double_quant)
        )
        return minilora.inject(model, r=1, seed=seed) if injected else model

    one, other = make(1), make(2)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_same_bits(bits(other[0]), bits(one[0]))
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert torch.equal(other(torch.ones(1, i, dtype=dtype)), one(torch.ones(1, i, dtype=dtype)))


@pytest.mark.parametrize("injected", [True, False])
@pytest.mark.parametrize(
    ("o", "i", "dtype", "block_size", "names"),
    [
        (20, 12, torch.float32, 64, ["[20, 12]", "[12, 20]"]),  # as many bytes
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

    state = model(linear(o, i, False, dtype), block_size).state_dict()
    with pytest.raises(RuntimeError, match=r"up\.nf4_layout") as error:
        model(linear(12, 20, False), 64).load_state_dict(state)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("injected", [True, False])
def test_compute_dtype_is_the_products_and_not_the_outputs(
    injected: bool, dtype: torch.dtype
) -> None:
    dense = linear(12, 20)
    layer: nn.Module = NF4Linear.from_linear(dense, compute_dtype=dtype)
    expected = minilora.nf4_linear(
        x := torch.randn(5, 20), minilora.quantize_nf4(dense.weight), dense.bias
    )
    low = minilora.nf4_linear(x.to(dtype), minilora.quantize_nf4(dense.weight), dense.bias).float()
    y = (LoRALinear(layer, r=2) if injected else layer)(x)
    assert y.dtype == torch.float32 and torch.equal(y, low)
    assert torch.equal(y, expected) == (dtype == torch.float32)


def test_repr_says_what_a_layer_is() -> None:
    quantized = NF4Linear.from_linear(linear(64, 128))
    text = repr(quantized)
    assert text.startswith("NF4Linear(128, 64, bias=True, nf4, ")
    assert f"{8 * quantized.weight.nbytes / (64 * 128):.3f} bits" in text
    assert (
        repr(LoRALinear(quantized, r=4)) == "LoRALinear(128, 64, base=nf4, r=4, alpha=8, dropout=0)"
    )
    dense = LoRALinear(linear(12, 20, dtype=torch.bfloat16), r=4, alpha=2.5, dropout=0.1)
    assert repr(dense) == "LoRALinear(20, 12, base=bfloat16, r=4, alpha=2.5, dropout=0.1)"


def test_a_quantized_layer_has_a_matrix_for_a_weight() -> None:
    with pytest.raises(ValueError, match="two dimensions"):
        NF4Linear(minilora.quantize_nf4(torch.ones(2, 3, 4)))
