"""Standard output and standard error of the command line."""

import contextlib
import io
import os
import sys
import warnings

from minilora.huggingface.messages import one_line

LONGEST_MESSAGE = 3000


def prepare_output() -> None:
    """One line per warning, no progress bars in files, and text that any terminal can show."""
    if sys.stderr is None or not sys.stderr.isatty():
        # The progress bars of transformers.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Their warnings are for programmers; what a user has to know is checked here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Prints one line to standard error; what controls a terminal is escaped."""
    if sys.stderr is not None:
        print(f"minilora: {one_line(text, LONGEST_MESSAGE)}", file=sys.stderr)


def discard_output() -> None:
    """Makes sure that what could not be written is not written again at exit."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
