"""Several adapters on one model: use switches, eject takes one out, the others are untouched."""

import pytest
import torch
from helpers import adapters_of, randomize
from mlps import small_mlp
from torch import Tensor, nn

import minilora
from minilora.targets import adapter_names

both_kinds = pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])

RANK = {"french": 4, "german": 2}
SEED = {"french": 1, "german": 2}


def add(model: nn.Module, name: str) -> nn.Module:
    """Injects an adapter and gives B the values that belong to its name."""
    minilora.inject(model, r=RANK[name], name=name, seed=SEED[name])
    return randomize(model, name, SEED[name])


def with_both(quantized: bool) -> nn.Module:
    return add(add(small_mlp(quantized=quantized), "french"), "german")


def outputs_alone(name: str, quantized: bool, x: Tensor) -> Tensor:
    y: Tensor = add(small_mlp(quantized=quantized), name)(x)
    return y


@both_kinds
def test_the_active_adapter_computes_what_it_computes_alone(quantized: bool) -> None:
    model, x = with_both(quantized), torch.randn(5, 20)
    french, german = (outputs_alone(name, quantized, x) for name in ("french", "german"))
    assert not torch.equal(french, german)
    assert torch.equal(model(x), german), "the adapter injected last is the active one"

    for _ in range(2):
        assert torch.equal(minilora.use(model, "french")(x), french)
        assert torch.equal(minilora.use(model, "german")(x), german)


@both_kinds
@pytest.mark.parametrize(("name", "other"), [("french", "german"), ("german", "french")])
def test_ejecting_one_adapter_leaves_the_other_as_it_was(
    name: str, other: str, quantized: bool
) -> None:
    model, x = minilora.use(with_both(quantized), other), torch.randn(5, 20)
    minilora.eject(model, name)
    assert adapter_names(model) == [other]
    assert torch.equal(model(x), outputs_alone(other, quantized, x))

    base = small_mlp(quantized=quantized)
    assert torch.equal(minilora.eject(model, other)(x), base(x))
    assert adapter_names(model) == []


@both_kinds
def test_ejecting_the_active_adapter_activates_no_other(quantized: bool) -> None:
    model, x = with_both(quantized), torch.randn(5, 20)
    minilora.eject(model, "german")
    assert torch.equal(model(x), small_mlp(quantized=quantized)(x))
    assert torch.equal(minilora.use(model, "french")(x), outputs_alone("french", quantized, x))


@both_kinds
def test_eject_without_a_name_takes_all_out(quantized: bool) -> None:
    model, base = with_both(quantized), small_mlp(quantized=quantized)
    assert minilora.eject(model) is model
    assert list(model.state_dict()) == list(base.state_dict())


@both_kinds
def test_without_a_name_use_leaves_the_base_alone(quantized: bool) -> None:
    model, x = with_both(quantized), torch.randn(5, 20)
    assert torch.equal(minilora.use(model)(x), small_mlp(quantized=quantized)(x))
    assert minilora.adapter_parameters(model) == []


def test_two_active_adapters_are_summed() -> None:
    model, x = nn.Sequential(nn.Linear(20, 12)), torch.randn(5, 20)
    base = model(x)
    add(add(model, "french"), "german")
    minilora.use(model, "french", "german")
    updates = [adapters_of(model, name)["0"](x) for name in ("french", "german")]
    assert torch.equal(model(x), base + updates[0] + updates[1])


@pytest.mark.parametrize("names", [("french",), ("german",), ("french", "german")])
def test_active_adapters_are_trained_and_no_others(names: tuple[str, ...]) -> None:
    model = minilora.use(with_both(quantized=False), *names)
    expected = [p for name in names for p in minilora.adapter_parameters(model, name)]
    found = minilora.adapter_parameters(model)
    assert {id(p) for p in found} == {id(p) for p in expected}

    model(torch.randn(5, 20)).square().sum().backward()
    assert minilora.audit(model) == []
    assert all(p.grad is not None for p in found)
