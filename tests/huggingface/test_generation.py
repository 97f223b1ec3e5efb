"""Greedy generation: the same tokens as argmax, through the chat template or without."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minilora.huggingface.generation import generate, pad_id
from minilora.huggingface.loading import load_dense


def argmax_answer(model: Any, tokenizer: Any, text: str, limit: int) -> str:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(limit):
        with torch.no_grad():
            token = model(ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        if token.item() == model.config.eos_token_id:
            break
    answer: str = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    return answer.strip()


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_answer_is_the_argmax_of_every_step(chat: bool, training: bool, folder: Path) -> None:
    model, tokenizer = load_dense(folder, dtype=torch.float32)
    text = "say yes"
    if chat:
        turns = [{"role": "user", "content": "say yes"}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    else:
        tokenizer.chat_template = None

    expected = argmax_answer(model.eval(), tokenizer, text, limit=12)
    model.train(training)
    assert generate(model, tokenizer, "say yes", limit=12) == expected
    assert model.training == training


def test_the_turns_of_a_conversation_are_taken_as_they_are(folder: Path) -> None:
    model, tokenizer = load_dense(folder, dtype=torch.float32)
    turns = [
        {"role": "user", "content": "say yes"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "again"},
    ]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    expected = argmax_answer(model.eval(), tokenizer, text, limit=8)
    assert generate(model, tokenizer, turns, limit=8) == expected


@pytest.mark.parametrize(("pad", "eos", "expected"), [(0, 2, 0), (None, 2, 2), (7, None, 7)])
def test_the_end_of_text_pads_where_there_is_no_padding_token(
    pad: int | None, eos: int | None, expected: int
) -> None:
    assert pad_id(SimpleNamespace(pad_token_id=pad, eos_token_id=eos)) == expected


def test_a_generation_config_does_not_change_what_greedy_is(folder: Path) -> None:
    model, tokenizer = load_dense(folder, dtype=torch.float32)
    expected = generate(model, tokenizer, "say yes", limit=12)
    theirs: Any = model.generation_config
    theirs.update(num_beams=4, repetition_penalty=5.0, max_length=3, suppress_tokens=[68])
    assert generate(model, tokenizer, "say yes", limit=12) == expected
    assert model.generation_config is theirs


def test_an_error_leaves_the_model_in_the_mode_it_was_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_dense(folder, dtype=torch.float32)
    model.train()
    theirs = model.generation_config

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("in a layer")

    monkeypatch.setattr(model, "forward", fails)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, tokenizer, "say yes", limit=2)
    assert model.training and model.generation_config is theirs


@pytest.mark.parametrize(
    ("prompt", "limit", "said"),
    [
        ("say yes", 0, "max_new_tokens=0"),
        ("", 4, "the prompt is empty"),
        ("a\udcffb", 4, "unpaired surrogate at position 1: it is not UTF-8 text"),
        ("x" * 2000, 100, "exceeds the model's context of 2048"),
        ("x", 10**9, "exceeds the model's context"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused(
    prompt: str, limit: int, said: str, folder: Path
) -> None:
    model, tokenizer = load_dense(folder, dtype=torch.float32)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=said):
        generate(model, tokenizer, prompt, limit=limit)


@pytest.mark.parametrize("template", ["{{", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}"])
def test_a_chat_template_that_fails_is_named(template: str, folder: Path) -> None:
    model, tokenizer = load_dense(folder, dtype=torch.float32)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="chat template fails"):
        generate(model, tokenizer, "say yes", limit=1)


def test_a_tokenizer_without_any_end_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a padding nor an end-of-text token"):
        pad_id(SimpleNamespace(pad_token_id=None, eos_token_id=None))
