"""Weights with two names: a head tied to the embedding, a layer that two parents share."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Shared
from torch import Tensor, nn

import minilora
from minilora.lora import LoRALayer
from minilora.targets import adapted_layers, linear_layers

IDS = torch.arange(24).reshape(2, 12) * 5 % 128


def is_tied(model: Any) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


def with_trained_head(make: Callable[..., Any]) -> Any:
    model = minilora.inject(make(tie_word_embeddings=True), r=4, targets=["q_proj", "lm_head"])
    torch.nn.init.normal_(model.lm_head.adapters["default"].B, std=0.1)
    return model


def test_a_tied_head_takes_an_adapter_and_stays_tied(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    base = logits(model)
    embedding = model.model.embed_tokens.weight
    minilora.inject(model, r=4, targets=["q_proj", "lm_head"])
    assert is_tied(model)
    assert model.model.embed_tokens.weight is embedding
    assert torch.equal(logits(model), base)
    torch.nn.init.normal_(model.lm_head.adapters["default"].B, std=0.1)
    changed = logits(model)
    model.tie_weights()
    assert is_tied(model)
    assert isinstance(model.lm_head, minilora.LoRALinear)
    assert torch.equal(logits(model), changed)
    assert not torch.allclose(changed, base, atol=1e-3)

    minilora.eject(model)
    assert is_tied(model)
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(logits(model), base)


def test_training_a_tied_heads_adapter_does_not_move_the_embedding(
    tiny_llama: Callable[..., Any],
) -> None:
    model = minilora.inject(tiny_llama(tie_word_embeddings=True), r=4, targets=["lm_head"])
    embedding = model.model.embed_tokens.weight.detach().clone()
    optimizer = torch.optim.AdamW(minilora.adapter_parameters(model), lr=1e-2)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert minilora.audit(model) == []
    assert model.lm_head.adapters["default"].B.any()
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert model.model.embed_tokens.weight.grad is None


def test_merge_unties_with_a_warning_and_for_good(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    import transformers

    model = with_trained_head(tiny_llama)
    embedding, expected = model.model.embed_tokens.weight.detach().clone(), logits(model)
    names = "model.embed_tokens.weight and lm_head.weight"
    message = f"lm_head was merged, so {names} are no longer tied"
    with pytest.warns(UserWarning, match=message) as caught:
        minilora.merge(model)
    assert caught[0].filename == __file__, "the warning should point at the caller"
    assert not is_tied(model)
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model.model.embed_tokens.weight, embedding)

    merged = logits(model)
    # float32 sums of 64 terms near one, in another order.
    assert torch.allclose(merged, expected, atol=1e-5)
    model.tie_weights()
    assert torch.equal(logits(model), merged), "tie_weights undid the merge"
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), merged)


def test_merging_another_layer_leaves_the_head_tied(tiny_llama: Callable[..., Any]) -> None:
    model = minilora.merge(minilora.inject(tiny_llama(tie_word_embeddings=True), r=4))
    assert is_tied(model)
    assert model.config.tie_word_embeddings is True


class Twice(nn.Module):
    """One layer twice under one parent."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(12, 12)
        self.inner = nn.Sequential(layer, nn.Tanh(), layer)
        self.last = nn.Linear(12, 5)

    @property
    def outer(self) -> nn.Module:
        return self.inner[2]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.inner(x))
        return y


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("make", [Shared, Twice])
def test_a_shared_layer_gets_one_adapter_and_stays_shared(
    make: Callable[[], Any], quantized: bool
) -> None:
    model, x = make(), torch.randn(3, 12)
    if quantized:
        minilora.quantize(model)
        assert isinstance(model.outer, minilora.NF4Linear)
        assert model.outer is model.inner[0]

    layer, base = model.outer, model(x)
    assert len(adapted_layers(minilora.inject(model, r=2))) == 2
    assert isinstance(model.outer, LoRALayer)
    assert model.outer is model.inner[0]
    assert len(minilora.adapter_parameters(model)) == 4
    assert torch.equal(model(x), base)

    minilora.eject(model)
    assert model.outer is model.inner[0] is layer
    minilora.merge(minilora.inject(model, r=2))
    assert type(model.outer) is nn.Linear
    assert model.outer is model.inner[0]


def test_a_shared_layer_has_one_name_everywhere() -> None:
    model = Shared()
    names = list(linear_layers(model))
    assert minilora.audit(minilora.inject(model, r=2)) == names
    assert list(adapted_layers(model)) == names
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.adapters.default.{x}" for name in names for x in "AB"}


def test_a_copy_of_a_model_shares_what_the_model_shared() -> None:
    model = copy.deepcopy(minilora.inject(Shared(), r=2))
    assert model.outer is model.inner[0]
    assert minilora.eject(model).outer is model.inner[0]


def test_merging_the_head_of_an_encoder_and_decoder_is_refused() -> None:
    # config.tie_word_embeddings would untie the embeddings of encoder and decoder with the head.
    import transformers

    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    model = transformers.T5ForConditionalGeneration(config)
    minilora.inject(model, r=2, targets=["q", "lm_head"])
    torch.nn.init.normal_(model.lm_head.adapters["default"].B)
    with pytest.raises(ValueError, match=r"lm_head\.weight share a weight, .* eject the adapter"):
        minilora.merge(model)
    assert isinstance(model.lm_head, minilora.LoRALinear)
    assert model.config.tie_word_embeddings


def test_merging_layers_that_transformers_ties_is_refused(tiny_llama: Callable[..., Any]) -> None:
    # Zamba2 ties the blocks that it repeats, whatever its config says of the embedding.
    model = tiny_llama()
    first, second = (model.model.layers[i].self_attn for i in (0, 1))
    second.q_proj.weight = first.q_proj.weight
    minilora.inject(model, r=2, targets="q_proj")
    with pytest.raises(ValueError, match=r"q_proj\.weight share a weight, .* eject the adapter"):
        minilora.merge(model)
    minilora.eject(model)
    with pytest.raises(ValueError, match=r"exclude= \(and so with model\.layers\.1\.self_attn"):
        minilora.quantize(model, "q_proj")
