"""Which layers a call means: names, dotted ends, patterns, callables and exclusions.

And what is said when nothing matches.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import minilora
from minilora.targets import adapted_layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "out": nn.Linear(8, 8)})
        layers = {"up": nn.Linear(8, 12), "out": nn.Linear(12, 8), "norm": nn.LayerNorm(8)}
        self.mlp = nn.ModuleDict(layers)


class Model(nn.Module):
    """Two blocks, a head; the head named as transformers names it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(8, 10)


BLOCK = {"attention.q_proj", "attention.out", "mlp.up", "mlp.out"}
EVERY = {f"layers.{i}.{n}" for i in (0, 1) for n in BLOCK}


def both(*names: str) -> set[str]:
    return {f"layers.{i}.{n}" for i in (0, 1) for n in names}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, EVERY),
        ({"targets": "all-linear", "exclude": ()}, EVERY),
        ({"targets": "q_proj"}, both("attention.q_proj")),
        ({"targets": ["q_proj", "up"]}, both("attention.q_proj", "mlp.up")),
        ({"targets": "out"}, both("attention.out", "mlp.out")),
        ({"targets": "mlp.out"}, both("mlp.out")),
        ({"targets": ["1.mlp.out"]}, {"layers.1.mlp.out"}),
        ({"targets": "layers.0.mlp.up"}, {"layers.0.mlp.up"}),
        (
            {"targets": re.compile(r"layers\.1\..*p")},
            {"layers.1.attention.q_proj", "layers.1.mlp.up", "layers.1.mlp.out"},
        ),
        ({"targets": re.compile("head$")}, {"lm_head"}),
        ({"targets": lambda name, module: module.out_features == 12}, both("mlp.up")),
        (
            {"targets": lambda name, module: name.startswith("layers.0"), "exclude": "out"},
            {"layers.0.attention.q_proj", "layers.0.mlp.up"},
        ),
        ({"targets": "out", "exclude": ["mlp.out"]}, both("attention.out")),
        ({"exclude": ("q_proj", "out", "lm_head")}, both("mlp.up")),
        (
            {"exclude": re.compile(r"s\.0|p$")},
            {"layers.1.attention.q_proj"} & EVERY | {"layers.1.attention.out", "layers.1.mlp.out"},
        ),
        ({"exclude": lambda name, module: module.out_features == 12}, EVERY - both("mlp.up")),
        # "all-linear" leaves the head out: whoever names it means it.
        ({"targets": "lm_head"}, {"lm_head"}),
        ({"targets": ["up", "lm_head"]}, both("mlp.up") | {"lm_head"}),
        ({"targets": lambda name, module: True}, EVERY | {"lm_head"}),
        ({"targets": ["up", "lm_head"], "exclude": ["lm_head"]}, both("mlp.up")),
    ],
)
def test_targets_mean_these_layers(arguments: dict[str, Any], expected: set[str]) -> None:
    model = Model()
    minilora.inject(model, r=2, **arguments)
    assert set(adapted_layers(model)) == expected
    quantized = minilora.quantize(Model(), **arguments)
    modules = quantized.named_modules()
    assert {n for n, m in modules if isinstance(m, minilora.NF4Linear)} == expected


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            {"targets": "q_porj"},
            ["target 'q_porj' matches no linear layer of Model", "Did you mean 'q_proj'"],
        ),
        (
            {"targets": ["up", "dwn", "qproj"]},
            ["'dwn' matches no", "'qproj' matches no", "'q_proj'"],
        ),
        ({"targets": "self.out"}, ["'self.out' matches no"]),
        # The end of a part is no dotted end.
        ({"targets": "proj"}, ["'proj' matches no", "q_proj"]),
        (
            {"targets": "embed"},
            ["'embed' matches no linear layer", "'embed' is a Embedding, not an nn.Linear"],
        ),
        ({"targets": "mlp"}, ["'mlp' matches no linear layer", "'layers.0.mlp' is a ModuleDict"]),
        ({"targets": "norm"}, ["'layers.0.mlp.norm' is a LayerNorm"]),
        ({"targets": []}, ["'[]' matches no linear layer"]),
        ({"targets": ""}, ["'' matches no linear layer"]),
        ({"targets": re.compile("gate")}, ["gate", "matches no linear layer"]),
        ({"targets": lambda name, module: False}, ["matches no linear layer"]),
        ({"targets": "up", "exclude": ["up"]}, ["'up' matches no linear layer", "exclude=['up']"]),
        (
            {"targets": "up", "exclude": ["out", "q_porj"]},
            ["exclude 'q_porj' matches no", "'q_proj'"],
        ),
    ],
)
@pytest.mark.parametrize("call", [minilora.inject, minilora.quantize])
def test_a_target_that_matches_nothing_says_what_there_is(
    call: Any, arguments: dict[str, Any], messages: list[str]
) -> None:
    model = Model()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="matches no linear layer") as error:
        call(model, **arguments)
    there = "Linear layers in the model: out (4), q_proj (2), up (2), lm_head (1)"
    for message in [*messages, there]:
        assert message in str(error.value)
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "none": lambda layer: layer,
    "compiled": lambda layer: torch.compile(layer, backend="eager"),
    "data parallel": nn.DataParallel,
    "checkpointed": checkpoint_wrapper,
    "compiled data parallel": lambda layer: torch.compile(nn.DataParallel(layer), backend="eager"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("call", [minilora.inject, minilora.quantize])
def test_a_model_that_is_one_linear_layer_has_no_place_for_an_adapter(
    call: Any, wrapper: str
) -> None:
    model = WRAPPERS[wrapper](nn.Linear(8, 8))
    with pytest.raises(ValueError, match="the model is itself a Linear: make a LoRALinear"):
        call(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_that_is_called_as_in_a_wrapper_is_a_layer_of_its_model() -> None:
    for names in (["module"], ["_orig_mod", "up"]):
        model = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
        assert list(adapted_layers(minilora.inject(model, r=2))) == names


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear layers in the model: none"):
        minilora.inject(nn.Sequential(nn.LayerNorm(3)), r=1)


@pytest.mark.parametrize("call", [minilora.inject, minilora.quantize])
def test_a_regular_expression_is_not_taken_for_a_name_without_a_word(call: Any) -> None:
    with pytest.raises(ValueError, match=r"for a regular expression, pass re\.compile\(\.\.\.\)"):
        call(Model(), targets=r".*\.up")
    with pytest.raises(TypeError, match="a list holds names; a compiled regular expression"):
        call(Model(), targets=[re.compile("up")])
    with pytest.raises(ValueError, match=r"exclude .*q_porj.* matches no linear layer"):
        call(Model(), exclude=re.compile("q_porj"))
