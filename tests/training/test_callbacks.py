"""Callbacks: each is called with every step, and closed whether or not the loop fails."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_up import made_up_step

from minilora.training import callbacks
from minilora.training.callbacks import AfterStep, run_with, show_progress, write_metrics
from minilora.training.loop import Step


def steps(first: int, last: int) -> list[Step]:
    return [made_up_step(i, loss=2.0, tokens=4, seconds=0.5) for i in range(first, last + 1)]


@contextmanager
def recorder(log: list[Any]) -> Iterator[AfterStep]:
    log.append("entered")
    try:
        yield lambda step: log.append(step.step)
    finally:
        log.append("left")


def test_each_callback_sees_every_step_and_is_closed() -> None:
    one, two = [], []
    assert run_with([recorder(one), recorder(two)], steps(1, 2)) == steps(1, 2)
    assert one == two == ["entered", 1, 2, "left"]


def test_callbacks_are_closed_if_the_loop_fails() -> None:
    def fails() -> Iterator[Step]:
        yield from steps(1, 1)
        raise RuntimeError

    log: list[Any] = []
    with pytest.raises(RuntimeError):
        run_with([recorder(log)], fails())
    assert log == ["entered", 1, "left"]


def test_metrics_are_written_step_by_step_after_those_of_the_history(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9')
    with write_metrics(path, steps(1, 2)) as after_step:
        assert read(path) == [1, 2]
        after_step(steps(3, 3)[0])
        assert read(path) == [1, 2, 3]
    assert read(path) == [1, 2, 3]


def read(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("since", [None, 3])
def test_the_progress_says_at_the_end_what_was_paged(
    since: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    class Bar:
        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None: ...

        def set_postfix_str(self, text: str) -> None:
            log.append(text)

        def update(self) -> None: ...

        write = set_postfix_str

    class Paging(SimpleNamespace):
        def __str__(self) -> str:
            return "4 MB paged"

    monkeypatch.setattr(callbacks, "progress_bar", lambda *_: Bar())
    optimizer: Any = SimpleNamespace(paging=Paging(since=since))
    run_with([show_progress(2, 0, optimizer)], steps(1, 2))
    assert len(log) == (2 if since is None else 3)
    assert log[0].startswith("loss 2.000, 8 tokens/s, ")
    assert since is None or log[2] == "the device ran out of memory: 4 MB paged"
