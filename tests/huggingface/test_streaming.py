"""The parts of a streamed answer: whole characters, together the answer, and interruptible."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora.huggingface import Sampling, generate, load_dense, stream
from minilora.huggingface.streaming import TextStream


def decode(tokens: list[int]) -> str:
    """Every byte is a token."""
    return bytes(tokens).decode(errors="replace").strip()


def parts_of(content: bytes) -> list[str]:
    parts: list[str] = []
    text = TextStream(decode, parts.append)
    text.put(torch.tensor([[1, 2, 3]]))
    for token in content:
        text.put(torch.tensor([token]))
    text.end()
    return parts


@given(st.text())
def test_no_part_ends_within_a_character_and_together_they_are_the_text(text: str) -> None:
    parts = parts_of(text.encode())
    assert "".join(parts) == text.strip()
    assert all(parts)
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


@given(st.binary())
def test_bytes_that_are_no_text_are_the_same_as_when_decoded_at_once(content: bytes) -> None:
    assert "".join(parts_of(content)) == decode(list(content))


def test_a_character_is_written_with_its_last_byte_and_white_space_with_what_follows() -> None:
    assert parts_of("a é \n👋".encode()) == ["a", " é", " \n👋"]
    assert parts_of(b"\n a \xf0\x9f") == ["a", " \ufffd"]


@pytest.fixture(scope="module")
def tiny(folder: Path) -> tuple[Any, Any]:
    return load_dense(folder, dtype=torch.float32)


@pytest.mark.parametrize("sampling", [Sampling(), *(Sampling(1.0, seed=i) for i in range(5))])
def test_the_answer_and_its_parts_are_what_generate_returns(
    sampling: Sampling, tiny: tuple[Any, Any]
) -> None:
    parts: list[str] = []
    answer = stream(*tiny, "say yes", parts.append, limit=40, sampling=sampling)
    assert answer == "".join(parts) == generate(*tiny, "say yes", limit=40, sampling=sampling)
    assert len(parts) > 5


def test_a_part_is_handed_on_before_the_next_token_is_computed(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny
    events: list[str] = []
    forward = model.forward

    def counted(*inputs: Any, **options: Any) -> Any:
        events.append("token")
        return forward(*inputs, **options)

    monkeypatch.setattr(model, "forward", counted)
    stream(model, tokenizer, "say yes", events.append, limit=6)
    first = next(i for i, event in enumerate(events) if event != "token")
    assert "token" in events[:first] and "token" in events[first:]


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_an_interruption_leaves_the_model_as_it_was(
    error: type[BaseException], tiny: tuple[Any, Any]
) -> None:
    model, tokenizer = tiny
    theirs, before = model.generation_config, copy.deepcopy(model.generation_config)
    expected = generate(model, tokenizer, "say yes", limit=20)
    parts: list[str] = []

    def write(part: str) -> None:
        parts.append(part)
        if len(parts) == 3:
            raise error

    model.train()
    try:
        with pytest.raises(error):
            stream(model, tokenizer, "say yes", write, limit=20)
        assert model.training and model.generation_config is theirs and theirs == before
    finally:
        model.eval()
    assert expected.startswith("".join(parts)) and len(parts) == 3
    assert generate(model, tokenizer, "say yes", limit=20) == expected


def test_nothing_is_written_for_a_prompt_that_is_refused(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="exceeds the model's context"):
        stream(*tiny, "x" * 3000, pytest.fail)
