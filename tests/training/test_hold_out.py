"""The hold-out is a part of the data, or a file of its own."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minilora.training import FinetuneConfig, finetune
from minilora.training.hold_out import count_trained_on, encode_data, read_data

Configure = Callable[..., FinetuneConfig]


def write(path: Path, words: list[str]) -> str:
    lines = [json.dumps({"prompt": f"say {word}", "completion": word.upper()}) for word in words]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def encoded(config: FinetuneConfig, tokenizer: Any) -> list[list[str]]:
    """The places of the training examples and of the hold-out."""
    parts = encode_data(*read_data(config), tokenizer, config)
    return [sorted(example.where for example in part) for part in parts]


def test_without_a_file_of_its_own_a_part_of_the_data_is_held_out(
    configure: Configure, tokenizer: Any
) -> None:
    training, held_out = encoded(configure(), tokenizer)
    assert (len(training), len(held_out)) == (16, 4)
    assert not {*training} & {*held_out}


def test_with_a_file_of_its_own_all_of_the_data_is_trained_on(
    configure: Configure, data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    other = write(tmp_path / "eval.jsonl", ["maybe", "always"])
    training, held_out = encoded(configure(eval_data=other), tokenizer)
    assert {place.rpartition(":")[0] for place in training} == {str(data)}
    assert len(training) == 20 and held_out == [f"{other}:1", f"{other}:2"]


def test_a_run_measures_and_asks_what_the_file_of_its_own_holds(
    configure: Configure, tmp_path: Path
) -> None:
    learned = write(tmp_path / "learned.jsonl", ["yes", "no", "yesyes"])
    other = write(tmp_path / "other.jsonl", ["zzzz"])
    first = finetune(configure(eval_data=learned, out=str(tmp_path / "a"), steps=8, samples=1))
    second = finetune(configure(eval_data=other, out=str(tmp_path / "b"), steps=8))
    assert [sample.prompt for sample in first.samples] == ["say yes"]
    assert [sample.prompt for sample in second.samples] == ["say zzzz"]
    # The training does not depend on it.
    assert [step.loss for step in first.history] == [step.loss for step in second.history]
    assert first.eval_after is not None and second.eval_after is not None
    assert first.eval_after < second.eval_after


def test_an_evaluation_file_with_nothing_new_is_refused(
    configure: Configure, data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """The examples count, not the name of the file or the order in it."""
    known = write(tmp_path / "known.jsonl", ["no", "yes"])
    for path in (known, str(data)):
        config = configure(eval_data=path)
        with pytest.raises(ValueError, match=r"all examples of eval_data=.* leave out eval_data"):
            encode_data(*read_data(config), tokenizer, config)
    partly = write(tmp_path / "partly.jsonl", ["no", "yes", "new"])
    config = configure(eval_data=partly)
    training, held_out = encode_data(*read_data(config), tokenizer, config)
    assert count_trained_on(training, held_out) == 2
    # Learned with the prompt or without: not the same example.
    assert count_trained_on([replace(e, labels=e.ids) for e in training], held_out) == 0


def test_evaluations_of_nothing_are_refused(configure: Configure, tokenizer: Any) -> None:
    config = configure(eval_every=2, eval_fraction=0.01)
    with pytest.raises(
        ValueError, match=r"eval_every=2 has nothing to evaluate: eval_fraction=0\.01"
    ):
        encode_data(*read_data(config), tokenizer, config)


def test_an_evaluation_file_that_is_missing_is_named_before_anything_is_written(
    configure: Configure, tmp_path: Path
) -> None:
    config = configure(eval_data=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl does not exist"):
        finetune(config)
    assert not Path(config.out).exists()
