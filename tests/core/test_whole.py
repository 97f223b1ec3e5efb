"""What `train_also` trains: the base is left alone, and comes back bit for bit, with its ties."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minilora
from minilora.surgery import attach
from minilora.targets import adapted_layers
from minilora.whole import untied_names, whole_parameters

IDS = torch.arange(24).reshape(2, 12) * 5 % 128
TRAIN_ALSO = ["norm", "embed_tokens"]

Make = Callable[..., Any]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


def trained(model: Any, **options: Any) -> Any:
    """The model with an adapter on q_proj and trained norms and embeddings, all of them changed."""
    minilora.inject(model, r=4, targets="q_proj", **{"train_also": TRAIN_ALSO} | options)
    with torch.no_grad():
        for p in minilora.adapter_parameters(model):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


def default_adapters(model: Any) -> dict[str, Any]:
    layers: dict[str, Any] = dict(adapted_layers(model))
    return {name: layer.adapters["default"] for name, layer in layers.items()}


@pytest.fixture(params=["tied", "untied"])
def make(request: pytest.FixtureRequest, tiny_llama: Make) -> Make:
    return lambda: tiny_llama(tie_word_embeddings=request.param == "tied")


def test_the_base_comes_back_with_disabled_use_and_eject(make: Make) -> None:
    model = make()
    base, parameters = logits(model), dict(model.named_parameters(remove_duplicate=False))
    trained(model)
    changed = logits(model)
    assert not torch.allclose(changed, base, atol=1e-2)

    with minilora.disabled(model):
        assert torch.equal(logits(model), base)
        with minilora.disabled(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), changed)

    minilora.use(model)
    assert torch.equal(logits(model), base)
    minilora.use(model, "default")
    assert torch.equal(logits(model), changed)

    minilora.eject(model)
    assert torch.equal(logits(model), base)
    now = dict(model.named_parameters(remove_duplicate=False))
    assert {name: id(p) for name, p in now.items()} == {n: id(p) for n, p in parameters.items()}
    assert whole_parameters(model) == {}


def test_the_base_is_not_trained_and_what_is_trained_is_found(make: Make) -> None:
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(model)
    optimizer = torch.optim.AdamW(minilora.adapter_parameters(model), lr=1e-2)
    whole = whole_parameters(model)
    at_start = {name: p.detach().clone() for name, p in whole.items()}
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(not torch.equal(p, at_start[name]) for name, p in whole.items())
    assert {id(p) for p in whole.values()} < {id(p) for p in minilora.adapter_parameters(model)}

    # A gradient step on a disabled model has nothing to train.
    with minilora.disabled(model):
        assert all(
            torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before
        )
    minilora.use(model)
    assert minilora.adapter_parameters(model) == []


def test_a_tied_parameter_is_found_under_all_its_names(tiny_llama: Make) -> None:
    model = trained(tiny_llama(tie_word_embeddings=True), train_also=["embed_tokens"])
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    assert set(whole_parameters(model)) == names
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert untied_names(model) == []


def test_values_for_one_of_two_names_untie_it_while_the_adapter_is_active(
    tiny_llama: Make,
) -> None:
    donor, model = trained(tiny_llama()), tiny_llama(tie_word_embeddings=True)
    base, embedding = logits(model), model.model.embed_tokens.weight
    head = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
    adapters = {
        n: m.adapters["default"] for n, m in donor.named_modules() if hasattr(m, "adapters")
    }
    attach(model, adapters, whole={"lm_head.weight": head})

    assert model.model.embed_tokens.weight is embedding
    assert torch.equal(model.lm_head.weight, head)
    assert untied_names(model) == ["model.embed_tokens.weight", "lm_head.weight"]
    with minilora.disabled(model):
        assert torch.equal(logits(model), base)
        assert model.lm_head.weight is embedding
    minilora.eject(model)
    assert model.lm_head.weight is embedding
    assert torch.equal(logits(model), base)


def test_equal_values_stay_one_parameter_and_different_ones_become_two(tiny_llama: Make) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    for different in (False, True):
        model = minilora.inject(tiny_llama(tie_word_embeddings=True), r=2, targets="q_proj")
        adapters = {
            n: m.adapters["default"] for n, m in model.named_modules() if hasattr(m, "adapters")
        }
        value = torch.randn(model.lm_head.weight.shape)
        fresh = tiny_llama(tie_word_embeddings=True)
        attach(fresh, adapters, whole={names[0]: value, names[1]: value + different})
        assert (fresh.lm_head.weight is fresh.model.embed_tokens.weight) != different
        assert torch.equal(fresh.lm_head.weight, value + different)


def test_merge_keeps_what_was_trained(make: Make) -> None:
    model = trained(make())
    expected, whole = logits(model), whole_parameters(model)
    minilora.merge(model)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    now = dict(model.named_parameters(remove_duplicate=False))
    assert all(now[name] is p for name, p in whole.items())
    assert whole_parameters(model) == {}


def test_merging_what_was_trained_apart_unties_the_model_with_a_warning(tiny_llama: Make) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    donor = trained(tiny_llama())
    adapters = {
        n: m.adapters["default"] for n, m in donor.named_modules() if hasattr(m, "adapters")
    }
    attach(model, adapters, whole={"lm_head.weight": torch.randn(model.lm_head.weight.shape)})
    expected = logits(model)
    with pytest.warns(UserWarning, match="were trained apart and are no longer tied"):
        minilora.merge(model)
    assert model.config.tie_word_embeddings is False
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_what_was_put_aside_follows_the_model_to_another_dtype(make: Make) -> None:
    model = trained(make()).to(torch.bfloat16)
    base = logits(make().to(torch.bfloat16))
    with minilora.disabled(model):
        assert torch.equal(logits(model), base)
    minilora.use(model)
    model.to(torch.float32)
    minilora.use(model, "default")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_its_own(make: Make, copied: Callable[[Any], Any]) -> None:
    model = trained(make())
    expected, base = logits(model), logits(make())
    twin = copied(model)
    minilora.eject(model)
    assert torch.equal(logits(twin), expected)
    minilora.eject(twin)
    assert torch.equal(logits(twin), base)


def test_a_module_with_two_names_is_trained_once() -> None:
    norm = nn.LayerNorm(8)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 8), norm), "b": norm})
    minilora.inject(model, r=2, train_also=["b"])
    assert set(whole_parameters(model)) == {"a.1.weight", "a.1.bias", "b.weight", "b.bias"}
    assert model["a"][1].weight is model["b"].weight
    minilora.eject(model)
    assert whole_parameters(model) == {}


def test_a_refused_inject_leaves_the_base_in_place() -> None:
    model = nn.ModuleDict({"up": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    norm = model["norm"].weight
    minilora.inject(model, r=2, train_also=["norm"])
    with pytest.raises(ValueError, match="belong to a single adapter"):
        minilora.inject(model, r=2, name="second")
    minilora.eject(model)
    assert model["norm"].weight is norm


def test_what_the_caller_made_trainable_is_found_and_belongs_to_the_base() -> None:
    model = nn.ModuleDict({"up": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    minilora.inject(model, r=2)
    model["norm"].weight.requires_grad_(True)
    assert set(whole_parameters(model)) == {"norm.weight"}
    minilora.eject(model)
    assert whole_parameters(model) == {}


@pytest.mark.parametrize("also", [["0"], ["0.weight"], ["0.bias"], ["0.bias", "1"]])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_merge_adds_to_what_was_trained_whole_in_an_adapted_layer(
    also: list[str], lora_bias: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    minilora.inject(model, r=2, train_also=also, lora_bias=lora_bias)
    x = torch.randn(5, 8)
    with torch.no_grad():
        for p in minilora.adapter_parameters(model):
            p += torch.randn(p.shape)
        expected = model(x)
        assert torch.allclose(minilora.merge(model)(x), expected, atol=1e-4)


def test_what_cannot_be_trained_whole_is_refused_by_name() -> None:
    model = nn.ModuleDict({"up": nn.Linear(64, 64), "down": nn.Linear(64, 64)})
    minilora.quantize(model, "up")
    with pytest.raises(ValueError, match=r"means up\.packed, a part of a weight in 4 bits"):
        minilora.inject(model, targets="down", train_also=["up"])
    minilora.inject(model, targets="down", train_also=["up.bias"])
    assert set(whole_parameters(model)) == {"up.bias"}

    model = nn.ModuleDict({"up": nn.Linear(8, 8), "norm": nn.BatchNorm1d(8)})
    with pytest.raises(ValueError, match=r"norm\.running_mean, which no adapter's file holds"):
        minilora.inject(model, r=2, train_also=["norm"])


def test_a_model_wrapped_for_checkpointing_trains_whole_too() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = checkpoint_wrapper(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    minilora.inject(model, r=2, train_also=["1"])
    assert len(whole_parameters(model)) == 2
