"""Gradient checkpointing leaves the model as it was. (Its bits and its memory: tests/training.)"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from minilora.huggingface.activation_checkpointing import gradient_checkpointing


def is_on(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize("use_cache", [True, False])
def test_an_error_inside_the_block_switches_it_off_too(
    use_cache: bool, tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama().train()
    model.config.use_cache = use_cache
    with pytest.raises(torch.OutOfMemoryError), gradient_checkpointing(model):
        assert is_on(model) and not model.config.use_cache
        raise torch.OutOfMemoryError("in the backward pass")
    assert not is_on(model) and model.config.use_cache == use_cache


def test_gradients_are_bit_identical(tiny_llama: Callable[..., Any]) -> None:
    ids = torch.arange(12).reshape(2, 6)
    found = []
    for checkpointing in (False, True):
        model = tiny_llama().train()
        model.model.embed_tokens.requires_grad_(False)
        loss = model(ids, labels=ids).loss
        if checkpointing:
            with gradient_checkpointing(model):
                loss = model(ids, labels=ids).loss
        loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *found))


def test_an_error_while_it_is_switched_on_switches_it_off_again(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama().train()

    def fails() -> None:
        raise RuntimeError("no hook")

    monkeypatch.setattr(model, "disable_input_require_grads", fails)
    with pytest.raises(RuntimeError), gradient_checkpointing(model):
        raise AssertionError("not reached")
    assert not is_on(model) and model.config.use_cache


def test_what_was_on_before_stays_on(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama().train()
    model.activation_checkpointing_enable()
    with gradient_checkpointing(model):
        pass
    assert is_on(model)
