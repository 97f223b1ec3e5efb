"""Sample answers: which prompts are asked, what is expected, and that asking changes nothing."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import interrupt, run

from minilora.huggingface.loading import load_dense
from minilora.training import FinetuneConfig, finetune, samples
from minilora.training.data import encode_records
from minilora.training.samples import Question, Sample, ask, pick_questions

Configure = Callable[..., FinetuneConfig]

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "and 1?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "Thanks"},
]


def test_an_answer_is_exact_apart_from_white_space() -> None:
    assert Sample("p", "YES\n", "no", " YES").exact
    assert not Sample("p", "YES", "YES", "yes").exact
    assert Sample("p", "YES", "YES", "yes").exact_before


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return load_dense(folder)


def questions_of(records: list[Any], tokenizer: Any, count: int, length: int = 200) -> Any:
    placed = [(f"my.jsonl:{i}", record) for i, record in enumerate(records, start=1)]
    held_out = encode_records(placed, tokenizer, length)
    return pick_questions(held_out, placed, count)


def test_the_prompt_is_what_comes_before_the_last_answer(loaded: Any) -> None:
    _, tokenizer = loaded
    (question,) = questions_of([{"messages": TURNS}], tokenizer, 3)
    assert question == Question(TURNS[:4], "5")
    assert question.prompt == "and 1?"
    assert question.answered("x", "5") == Sample("and 1?", "5", "x", "5")


def test_a_text_has_no_prompt_and_a_truncated_conversation_no_whole_answer(loaded: Any) -> None:
    _, tokenizer = loaded
    short, long = ({"prompt": "say it", "completion": text} for text in ("YES", 60 * "NO"))
    records = [{"text": "some text without turns"}, long, short, short]
    with pytest.warns(UserWarning, match="1 of 4 completions were truncated"):
        found = questions_of(records, tokenizer, 1, length=80)
    assert [question.expected for question in found] == ["YES"]
    assert questions_of([short], tokenizer, 0) == []


def test_a_conversation_in_which_the_user_says_nothing_shows_its_last_turn() -> None:
    assert Question([{"role": "system", "content": "Begin."}], "x").prompt == "Begin."


def test_an_answer_is_as_long_as_the_expected_ones_and_fits_into_the_context(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    limits = []
    monkeypatch.setattr(samples, "generate_batch", lambda *_, limit: limits.append(limit) or [])
    short = Question([{"role": "user", "content": "a"}], "b" * 20)
    long = Question([{"role": "user", "content": "a" * 1980}], "b" * 500)
    for asked in ([short], [short, Question(short.turns, "b" * 500)], [short, long]):
        ask(model, tokenizer, asked)
    prompt = tokenizer.apply_chat_template(long.turns, add_generation_prompt=True, return_dict=True)
    assert limits == [20 + 10 + 8, 128, 2048 - len(prompt["input_ids"])]


def test_samples_change_no_bit_of_the_training(resumable: Callable[..., FinetuneConfig]) -> None:
    config = resumable(samples=0)
    without = run(config)
    asked = run(resumable(samples=3, overwrite=True))
    assert len(asked.samples) == 3
    assert without.agrees(replace(asked, samples=[]))


def test_a_resumed_run_has_the_answers_from_before_training(
    resumable: Callable[..., FinetuneConfig], tmp_path: Path
) -> None:
    whole = finetune(resumable(out=str(tmp_path / "whole")))
    config = resumable()
    interrupt(config, step=2)
    resumed = finetune(resumable(resume=True))
    assert len(whole.samples) == 3
    assert resumed.samples == whole.samples


@pytest.fixture
def that_can_stop(folder: Path, tmp_path: Path) -> Path:
    """The tiny model, whose end-of-turn token has an embedding: its padding has none."""
    from transformers import AutoModelForCausalLM

    copied = shutil.copytree(folder, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        model.get_input_embeddings().weight[256].normal_(std=0.2, generator=generator)
    model.save_pretrained(copied)
    return copied


def test_the_answers_after_training_are_those_of_the_finished_adapter(
    configure: Configure, that_can_stop: Path, tmp_path: Path
) -> None:
    """One word, learned by heart."""
    path = tmp_path / "yes.jsonl"
    path.write_text("".join(f'{{"prompt": "say {i}", "completion": "YES"}}\n' for i in range(20)))
    result = finetune(configure(model=str(that_can_stop), data=str(path), steps=30, batch_size=4))
    assert result.exact_before == 0 and result.exact_after == 3
    assert [sample.after for sample in result.samples] == ["YES"] * 3


def test_without_a_hold_out_nothing_is_asked(configure: Configure) -> None:
    torch.manual_seed(0)
    assert finetune(configure(steps=1, batch_size=2, eval_fraction=0.0)).samples == []
