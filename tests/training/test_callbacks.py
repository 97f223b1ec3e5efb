"""Callbacks: each is called with every step, and closed whether or not the loop fails."""

import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_up import made_up_step

from minilora.training import progress
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


class Paging(SimpleNamespace):
    def __str__(self) -> str:
        return "4 MB paged"


def optimizer(since: int | None = None) -> Any:
    return SimpleNamespace(paging=Paging(since=since))


@pytest.mark.parametrize("since", [None, 3])
def test_the_progress_says_at_the_end_what_was_paged(
    since: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    run_with([show_progress(2, 0, optimizer(since))], steps(1, 2))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == (2 if since is None else 3)
    assert since is None or said[2] == "the device ran out of memory: 4 MB paged"


@pytest.mark.parametrize(
    ("total", "done", "every", "shown"),
    [
        (3, 0, None, [1, 2, 3]),
        (100, 0, None, [1, *range(5, 101, 5)]),
        (100, 42, None, [43, *range(45, 101, 5)]),
        (25, 0, 10, [1, 10, 20, 25]),
    ],
)
def test_off_a_terminal_a_line_is_printed_every_few_steps(
    total: int, done: int, every: int | None, shown: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    run_with([show_progress(total, done, optimizer(), every)], steps(done + 1, total))
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1].partition("/")[0]) for line in lines] == shown
    losses = rf"step +{done + 1}/{total}  loss 2\.000  lr 1\.0e\+00"
    assert re.fullmatch(rf"{losses}  8 tokens/s  (peak \S+ .B  )?\d+ s left", lines[0])


def test_a_line_is_printed_at_once_and_whenever_the_hold_out_was_evaluated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed: list[str] = []
    flushed = []

    def say(text: str, flush: bool) -> None:
        printed.append(text)
        flushed.append(flush)

    monkeypatch.setattr("builtins.print", say)
    taken = [*steps(1, 2), made_up_step(3, eval_loss=1.25), *steps(4, 9)]
    run_with([show_progress(9, 0, optimizer(), every=100)], taken)
    assert [line.split("  ")[0] for line in printed] == ["step 1/9", "step 3/9", "step 9/9"]
    assert "  hold-out 1.250  " in printed[1] and all(flushed)


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(
    ("out", "error", "bar", "lines"),
    [
        (True, True, True, False),
        # minilora finetune > train.log
        (False, True, True, True),
        # minilora finetune 2> errors.log
        (True, False, False, True),
        (False, False, False, True),
    ],
)
def test_a_terminal_gets_a_bar_and_what_is_no_terminal_gets_lines(
    out: bool, error: bool, bar: bool, lines: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed, shown = Stream(out), Stream(error)
    monkeypatch.setattr(sys, "stdout", printed)
    monkeypatch.setattr(sys, "stderr", shown)
    run_with([show_progress(2, 0, optimizer())], steps(1, 2))
    assert ("train: " in shown.getvalue()) == bar
    assert [line.split("  ")[0] for line in printed.getvalue().splitlines()] == (
        ["step 1/2", "step 2/2"] if lines else []
    )
    assert not bar or "loss 2.000, 8 tokens/s" in shown.getvalue()


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_what_is_closed_or_absent_is_no_terminal(stream: io.StringIO | None) -> None:
    """As under pythonw, or in a service."""
    if stream is not None:
        stream.close()
    assert not progress.is_terminal(stream)


def test_the_memory_is_said_to_be_the_peak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "peak_memory", lambda: 1_420_000_000)
    run_with([show_progress(1, 0, optimizer())], steps(1, 1))
    assert "  8 tokens/s  peak 1.42 GB  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (99.4, "99 s"), (99.6, "2 min"), (5960, "99 min"), (6000, "1 h 40 min")],
)
def test_a_duration_is_rounded(seconds: float, shown: str) -> None:
    assert progress.format_duration(seconds) == shown
