"""What accompanies the training loop: its progress and metrics.jsonl.

A callback is a context manager around the loop. On entry it returns a function that is called with
each `Step`; what it opened is closed when the loop ends, with or without an error. Checkpoints
(`CheckpointManager.saving`), the best adapter and TensorBoard are callbacks too.
"""

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from minilora.files.atomic import write_text
from minilora.files.disk_errors import naming
from minilora.optim.adamw import PagedAdamW
from minilora.training.loop import Step
from minilora.training.progress import (
    announce,
    is_terminal,
    steps_as_bar,
    steps_as_lines,
)

AfterStep = Callable[[Step], None]
Callback = AbstractContextManager[AfterStep]


def run_with(callbacks: Sequence[Callback], steps: Iterable[Step]) -> list[Step]:
    """Runs a training loop to its end with callbacks around it; returns its steps."""
    history = []
    with ExitStack() as stack:
        functions = [stack.enter_context(callback) for callback in callbacks]
        for step in steps:
            history.append(step)
            for after_step in functions:
                after_step(step)
    return history


@contextmanager
def show_progress(
    total: int, done: int, optimizer: PagedAdamW, every: int | None = None
) -> Iterator[AfterStep]:
    """Shows loss, speed and memory; at the end, what the optimizer paged.

    A progress bar if standard error is a terminal. Lines on standard output, see `steps_as_lines`,
    unless both are terminals: a log file or a notebook gets them, and no terminal gets a bar that
    lines interrupt.
    """
    has_bar = is_terminal(sys.stderr)
    displays = [steps_as_bar(total, done)] if has_bar else []
    if not (has_bar and is_terminal(sys.stdout)):
        displays.append(steps_as_lines(total, done, every))

    with ExitStack() as stack:
        functions = [stack.enter_context(display) for display in displays]

        def after_step(step: Step) -> None:
            for show in functions:
                show(step)

        yield after_step
    if optimizer.paging.since is not None:
        announce(f"the device ran out of memory: {optimizer.paging}")


@contextmanager
def write_metrics(path: Path, history: Sequence[Step]) -> Iterator[AfterStep]:
    """Writes one line of JSON per step, first those of `history`.

    Lines of later steps, which a run that was killed may have left, are removed.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    with naming(path):
        write_text(path, to_jsonl(history))
        # In bytes: on Windows too, a line ends in one character.
        file = path.open("ab", buffering=0)
    with file:

        def after_step(step: Step) -> None:
            with naming(path):
                write_all(file, to_jsonl([step]).encode())

        yield after_step


def write_all(file: io.FileIO, data: bytes) -> None:
    """Writes all of the bytes to an unbuffered file, or raises OSError."""
    # A disk that is nearly full takes a part of them, and raises an error at the next attempt.
    while data:
        data = data[file.write(data) :]


def to_jsonl(history: Iterable[Step]) -> str:
    """Returns the steps as lines of JSON."""
    return "".join(json.dumps(asdict(step)) + "\n" for step in history)
