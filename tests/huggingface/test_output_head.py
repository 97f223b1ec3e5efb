"""The output head of tiny models of many architectures, and the loss behind it."""

import copy
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model, tokens
from helpers import randomize, snapshot
from torch import Tensor, nn

import minilora
from minilora.huggingface.causal_loss import causal_lm_loss
from minilora.huggingface.output_head import (
    OutputHead,
    UnknownHeadError,
    find_output_head,
    hidden_states,
)

transformers = pytest.importorskip("transformers")

KINDS = ("decoder", "mixture of experts", "state space")
CAUSAL = [name for name, found in ARCHITECTURES.items() if found.kind in KINDS]
CAUSAL.remove("SwitchTransformersForConditionalGeneration")

# One of each way of ending: plain, scaled, capped, tied, with a bias, experts, state spaces.
SAMPLE = {
    "LlamaForCausalLM",
    "Gemma2ForCausalLM",
    "CohereForCausalLM",
    "GPT2LMHeadModel",
    "PhiForCausalLM",
    "OPTForCausalLM",
    "MixtralForCausalLM",
    "MambaForCausalLM",
}
SCALES = {"CohereForCausalLM": 0.0625, "Cohere2ForCausalLM": 0.0625}
CAPS = {"Gemma2ForCausalLM": 30.0, "Gemma3nForCausalLM": 30.0, "RecurrentGemmaForCausalLM": 30.0}

# Of GPT-2 and others: the loss that a model without a loss_type gets.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def batch() -> tuple[dict[str, Tensor], Tensor]:
    """Two sequences; the first tokens of one, and the last ones of the other are not learned."""
    ids, labels = tokens(), tokens()
    labels[0, :4] = -100
    labels[1, 6:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


def check_loss(model: nn.Module) -> None:
    """The loss and all gradients are those of the model's own loss."""
    inputs, labels = batch()
    own = model(**inputs, labels=labels).loss
    expected = gradients(own, model)
    loss = causal_lm_loss(model, inputs, labels)
    found = gradients(loss, model)

    torch.testing.assert_close(loss, own, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys()
    # In float32; some gradients, as of a bias before softmax, are nothing but rounding.
    largest = max(g.abs().max().item() for g in expected.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize(
    "name",
    [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.soak) for n in CAUSAL],
)
def test_the_loss_is_the_models_own(name: str) -> None:
    model, _ = tiny_model(name)
    before = snapshot(model)
    state = torch.get_rng_state()
    head = find_output_head(model)
    assert snapshot(model) == before and torch.equal(torch.get_rng_state(), state)

    assert head.layer is model.get_output_embeddings()
    assert head.scale == SCALES.get(name, 1.0) and head.softcap == CAPS.get(name)
    check_loss(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_is_found_to_the_last_digit(dtype: torch.dtype) -> None:
    options = ARCHITECTURES["GraniteForCausalLM"].options | {"logits_scaling": 3.0}
    model = transformers.GraniteForCausalLM(transformers.GraniteConfig(**options)).to(dtype)
    assert find_output_head(model).scale == pytest.approx(1 / 3, rel=1e-7)


def test_the_model_is_left_in_its_mode_and_dropout_draws_nothing() -> None:
    options = ARCHITECTURES["GPT2LMHeadModel"].options
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options)).train()
    model.transformer.h[0].eval()
    before, state = snapshot(model), torch.get_rng_state()
    find_output_head(model)
    assert snapshot(model) == before and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "quantized"),
    [
        ("LlamaForCausalLM", False),
        ("Gemma2ForCausalLM", False),
        ("MambaForCausalLM", False),
        ("MistralForCausalLM", True),
        ("PhiForCausalLM", True),
    ],
)
def test_an_adapter_on_the_head_is_trained(name: str, quantized: bool) -> None:
    model, _ = tiny_model(name)
    if quantized:
        minilora.quantize(model, targets="lm_head")
    minilora.inject(model, r=3, targets="lm_head")
    randomize(model, size=0.1)
    check_loss(model)
    loss = causal_lm_loss(model, *batch())
    adapter = {"lm_head.adapters.default.A", "lm_head.adapters.default.B"}
    assert set(gradients(loss, model)) == adapter


def test_the_head_sees_the_learned_tokens_alone() -> None:
    model, _ = tiny_model("LlamaForCausalLM")
    find_output_head(model)
    rows: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _, args, out: rows.append(tuple(args[0].shape)))
    causal_lm_loss(model, *batch())
    assert rows == [(9, 32)]


def test_the_hidden_states_are_what_the_head_gets() -> None:
    model, forward = tiny_model("Gemma2ForCausalLM")
    head = find_output_head(model)
    hidden = hidden_states(model, head, {"input_ids": tokens()})
    torch.testing.assert_close(head.logits(head.layer(hidden)), forward(model))


def test_wrappers_are_seen_through() -> None:
    model, _ = tiny_model("LlamaForCausalLM")
    inputs, labels = batch()
    expected = causal_lm_loss(model, inputs, labels)
    compiled = torch.compile(model, backend="eager")

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = compiled

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    assert torch.equal(causal_lm_loss(Wrapper(), inputs, labels), expected)


def test_another_head_is_looked_at_again() -> None:
    model, _ = tiny_model("MistralForCausalLM")
    assert find_output_head(model).layer is model.lm_head
    model.set_output_embeddings(nn.Linear(32, 96))
    assert find_output_head(model).layer is model.lm_head
    check_loss(model)
    assert find_output_head(copy.deepcopy(model)).layer is not model.lm_head


# What is not recognised


def shifted(logits: Tensor) -> Tensor:
    return logits + 1


def masked(logits: Tensor) -> Tensor:
    """As models do that never answer with the token of an image."""
    return logits.masked_fill(torch.arange(logits.shape[-1]) == 5, -1e9)


def squared(logits: Tensor) -> Tensor:
    return logits * logits.abs()


@pytest.mark.parametrize("change", [shifted, masked, squared])
def test_logits_that_are_changed_in_another_way(change: Any) -> None:
    class Changed(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
            outputs = super().forward(input_ids, attention_mask)
            outputs.logits = change(outputs.logits)
            if labels is not None:
                outputs.loss = self.loss_function(outputs.logits, labels, VOCABULARY)
            return outputs

    VOCABULARY = ARCHITECTURES["LlamaForCausalLM"].options["vocab_size"]
    options = ARCHITECTURES["LlamaForCausalLM"].options
    model = Changed(transformers.LlamaConfig(**options))
    with pytest.raises(UnknownHeadError, match="in another way than by a factor and a soft cap"):
        find_output_head(model)


def test_a_head_that_is_not_called() -> None:
    model, _ = tiny_model("LlamaForCausalLM")
    other = nn.Linear(32, 96)
    model.get_output_embeddings = lambda: other
    with pytest.raises(UnknownHeadError, match="called 0 times"):
        find_output_head(model)


def test_a_model_without_a_head() -> None:
    model = tiny_model("LlamaForCausalLM")[0].model
    with pytest.raises(UnknownHeadError, match="no output head"):
        find_output_head(model)


def test_the_term_of_a_router() -> None:
    options = ARCHITECTURES["MixtralForCausalLM"].options
    config = transformers.MixtralConfig(**options, output_router_logits=True)
    model = transformers.MixtralForCausalLM(config)
    before = snapshot(model)
    for _ in range(2):
        with pytest.raises(UnknownHeadError, match="not the cross-entropy of the next token alone"):
            find_output_head(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("BertForMaskedLM", "not the cross-entropy of the next token alone"),
        ("T5ForConditionalGeneration", "cannot be run on a few tokens|not the cross-entropy"),
        ("BertForSequenceClassification", "no output head"),
    ],
)
def test_models_that_are_not_causal(name: str, reason: str) -> None:
    model, _ = tiny_model(name)
    with pytest.raises(UnknownHeadError, match=reason):
        find_output_head(model)


def test_an_error_of_the_model_leaves_it_as_it_was() -> None:
    model, _ = tiny_model("LlamaForCausalLM")
    before = snapshot(model)
    head = OutputHead(model.lm_head)
    with pytest.raises(IndexError):
        hidden_states(model, head, {"input_ids": torch.tensor([[1000]])})
    assert snapshot(model) == before
