"""What a user sees while a run is working: a progress bar or lines, and the peak memory."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import torch
from torch import nn

from minilora.huggingface.loading import release_checkpoint_memory
from minilora.reports.formatting import format_bytes
from minilora.surgery import quantize_steps
from minilora.training.loop import Step

resource: Any
try:
    import resource
except ImportError:
    # Windows.
    resource = None

# Of a run whose progress is shown in lines, unless it says how often.
LINES_PER_RUN = 20


def announce(text: str) -> None:
    """Prints a line to standard output at once, even if that is a pipe or a file."""
    print(text, flush=True)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal; one that is closed or absent is not."""
    return stream is not None and not stream.closed and stream.isatty()


def progress_bar(description: str, total: int | None = None, done: int = 0) -> Any:
    """Returns a tqdm progress bar, which prints nothing if stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(desc=description, total=total, initial=done, disable=None, dynamic_ncols=True)


@contextmanager
def steps_as_bar(total: int, done: int) -> Iterator[Callable[[Step], None]]:
    """Shows the steps as a progress bar with loss, speed and memory."""
    with progress_bar("train", total, done) as bar:

        def after_step(step: Step) -> None:
            speed = step.tokens / step.seconds
            bar.set_postfix_str(", ".join([*_losses(step), *_cost(speed)]))
            bar.update()

        yield after_step


@contextmanager
def steps_as_lines(total: int, done: int, every: int | None) -> Iterator[Callable[[Step], None]]:
    """Prints a line for the first step, the last one, evaluated ones, and one in `every`.

    Args:
        total: number of steps of the run.
        done: number of steps that were taken before.
        every: default: about 20 lines per run.
    """
    every = every or max(1, round(total / LINES_PER_RUN))
    start = time.monotonic()
    tokens, seconds = 0, 0.0

    def after_step(step: Step) -> None:
        nonlocal tokens, seconds
        tokens, seconds = tokens + step.tokens, seconds + step.seconds

        ends = step.step in (done + 1, total)
        if not (ends or step.step % every == 0 or step.eval_loss is not None):
            return
        per_step = (time.monotonic() - start) / (step.step - done)
        left = format_duration(per_step * (total - step.step))
        where = f"step {step.step:>{len(str(total))}}/{total}"
        rate = f"lr {step.lr:.1e}"
        announce("  ".join([where, *_losses(step), rate, *_cost(tokens / seconds), f"{left} left"]))
        tokens, seconds = 0, 0.0

    yield after_step


def _losses(step: Step) -> list[str]:
    held_out = [] if step.eval_loss is None else [f"hold-out {step.eval_loss:.3f}"]
    return [f"loss {step.loss:.3f}", *held_out]


def _cost(speed: float) -> list[str]:
    memory = peak_memory()
    return [f"{speed:.0f} tokens/s", *([f"peak {format_bytes(memory)}"] if memory else [])]


def format_duration(seconds: float) -> str:
    """Returns a duration, rounded.

    Example:
        >>> format_duration(42.4), format_duration(600), format_duration(7500)
        ('42 s', '10 min', '2 h 5 min')
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def quantize_with_progress(model: nn.Module, **options: Any) -> None:
    """Quantizes a model in place, like `minilora.quantize`, with a progress bar."""
    with progress_bar("quantize") as bar:
        for done, total in quantize_steps(model, **options):
            bar.total = total
            bar.update(done - bar.n)
    release_checkpoint_memory(model)


def peak_memory() -> int:
    """Returns the most bytes that this process has held: on the GPU if it used one, else in RAM.

    0: the system does not say (Windows).
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()

    if resource is None:
        return 0

    # Linux reports kilobytes, macOS bytes.
    used: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used
