"""Ranks, alphas and blocks that differ from layer to layer; a bias of B; models without values."""

import re
from typing import Any

import pytest
import torch
from helpers import adapters_of
from torch import nn

import minilora
from minilora.lora import LoRA, LoRALinear


def block() -> nn.Module:
    return nn.ModuleDict({"q": nn.Linear(16, 16), "k": nn.Linear(16, 16), "up": nn.Linear(16, 24)})


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList([block(), block(), block()])})


def ranks(model: nn.Module) -> dict[str, int]:
    return {name.removeprefix("layers."): adapter.r for name, adapter in adapters_of(model).items()}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"q": 2}, {"0.q": 2, "1.q": 2, "2.q": 2}),
        ({"layers.1.q": 2}, {"1.q": 2}),
        ({"1.q": 3, "q": 2}, {"0.q": 2, "1.q": 3, "2.q": 2}),
        ({"q": 2, "1.q": 3}, {"0.q": 2, "1.q": 2, "2.q": 2}),
        ({re.compile(r"\.[02]\.(q|k)"): 5}, {"0.q": 5, "0.k": 5, "2.q": 5, "2.k": 5}),
    ],
)
def test_rank_and_alpha_patterns_take_the_first_match(
    patterns: dict[Any, int], expected: dict[str, int]
) -> None:
    usual = {f"{i}.{name}": 4 for i in range(3) for name in ("q", "k", "up")}
    injected = minilora.inject(model(), r=4, rank_pattern=patterns)
    assert ranks(injected) == usual | expected
    assert all(a.alpha == 2 * a.r for a in adapters_of(injected).values())

    injected = minilora.inject(model(), r=4, alpha_pattern=patterns)
    assert ranks(injected) == usual
    alphas = {n.removeprefix("layers."): a.alpha for n, a in adapters_of(injected).items()}
    assert alphas == dict.fromkeys(usual, 8.0) | expected


def test_layers_to_transform_chooses_blocks() -> None:
    assert {n[0] for n in ranks(minilora.inject(model(), layers_to_transform=1))} == {"1"}
    chosen = ranks(minilora.inject(model(), targets="q", layers_to_transform=[2, 0]))
    assert set(chosen) == {"0.q", "2.q"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a rank for nothing": ({"rank_pattern": {"qq": 2}}, "rank_pattern: 'qq' matches no .*'q'"),
    "an alpha for a layer that is left out": (
        {"targets": "q", "alpha_pattern": {"up": 2}},
        "alpha_pattern: 'up' matches no layer with an adapter",
    ),
    "a rank of zero": ({"rank_pattern": {"q": 0}}, r"layers\.0\.q: r=0"),
    "no block": ({"layers_to_transform": []}, r"layers_to_transform=\[\] means no layer"),
    "no such block": ({"layers_to_transform": [1, 3]}, "no block 3; the layers are from 0 to 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_option_names_itself_and_leaves_the_model_as_it_was(case: str) -> None:
    options, message = REFUSED[case]
    fresh = model()
    keys = list(fresh.state_dict())
    with pytest.raises(ValueError, match=message):
        minilora.inject(fresh, r=2, **options)
    assert list(fresh.state_dict()) == keys


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_no_dict_is_refused(option: str) -> None:
    with pytest.raises(TypeError, match=f"^{option}=.* it is a dict"):
        minilora.inject(model(), **{option: [("q", 2)]})


@pytest.mark.parametrize("name", ["training", "forward", "a.b", ""])
def test_a_name_that_a_module_has_already_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be an adapter's name"):
        minilora.inject(model(), name=name)


def test_blocks_of_a_model_that_has_none() -> None:
    with pytest.raises(ValueError, match="no block 0; the layers are without blocks"):
        minilora.inject(nn.ModuleDict({"q": nn.Linear(8, 8)}), layers_to_transform=0)


def test_a_rank_above_the_layers_is_allowed_with_one_warning() -> None:
    small = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2), nn.Linear(2, 3))
    message = r"^r=4 is above .* update of 1 can have, .* = \[2, 16\], and of 1 more layers"
    with pytest.warns(UserWarning, match=message) as caught:
        minilora.inject(small, r=4)
    assert len(caught) == 1 and caught[0].filename == __file__
    adapter = adapters_of(small)["1"]
    assert adapter.A.shape == (4, 16) and adapter.B.shape == (2, 4)
    nn.init.normal_(adapter.B)
    expected = small(torch.ones(3, 16))
    assert torch.allclose(minilora.merge(small)(torch.ones(3, 16)), expected, atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_bias_of_b_is_trained_and_merged(quantized: bool) -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    if quantized:
        minilora.quantize(net)
    x = torch.randn(3, 16)
    base = net(x)
    minilora.inject(net, r=2, lora_bias=True)
    assert torch.equal(net(x), base)
    adapter = adapters_of(net)["2"]
    assert set(adapter.tensors()) == {"lora_A.weight", "lora_B.weight", "lora_B.bias"}
    nn.init.normal_(adapter.bias)
    assert torch.allclose(net(x), base + adapter.scale * adapter.bias, atol=1e-5)
    net(x).square().sum().backward()
    assert adapter.bias.grad is not None and bool(adapter.bias.grad.any())

    expected = net(x)
    minilora.merge(net)
    assert torch.allclose(net(x), expected, atol=1e-5)


def test_a_bias_of_b_needs_a_bias_to_be_merged_into() -> None:
    net = minilora.inject(nn.Sequential(nn.Linear(8, 8, bias=False)), r=2, lora_bias=True)
    with pytest.raises(ValueError, match=r"^0 has no bias, to which that of its adapter"):
        minilora.merge(net)
    assert isinstance(net[0], LoRALinear)


def test_reset_parameters_draws_the_same_adapter_again() -> None:
    fresh = LoRA(16, 8, r=2, bias=True, layer_name="up")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(16, 8))
    minilora.inject(empty, r=2)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    empty.to_empty(device="cpu")
    adapter = adapters_of(empty)["0"]
    adapter.reset_parameters()
    assert torch.equal(adapter.A, LoRA(16, 8, r=2, layer_name="0").A)
    assert not adapter.B.any()

    nn.init.normal_(fresh.B)
    nn.init.normal_(fresh.bias)
    fresh.reset_parameters()
    assert not fresh.B.any() and not fresh.bias.any()


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_on_the_meta_device_has_a_forward_and_a_backward(quantized: bool) -> None:
    net: Any = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    if quantized:
        minilora.quantize(net)
    net = minilora.inject(net.to("meta"), r=2)
    y = net(torch.empty(3, 5, 16, device="meta", requires_grad=True))
    assert y.shape == (3, 5, 8) and y.is_meta
    y.sum().backward()
    assert adapters_of(net)["0"].A.grad.shape == (2, 16)


def test_a_second_merge_changes_nothing() -> None:
    net = minilora.inject(nn.Sequential(nn.Linear(8, 8)), r=2)
    nn.init.normal_(adapters_of(net)["0"].B)
    weight = minilora.merge(net)[0].weight.detach().clone()
    assert torch.equal(minilora.merge(net)[0].weight, weight)
    with pytest.raises(ValueError, match="the model has no adapter"):
        minilora.merge(minilora.eject(minilora.inject(nn.Sequential(nn.Linear(8, 8)), r=2)))
