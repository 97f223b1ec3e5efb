"""A run checks its data, and the sequences that it asks for, before the model trains on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minilora.training import FinetuneConfig, finetune, hold_out, preparing

Configure = Callable[..., FinetuneConfig]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that were loaded."""
    calls: list[Any] = []
    load = preparing.load_base

    def spy(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return load(*args, **options)

    monkeypatch.setattr(preparing, "load_base", spy)
    return calls


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"text": "a", "prompt": "b"}', r"d\.jsonl:1 is ambiguous"),
        ("d.jsonl", '{"text": "\\ud800"}', r"d\.jsonl:1: 'text' contains an unpaired surrogate"),
        ("d.csv", "question,answer\na,b\n", r"d\.csv:2 has the keys \['answer', 'question'\]"),
        ("d.xlsx", "prompt", r"d\.xlsx is of no known format"),
    ],
)
def test_the_data_is_checked_before_the_model_is_loaded(
    tmp_path: Path, configure: Configure, loaded: list[Any], name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        finetune(configure(data=str(tmp_path / name)))
    assert not loaded
    assert not Path(configure().out).exists()


def test_the_data_is_read_once(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    read = hold_out.read_records
    monkeypatch.setattr(hold_out, "read_records", lambda path: calls.append(path) or read(path))
    finetune(configure(steps=1, batch_size=2))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 4096}, "max_length=4096 is more than the context of .*, 2048 tokens"),
        ({"batch_size": 65_536}, "batch_size=65536 .* 16 training examples"),
        ({"grad_accum": 1000}, "grad_accum=1000 is 8000 sequences per step"),
    ],
)
def test_sequences_and_steps_that_are_too_large_are_refused_before_anything_is_written(
    configure: Configure, changes: dict[str, Any], message: str
) -> None:
    config = configure(**changes)
    with pytest.raises(ValueError, match=message):
        finetune(config)
    assert not Path(config.out).exists()


def test_a_row_with_null_columns_trains_as_the_row_without_them(
    tmp_path: Path, data: Path, configure: Configure
) -> None:
    """Two forms in one table: every row of an export has all columns."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[3:6] = [{"text": "some text without turns"}] * 3
    losses = []
    for name, empty in (("plain", {}), ("export", {"text": None, "prompt": None, "id": 7})):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(empty | row) for row in rows))
        run = configure(data=str(path), out=str(tmp_path / name), steps=2, batch_size=8)
        losses.append([step.loss for step in finetune(run).history])
    assert losses[0] == losses[1]
