"""LoRA and LoRALinear: how an adapter starts, what a layer with one looks like, what is refused."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linears import random_linear, with_adapter
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import minilora
from minilora import LoRA, LoRALinear, NF4Linear, NF4Weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def adapter_of(layer: Any) -> LoRA:
    adapter: LoRA = layer.adapters["default"]
    return adapter


@pytest.mark.parametrize("r", [1, 5, 16])
def test_a_is_gaussian_with_std_one_over_r_and_b_is_zero(r: int) -> None:
    adapter = LoRA(20_000, 24, r=r, layer_name="x")
    assert adapter.A.shape == (r, 20_000)
    assert adapter.B.shape == (24, r)
    assert not adapter.B.any()

    a = adapter.A.detach().double() * r
    n = a.numel()
    # Five standard errors: of the mean 1/sqrt(n), of the standard deviation 1/sqrt(2n), of the
    # kurtosis sqrt(24/n).
    assert abs(a.mean()) < 5 / math.sqrt(n)
    assert abs(a.std() - 1) < 5 / math.sqrt(2 * n)
    assert abs((a**4).mean() / (a**2).mean() ** 2 - 3) < 5 * math.sqrt(24 / n)


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_are_float32_whatever_the_base_and_the_default(
    dtype: torch.dtype, default: torch.dtype
) -> None:
    base = random_linear(dtype=dtype)
    bases = copy.deepcopy(base), NF4Linear.from_linear(base)
    expected = adapter_of(with_adapter(copy.deepcopy(base), r=4, layer_name="x")).A

    # As transformers does while it loads.
    torch.set_default_dtype(default)
    try:
        adapters = [adapter_of(with_adapter(base, r=4, layer_name="x")) for base in bases]
    finally:
        torch.set_default_dtype(torch.float32)
    for adapter in adapters:
        assert adapter.A.dtype == adapter.B.dtype == torch.float32
        assert torch.equal(adapter.A, expected)


def test_a_depends_on_name_and_seed_and_on_nothing_else() -> None:
    def drawn(name: str = "a.b", seed: int = 0) -> Tensor:
        return LoRA(20, 12, r=4, layer_name=name, seed=seed).A.detach()

    first = drawn()
    torch.manual_seed(123)
    torch.randn(77)
    assert torch.equal(drawn(), first)

    others = [drawn("a.c"), drawn(seed=1), drawn(seed=2**32), drawn("a.c", seed=1)]
    for i, other in enumerate(others):
        assert not any(torch.equal(other, t) for t in [first, *others[:i]])


def test_drawing_an_adapter_leaves_the_global_generator_alone() -> None:
    base = random_linear()
    state = torch.get_rng_state()
    LoRALinear(base, r=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_does_not_depend_on_what_else_is_injected_or_in_which_order() -> None:
    def model(*names: str) -> nn.ModuleDict:
        return nn.ModuleDict({n: random_linear() for n in names})

    one = minilora.inject(model("q", "k", "v"), r=4)
    other = minilora.inject(model("v", "x", "q"), r=4, targets=["q", "v"])
    for n in ("q", "v"):
        assert torch.equal(adapter_of(one[n]).A, adapter_of(other[n]).A)
    assert not torch.equal(adapter_of(one["q"]).A, adapter_of(one["v"]).A)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_a_layer_with_an_adapter_looks_like_its_base(
    quantized: bool, bias: bool, dtype: torch.dtype
) -> None:
    dense = random_linear(12, 20, bias, dtype)
    base = NF4Linear.from_linear(dense) if quantized else dense
    layer = with_adapter(base, r=3)
    assert (layer.in_features, layer.out_features) == (20, 12)
    assert layer.bias is base.bias
    assert (base.bias is not None) == bias

    weight = layer.weight
    assert (weight.shape, weight.dtype) == ((12, 20), dtype)
    assert weight.device == torch.device("cpu")
    if quantized:
        assert isinstance(weight, NF4Weight)
        assert torch.equal(weight.dequantize(), base.weight.dequantize())
    else:
        assert weight is base.weight

    trained = [n for n, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["adapters.default.A", "adapters.default.B"]


@pytest.mark.parametrize("quantized", [True, False])
def test_inject_leaves_the_keys_of_the_base_as_they_are(quantized: bool) -> None:
    last = nn.Sequential(random_linear(12, 16, bias=False))
    model = nn.Sequential(random_linear(16, 20), nn.ReLU(), last)
    if quantized:
        minilora.quantize(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    after = minilora.inject(model, r=4).state_dict()
    added = {f"{n}.adapters.default.{x}" for n in ("0", "2.0") for x in "AB"}
    assert set(after) - set(before) == added
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_dropout_acts_in_training_and_on_the_adapters_path_alone() -> None:
    base, x = random_linear(), torch.randn(5, 20)
    layer = LoRALinear(base, r=4, dropout=0.5)
    dense = nn.functional.linear(x, layer.weight, layer.bias)
    assert base.weight is layer.weight
    assert torch.equal(base(x), dense), "the base and the layer share the weight"

    assert torch.equal(layer(x), dense)
    nn.init.normal_(adapter_of(layer).B)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    adapter_of(layer).dropout = 0.0
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_repr_says_what_an_adapter_is() -> None:
    dense = LoRALinear(random_linear(12, 20, dtype=torch.bfloat16), r=4, alpha=2.5, dropout=0.1)
    assert "in_features=20, out_features=12" in repr(dense)
    assert "(default): LoRA(r=4, alpha=2.5, dropout=0.1)" in repr(dense)


class OwnForward(nn.Linear):
    """A subclass whose forward an adapter would replace."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Double(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def patched() -> nn.Linear:
    layer = random_linear()
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def with_parametrized_bias() -> nn.Module:
    return parametrize.register_parametrization(random_linear(), "bias", Double())


def pruned() -> nn.Linear:
    layer = random_linear()
    prune.random_unstructured(layer, "weight", amount=0.5)  # type: ignore[no-untyped-call]
    return layer


UNFIT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "convolution": (lambda: nn.Conv1d(2, 2, 1), "is not a linear layer"),
    "bilinear": (lambda: nn.Bilinear(2, 2, 2), "is not a linear layer"),
    "adapter": (lambda: LoRALinear(random_linear(), r=2), "has an adapter already"),
    "own forward": (lambda: OwnForward(4, 4), "forward of its own"),
    "patched forward": (patched, "forward of its own"),
    "parametrized weight": (lambda: parametrizations.orthogonal(random_linear()), "parametrized"),
    "parametrized bias": (with_parametrized_bias, "parametrized"),
    "weight norm": (lambda: parametrizations.weight_norm(random_linear()), "parametrized"),
    "pruned": (pruned, "parametrized"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_layer_that_cannot_carry_an_adapter_is_refused_by_name(kind: str) -> None:
    make, reason = UNFIT[kind]
    layer = make()
    keys = list(layer.state_dict())
    with pytest.raises(TypeError, match=reason) as error:
        LoRALinear(layer, r=1, layer_name="blocks.3.up")
    assert "blocks.3.up" in str(error.value)
    assert type(layer).__name__ in str(error.value)
    assert list(layer.state_dict()) == keys


OUT_OF_RANGE = [
    *(("r", r) for r in (0, -1, True, 2.0, "8", None)),
    *(("alpha", alpha) for alpha in (0.0, -1.0, math.inf, math.nan, "4")),
    *(("dropout", p) for p in (-0.1, 1.0, 1.5, math.nan)),
]


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(("argument", "value"), OUT_OF_RANGE)
def test_arguments_out_of_range_are_refused_by_name(
    argument: str, value: Any, quantized: bool
) -> None:
    dense = random_linear()
    base = NF4Linear.from_linear(dense) if quantized else dense
    with pytest.raises(ValueError, match=rf"^blocks\.3\.up: {argument}=") as error:
        with_adapter(base, **{"r": 12, "layer_name": "blocks.3.up", argument: value})
    assert str(value) in str(error.value)

    fine = with_adapter(base, r=12, alpha=1e-3, dropout=0.99)
    assert adapter_of(fine).scale == 1e-3 / 12
