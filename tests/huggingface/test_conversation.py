"""A conversation: which turns the model sees, with which side, and what an interruption leaves."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folder import shared

import minilora
from minilora.huggingface import Sampling, generate, load_dense
from minilora.huggingface.conversation import Conversation
from minilora.huggingface.generation import ContextExceededError


def ignore(_: str) -> None:
    pass


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


@pytest.fixture
def adapted() -> tuple[Any, Any]:
    model, tokenizer = load_dense(shared() / "model", dtype=torch.float32)
    return minilora.load_adapter(model, shared() / "on-dense"), tokenizer


def test_the_model_sees_all_turns_and_the_system_turn(adapted: tuple[Any, Any]) -> None:
    talk = Conversation(*adapted, limit=12, system="be brief")
    turns = [{"role": "system", "content": "be brief"}]
    for message in ("say yes", "again", "once more"):
        turns.append(user(message))
        expected = generate(*adapted, turns, limit=12)
        parts: list[str] = []
        assert talk.ask(message, parts.append) == expected == "".join(parts)
        turns.append(assistant(expected))

    talk.clear()
    turns = [turns[0], user("say no")]
    assert talk.ask("say no", ignore) == generate(*adapted, turns, limit=12)


def test_the_base_answers_while_the_adapter_is_off(adapted: tuple[Any, Any]) -> None:
    talk = Conversation(*adapted, limit=12)
    alone = load_dense(shared() / "model", dtype=torch.float32)
    assert talk.has_adapter and talk.adapter_is_on
    with_adapter = talk.ask("say yes", ignore)
    assert with_adapter == generate(*adapted, "say yes", limit=12)

    talk.adapter_is_on = False
    base = talk.ask_again(ignore)
    assert base == generate(*alone, "say yes", limit=12) != with_adapter

    # The switch is the conversation's: the model computes with its adapter all the time.
    assert generate(*adapted, "say yes", limit=12) == with_adapter
    talk.adapter_is_on = True
    assert talk.ask_again(ignore) == with_adapter


def test_an_answer_given_again_takes_the_place_of_the_one_before(adapted: Any) -> None:
    talk = Conversation(*adapted, limit=8)
    with pytest.raises(ValueError, match="there is no message yet"):
        talk.ask_again(ignore)
    talk.ask("say yes", ignore)
    talk.adapter_is_on = False
    base = talk.ask_again(ignore)
    talk.adapter_is_on = True
    turns = [user("say yes"), assistant(base), user("and no")]
    assert talk.ask("and no", ignore) == generate(*adapted, turns, limit=8)


def drawn(adapted: Any, prompt: Any, seed: int) -> str:
    return generate(*adapted, prompt, limit=12, sampling=Sampling(1.0, seed=seed))


def test_every_message_is_answered_with_a_seed_of_its_own(adapted: tuple[Any, Any]) -> None:
    talk = Conversation(*adapted, limit=12, sampling=Sampling(1.0, seed=5))
    found = []
    for seed in (5, 6, 7):
        found.append(talk.ask("say yes", ignore))
        assert found[-1] == drawn(adapted, "say yes", seed)
        talk.clear()
    assert len(set(found)) == 3


def test_an_answer_given_again_is_drawn_as_before_so_that_the_sides_can_be_compared(
    adapted: tuple[Any, Any],
) -> None:
    talk = Conversation(*adapted, limit=12, sampling=Sampling(1.0, seed=5))
    first = talk.ask("say yes", ignore)
    assert talk.ask_again(ignore) == first == talk.ask_again(ignore)

    talk.adapter_is_on = False
    with minilora.disabled(adapted[0]):
        assert talk.ask_again(ignore) == drawn(adapted, "say yes", 5) != first
    talk.adapter_is_on = True
    assert talk.ask_again(ignore) == first

    turns = [user("say yes"), assistant(first), user("say no")]
    assert talk.ask("say no", ignore) == drawn(adapted, turns, 6)


def test_an_interrupted_answer_is_drawn_again_as_it_was(adapted: tuple[Any, Any]) -> None:
    talk = Conversation(*adapted, limit=12, sampling=Sampling(1.0, seed=5))
    parts: list[str] = []

    def interrupt(part: str) -> None:
        if parts:
            raise KeyboardInterrupt
        parts.append(part)

    with pytest.raises(KeyboardInterrupt):
        talk.ask("say yes", interrupt)
    assert talk.ask_again(ignore) == drawn(adapted, "say yes", 5)


@pytest.mark.parametrize("said", [0, 1, 3])
def test_what_was_said_before_an_interruption_stays(said: int, adapted: Any) -> None:
    talk = Conversation(*adapted, limit=12)
    whole = talk.ask("say yes", ignore)
    parts: list[str] = []

    def interrupt(part: str) -> None:
        if len(parts) == said:
            raise KeyboardInterrupt
        parts.append(part)

    # While the adapter is off, which must not last.
    talk.adapter_is_on = False
    with pytest.raises(KeyboardInterrupt):
        talk.ask("say no", interrupt)
    talk.adapter_is_on = True

    turns = [user("say yes"), assistant(whole)]
    if said:
        turns += [user("say no"), assistant("".join(parts))]
    turns.append(user("and now"))
    assert talk.ask("and now", ignore) == generate(*adapted, turns, limit=12)


def test_a_refused_message_is_forgotten(adapted: tuple[Any, Any]) -> None:
    talk = Conversation(*adapted, limit=100)
    first = talk.ask("say yes", ignore)
    with pytest.raises(ContextExceededError) as full:
        talk.ask("x" * 400, ignore)
    assert full.value.limit == 100 and full.value.context == 512 and full.value.length > 400
    turns = [user("say yes"), assistant(first), user("x")]
    assert talk.ask("x", ignore) == generate(*adapted, turns, limit=100)


def test_without_a_chat_template_each_message_is_continued_alone(adapted: Any) -> None:
    model, tokenizer = adapted[0], copy.deepcopy(adapted[1])
    tokenizer.chat_template = None
    talk = Conversation(model, tokenizer, limit=8)
    assert not talk.has_turns
    for message in ("say yes", "say no"):
        assert talk.ask(message, ignore) == generate(model, tokenizer, message, limit=8)
    assert talk.ask_again(ignore) == generate(model, tokenizer, "say no", limit=8)
    with pytest.raises(ValueError, match="--system: the tokenizer has no chat template"):
        Conversation(model, tokenizer, system="be brief")
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        Conversation(model, tokenizer, limit=0)


def test_a_model_without_an_adapter_is_a_base(folder: Path) -> None:
    model, tokenizer = load_dense(folder, dtype=torch.float32)
    talk = Conversation(model, tokenizer, limit=8)
    assert not talk.has_adapter and not talk.adapter_is_on
    assert talk.ask("say yes", ignore) == generate(model, tokenizer, "say yes", limit=8)
