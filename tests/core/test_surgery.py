"""inject, eject, disabled and audit: what changes, what does not, and what is trained."""

import pytest
import torch
from helpers import adapters_of, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from mlps import assert_same_state, mlps, randomize_to, small_mlp, state_of
from torch import Tensor, nn

import minilora
from minilora.targets import adapted_layers


@given(mlps(), st.booleans(), st.booleans())
@settings(max_examples=60)
def test_inject_is_the_identity_and_eject_its_inverse_bit_for_bit(
    case: tuple[nn.Sequential, Tensor], train: bool, autocast: bool
) -> None:
    model, x = case
    # Frozen beforehand: torch multiplies a batch with strides in another order when the weight
    # requires a gradient.
    model.train(train).requires_grad_(False)
    layers, state = list(model), state_of(model)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = model(x)
        assert minilora.inject(model, r=1, dropout=0.5) is model
        assert torch.equal(model(x), before)
        changed = randomize(model)(x)
        assert minilora.eject(model) is model
        assert torch.equal(model(x), before)

    assert all(layer is was for layer, was in zip(model, layers, strict=True))
    assert all(layer.training == train for layer in model)
    assert_same_state(model, state)
    assert (changed.shape, changed.dtype) == (before.shape, before.dtype)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_a_trained_adapter_changes_the_output_in_train_and_eval(
    train: bool, quantized: bool
) -> None:
    model = minilora.inject(small_mlp(quantized=quantized).train(train), r=4)
    x = torch.randn(5, 20)
    before = model(x)
    for name in adapted_layers(model):
        randomize_to(model, 0.0)
        randomize(model.get_submodule(name))
        assert not torch.allclose(model(x), before, atol=1e-2), name
    assert all(layer.training == train for layer in adapted_layers(model).values())


@pytest.mark.parametrize("quantized", [True, False])
def test_training_moves_the_adapter_and_nothing_else(quantized: bool) -> None:
    model = small_mlp(quantized=quantized)
    state = state_of(model)
    minilora.inject(model, r=4)
    optimizer = torch.optim.AdamW(minilora.adapter_parameters(model), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 20)).square().sum().backward()
        optimizer.step()
    assert all(bool(adapter.B.any()) for adapter in adapters_of(model).values())
    assert_same_state(minilora.eject(model), state)


def test_hooks_of_parents_survive_and_what_inject_froze_stays_frozen() -> None:
    model = small_mlp()
    calls: list[str] = []
    model.block.register_forward_hook(lambda *_: calls.append("parent"))
    minilora.eject(minilora.inject(model, r=4))
    model(torch.randn(5, 20))
    assert calls == ["parent"]

    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    model(torch.randn(5, 20)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_second_inject_and_eject_is_like_the_first() -> None:
    model = minilora.inject(small_mlp(), r=4)
    first = adapters_of(model)["up"].A.clone()
    minilora.inject(minilora.eject(model), r=4)
    assert torch.equal(adapters_of(model)["up"].A, first)


def test_inject_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = minilora.inject(nn.Sequential(nn.Linear(20, 24)), r=4)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    adapter = adapters_of(model)["0"]
    assert (adapter.A.shape, adapter.B.shape) == ((4, 20), (24, 4))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], set()),
        (["block.norm"], {"block.norm.weight", "block.norm.bias"}),
        (["block.norm.bias"], {"block.norm.bias"}),
        (["block.norm", "up.weight"], {"block.norm.weight", "block.norm.bias", "up.weight"}),
    ],
)
def test_train_also_names_modules_and_parameters_that_stay_trainable(
    names: list[str], expected: set[str]
) -> None:
    model = minilora.inject(small_mlp(), r=4, targets=["block.down"], train_also=names)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    adapter = {"block.down.adapters.default.A", "block.down.adapters.default.B"}
    assert set(trainable) == adapter | expected

    found = {id(p) for p in minilora.adapter_parameters(model)}
    assert found == {id(p) for p in trainable.values()}


def test_audit_names_the_adapters_that_got_no_gradient() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read, self.idle = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            # As a fused loss reads the weight of the head.
            return self.used(x) @ self.read.weight.T

    model = minilora.inject(Skips(), r=2)
    assert minilora.audit(model) == ["used", "read", "idle"]
    model(torch.randn(3, 8)).sum().backward()
    assert minilora.audit(model) == ["read", "idle"]

    # A gradient of zeros counts as none.
    adapters_of(model)["used"].B.grad.zero_()
    assert minilora.audit(model) == ["used", "read", "idle"]


@pytest.mark.parametrize("quantized", [True, False])
def test_disabled_computes_the_base_nests_and_ends_on_an_exception(quantized: bool) -> None:
    model, x = small_mlp(quantized=quantized), torch.randn(5, 20)
    base = model(x)
    adapted = randomize(minilora.inject(model, r=4))(x)
    with minilora.disabled(model):
        assert torch.equal(model(x), base)
        with minilora.disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base), "leaving the inner block switched the adapter on"
    assert torch.equal(model(x), adapted)
    assert not torch.equal(adapted, base)

    with pytest.raises(KeyError), minilora.disabled(model):
        raise KeyError
    assert torch.equal(model(x), adapted)


# torch 2.13's own tracing warns of it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_disabled_works_under_compile_with_a_full_graph() -> None:
    model, x = small_mlp(quantized=True), torch.randn(5, 20)
    base = model(x)
    adapted = randomize(minilora.inject(model, r=4))(x)

    # aot_eager: traced whole, run by eager's kernels.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(x), adapted)
        with minilora.disabled(model):
            assert torch.equal(compiled(x), base)
