"""quantize edits a model in place: layer by layer, and not at all where it is refused.

Each dense weight is freed before the next layer is quantized.
"""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import snapshot
from torch import nn

import minilora
from minilora.surgery import quantize_steps


def small() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"up": nn.Linear(20, 24), "norm": nn.LayerNorm(24), "down": nn.Linear(24, 12, bias=False)}
    )


def test_quantize_frees_each_dense_weight_before_it_makes_the_next() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    dense = [weakref.ref(layer.weight) for layer in model]
    for done, total in quantize_steps(model):
        assert total == 4
        assert [ref() is None for ref in dense] == [i < done for i in range(4)]
    assert all(type(layer) is minilora.NF4Linear for layer in model)


def test_quantize_returns_the_model_and_passes_its_options_on() -> None:
    model = small()
    down = model["down"]
    options = {"block_size": 32, "double_quant": False, "compute_dtype": torch.bfloat16}
    assert minilora.quantize(model, ["up"], **options) is model
    assert model["down"] is down
    w = model["up"].weight
    assert (w.block_size, w.absmax2, model["up"].compute_dtype) == (32, None, torch.bfloat16)


@pytest.mark.parametrize("train", [True, False])
def test_a_quantized_layer_keeps_bias_mode_and_values(train: bool) -> None:
    model = small().train(train)
    bias, weight = model["up"].bias, model["up"].weight.detach().clone()
    minilora.quantize(model)
    assert model["up"].bias is bias
    assert bias.requires_grad
    assert model["up"].training == train
    assert torch.equal(model["up"].weight.dequantize(), minilora.quantize_nf4(weight).dequantize())


def tied(model: nn.ModuleDict) -> None:
    model["head"] = nn.Linear(20, 24, bias=False)
    model["head"].weight = model["up"].weight


def embedded(model: nn.ModuleDict) -> None:
    model["embed"] = nn.Embedding(12, 24)
    model["embed"].weight = model["down"].weight


def nan(model: nn.ModuleDict) -> None:
    model["down"].weight.data[3, 5] = torch.nan


def infinite(model: nn.ModuleDict) -> None:
    model["down"].weight.data[3, 5] = -torch.inf


def meta(model: nn.ModuleDict) -> None:
    model["down"] = nn.Linear(24, 12, device="meta")


def attention(model: nn.ModuleDict) -> None:
    model["attention"] = nn.MultiheadAttention(8, 2)


def adapted(model: nn.ModuleDict) -> None:
    minilora.inject(model, r=2, targets="down")


def quantized(model: nn.ModuleDict) -> None:
    minilora.quantize(model, "down")


Spoil = Callable[[nn.ModuleDict], None]

# What is done to the model first, the error and its message.
UNFIT: dict[str, tuple[Spoil, type[Exception], str]] = {
    "tied to a linear layer": (
        tied,
        ValueError,
        r"^up shares its weight.*head\.weight.*exclude",
    ),
    "NaN": (nan, ValueError, r"^down\.weight holds NaN"),
    "infinity": (infinite, ValueError, r"^down\.weight holds NaN or infinity"),
    "meta": (meta, ValueError, r"^down\.weight is on the meta device"),
    "attention": (
        attention,
        TypeError,
        r"^attention\.out_proj is part of nn\.Multi.*exclude=\('out_proj',\)",
    ),
    "adapter": (adapted, ValueError, "^down has an adapter: quantize"),
    "quantized already": (quantized, ValueError, "^down is quantized already"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_refused_quantize_names_the_layer_and_leaves_the_model_as_it_was(case: str) -> None:
    spoil, error, message = UNFIT[case]
    model = small()
    spoil(model)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        minilora.quantize(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": "dowm"}, "'dowm' matches no linear layer.*'down'"),
        ({"block_size": 48}, "block_size=48"),
        ({"quant_type": "nf3"}, "quant_type='nf3'"),
    ],
)
def test_a_wrong_argument_is_refused_and_leaves_the_model_as_it_was(
    arguments: dict[str, Any], message: str
) -> None:
    model = small()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        minilora.quantize(model, **arguments)
    assert snapshot(model) == before


def test_what_is_refused_can_be_left_out() -> None:
    model = small()
    tied(model)
    assert type(minilora.quantize(model, exclude=["up", "head"])["down"]) is minilora.NF4Linear
    assert model["up"].weight is model["head"].weight


def test_a_layer_tied_to_an_embedding_is_quantized_only_by_name_and_then_refused() -> None:
    model = small()
    embedded(model)
    with pytest.raises(ValueError, match=r"^down shares its weight.*embed\.weight.*exclude"):
        minilora.quantize(model, ["up", "down"])
    assert type(minilora.quantize(model)["up"]) is minilora.NF4Linear
    assert model["down"].weight is model["embed"].weight
