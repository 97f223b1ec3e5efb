"""What accompanies the training loop: a progress bar and metrics.jsonl.

A callback is a context manager around the loop. On entry it returns a function that is called with
each `Step`; what it opened is closed when the loop ends, with or without an error. Checkpoints are
a callback too: `CheckpointManager.saving`.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from minilora.files.atomic import write_text
from minilora.files.disk_errors import naming
from minilora.optim.adamw import PagedAdamW
from minilora.reports.formatting import format_bytes
from minilora.training.loop import Step
from minilora.training.progress import peak_memory, progress_bar

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
def show_progress(total: int, done: int, optimizer: PagedAdamW) -> Iterator[AfterStep]:
    """Shows a progress bar with loss, speed and memory; at the end, what the optimizer paged."""
    with progress_bar("train", total, done) as bar:

        def after_step(step: Step) -> None:
            speed = step.tokens / step.seconds
            memory = peak_memory()
            held = f", {format_bytes(memory)}" if memory else ""
            bar.set_postfix_str(f"loss {step.loss:.3f}, {speed:.0f} tokens/s{held}")
            bar.update()

        yield after_step

        if optimizer.paging.since is not None:
            bar.write(f"the device ran out of memory: {optimizer.paging}")


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
                _write_all(file, to_jsonl([step]).encode())

        yield after_step


def _write_all(file: io.FileIO, line: bytes) -> None:
    # A disk that is nearly full takes a part of it, and raises an error at the next attempt.
    while line:
        line = line[file.write(line) :]


def to_jsonl(history: Iterable[Step]) -> str:
    """Returns the steps as lines of JSON."""
    return "".join(json.dumps(asdict(step)) + "\n" for step in history)
