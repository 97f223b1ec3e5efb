"""Standard input and output: a terminal, or a pipe into which a program writes."""

import contextlib
import io
import sys
from collections.abc import Callable
from typing import IO

from minilora.files.text import shown_lines


class Console:
    """Reads messages, and shows answers and notes.

    On a terminal there are prompts, lines can be edited where Python has readline, and what would
    control the terminal is escaped. Otherwise a message is a line of input in UTF-8, and the output
    is the answers and nothing else.

    Args:
        stdin, stdout: the terminal, if both are one: those of the process.
        note: where a note goes if there is no terminal.
    """

    def __init__(self, stdin: IO[str], stdout: IO[str], note: Callable[[str], object]) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.is_terminal = stdin.isatty() and stdout.isatty()
        self._note = note

        if isinstance(stdin, io.TextIOWrapper):
            # Any line can be read, so that `read` can say which one is not text.
            encoding = None if self.is_terminal else "utf-8"
            stdin.reconfigure(encoding=encoding, errors="surrogateescape")
        if self.is_terminal:
            # Importing it is what makes `input` use it.
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401

    def read(self, prompt: str) -> str | None:
        """Returns the next line without its end; None at the end of input (Ctrl-D).

        Raises:
            ValueError: the line is not UTF-8 text. The next one can be read.
        """
        line = self._read_line(prompt)
        try:
            return line and line.encode(errors="surrogateescape").decode().rstrip("\r\n")
        except UnicodeError as error:
            raise ValueError(f"standard input is not UTF-8 text: {error}") from error

    def _read_line(self, prompt: str) -> str | None:
        """The next line, in which a byte that is not text is half a character."""
        if not self.is_terminal:
            return self.stdin.readline() or None
        with contextlib.suppress(EOFError):
            return input(prompt)
        self.write("\n")
        return None

    def write(self, text: str) -> None:
        """Shows a part of an answer at once."""
        self.stdout.write(shown_lines(text) if self.stdout.isatty() else text)
        self.stdout.flush()

    def decorate(self, text: str) -> None:
        """Shows what only a person at a terminal needs."""
        if self.is_terminal:
            self.write(text)

    def note(self, text: str) -> None:
        """Shows a line that is not part of an answer."""
        if self.is_terminal:
            self.write(f"{text}\n")
        else:
            self._note(text)


def print_answer(text: str, stdout: IO[str] | None) -> None:
    """Prints a model's text and a new line: as it is, unless it goes to a terminal."""
    if stdout is not None:
        stdout.write((shown_lines(text) if stdout.isatty() else text) + "\n")


def read_prompt(prompt: str) -> str:
    """Returns a prompt of the command line; '-' is standard input.

    Raises:
        ValueError: it is not UTF-8 text, or standard input is closed.
    """
    name, text = "--prompt", prompt.encode(errors="surrogateescape")
    if prompt == "-":
        if sys.stdin is None:
            raise ValueError("--prompt -: standard input is closed")
        name, text = "standard input", sys.stdin.buffer.read()
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from error
