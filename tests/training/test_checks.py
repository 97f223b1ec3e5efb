"""Errors that stop a run name the examples, and the adapters that no gradient reaches."""

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from made_up import random_examples
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import minilora
from minilora.huggingface.activation_checkpointing import gradient_checkpointing
from minilora.huggingface.bypassed import check_gradients
from minilora.training import FinetuneConfig, loop
from minilora.training.checks import check_finite
from minilora.training.data import Example
from minilora.training.loop import train

EXAMPLES = random_examples([40, 39, 38, 37, 36, 35, 34, 33])
CONFIG = FinetuneConfig("m", "d", "o", steps=3, batch_size=2, grad_accum=2, lr=1e-2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_names_step_and_examples(value: float) -> None:
    picked = [(7, Example(list(range(20)), [], where="my.jsonl:8")), (3, Example([5], []))]
    check_finite(1e300, "the loss", 4, picked)
    message = (
        rf"step 5: the loss is {value}\. The parameters are those after step 4; .*"
        r"example 7 \(my\.jsonl:8: 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\); "
        r"example 3 \(ids: 5, \.\.\.\)\.$"
    )
    with pytest.raises(FloatingPointError, match=message):
        check_finite(value, "the loss", 4, picked)


def test_adapters_without_a_gradient_are_named_the_first_eight() -> None:
    model = minilora.inject(nn.Sequential(*(nn.Linear(4, 4) for _ in range(10))), r=2)
    names = ", ".join(re.escape(str(i)) for i in range(8))
    with pytest.raises(ValueError, match=rf"\(10 of them\): {names} and 2 more\. Likely"):
        check_gradients(model)
    model(torch.randn(2, 4)).sum().backward()
    check_gradients(model)


def message_of_the_first_step(model: Any) -> str:
    """The error of the first step, which changes no parameter."""
    before = [p.clone() for p in minilora.adapter_parameters(model)]
    with pytest.raises(ValueError, match="adapters got no gradient in the first step") as caught:
        next(train(model, EXAMPLES, CONFIG, pad=0))
    assert all(map(torch.equal, before, minilora.adapter_parameters(model)))
    return str(caught.value)


def detach(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.detach()


def test_at_the_start_the_zero_gradient_of_a_is_no_reason_to_stop(tiny_llama: Any) -> None:
    model = minilora.inject(tiny_llama(), r=4)
    assert next(train(model, EXAMPLES, CONFIG, pad=0)).step == 1


def test_a_frozen_path_is_named(tiny_llama: Any) -> None:
    model = minilora.inject(tiny_llama(), r=4, targets=["q_proj", "v_proj"])
    model.model.layers[1].self_attn.v_proj.register_forward_hook(detach)
    message = message_of_the_first_step(model)
    assert "(1 of them): model.layers.1.self_attn.v_proj. " in message and "detached" in message


def test_checkpointing_that_passes_no_gradient_is_named(tiny_llama: Any) -> None:
    """Reentrant checkpointing, which was the default of transformers for years."""
    model = minilora.inject(tiny_llama(), r=4, targets=["q_proj", "lm_head"])
    with gradient_checkpointing(model):
        for layer in model.model.layers:
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)
        with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
            message = message_of_the_first_step(model)
    names = "model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj"
    assert f"(2 of them): {names}. " in message and "reentrant" in message


def test_a_loss_that_bypasses_the_head_is_named(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fused(model: Any, batch: dict[str, Tensor]) -> Tensor:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        hidden = model.model(**inputs).last_hidden_state
        logits = hidden[:, :-1] @ model.lm_head.weight.T
        labels = batch["labels"][:, 1:].flatten()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")

    monkeypatch.setattr(loop, "token_losses", fused)
    model = minilora.inject(tiny_llama(), r=4, targets=["q_proj", "lm_head"])
    message = message_of_the_first_step(model)
    assert "(1 of them): lm_head. " in message and "lm_head.weight" in message


def test_if_no_adapter_at_all_is_reached_the_first_names_are_given(tiny_llama: Any) -> None:
    model = minilora.inject(tiny_llama(), r=4)
    model.lm_head.register_forward_hook(detach)
    message = message_of_the_first_step(model)
    assert "(14 of them): model.layers.0.self_attn.q_proj, " in message
    assert " and 6 more. " in message
