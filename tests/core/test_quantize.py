"""quantize edits a model in place: layer by layer, freeing as it goes, and not at all where it is refused."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import minilora
from minilora.surgery import quantize_steps


def small() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"up": nn.Linear(20, 24), "norm": nn.LayerNorm(24), "down": nn.Linear(24, 12, bias=False)}
    )


def snapshot(model: nn.Module) -> list[Any]:
    """Modules by identity, parameters by identity, value and requires_grad."""
    modules = [(n, id(m), type(m), m.training) for n, m in model.named_modules()]
    parameters = [
        (n, id(p), p.requires_grad, p._version)
        for n, p in model.named_parameters(remove_duplicate=False)
    ]
    return [modules, parameters, list(model.state_dict())]


def test_quantize_frees_each_dense_weight_before_it_makes_the_next() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    dense = [weakref.ref(layer.weight) for layer in model]
    for done, total in quantize_steps(model):
        assert total == 4
        assert [ref() is None for ref in dense] == [i < done for i in range(4)]
    assert all(type(layer) is minilora.NF4Linear for layer in model)


def test_quantize_returns_the_model_and_passes_its_options_on() -> None:
    model = small()
    kept = model["down"]
    got = minilora.quantize(
        model, ["up"], block_size=32, double_quant=False, compute_dtype=torch.bfloat16
    )
    w = model["up"].weight
    assert got is model and model["down"] is kept
    assert (w.block_size, w.absmax2, model["up"].compute_dtype) == (32, None, torch.bfloat16)


@pytest.mark.parametrize("train", [True, False])
def test_a_quantized_layer_keeps_bias_mode_and_values(train: bool) -> None:
    model = small().train(train)
    bias, weight = model["up"].bias, model["up"].weight.detach().clone()
    minilora.quantize(model)
    assert model["up"].bias is bias and bias.requires_grad
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


Spoil = Callable[[nn.ModuleDict], Any]
REFUSED: dict[str, tuple[Spoil, dict[str, Any], type[Exception], str]] = {
    "tied to a linear layer": (
        tied,
        {},
        ValueError,
        r"^up shares its weight.*head\.weight.*exclude",
    ),
    "tied to an embedding": (
        embedded,
        {},
        ValueError,
        r"^down shares its weight.*embed\.weight.*exclude",
    ),
    "NaN": (nan, {}, ValueError, r"^down\.weight holds NaN"),
    "infinity": (infinite, {}, ValueError, r"^down\.weight holds NaN or infinity"),
    "meta": (meta, {}, ValueError, r"^down is on the meta device"),
    "attention": (
        attention,
        {},
        TypeError,
        r"^attention\.out_proj: nn\.MultiheadAttention.*exclude=\('out_proj',\)",
    ),
    "adapter": (
        lambda m: minilora.inject(m, r=2, targets="down"),
        {},
        ValueError,
        "^down has an adapter: quantize",
    ),
    "quantized already": (
        lambda m: minilora.quantize(m, "down"),
        {},
        ValueError,
        "^down is quantized already",
    ),
    "hook": (
        lambda m: m["down"].register_forward_hook(lambda *_: None),
        {},
        TypeError,
        r"^down \(Linear\) has hooks",
    ),
    "no such target": (
        lambda m: None,
        {"targets": "dowm"},
        ValueError,
        "'dowm' matches no linear layer.*'down'",
    ),
    "block size": (lambda m: None, {"block_size": 48}, ValueError, "block_size=48"),
    "quant type": (lambda m: None, {"quant_type": "fp4"}, ValueError, "quant_type='fp4'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_quantize_names_the_layer_and_leaves_the_model_as_it_was(case: str) -> None:
    spoil, arguments, error, message = REFUSED[case]
    model = small()
    spoil(model)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        minilora.quantize(model, **arguments)
    assert snapshot(model) == before


def test_what_is_refused_can_be_left_out() -> None:
    model = small()
    embedded(model)
    assert type(minilora.quantize(model, exclude=["down"])["up"]) is minilora.NF4Linear
    assert model["down"].weight is model["embed"].weight
