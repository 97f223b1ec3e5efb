"""Writes the table of docs/how-to/architectures.md: what works with which architecture.

python tests/tools/architecture_table.py
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

# Read once, when huggingface_hub is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from architectures import ARCHITECTURES
from journey import Journey, travel

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "architectures.md"
START, END = "<!-- table -->", "<!-- /table -->"

# What an error or a warning says -> how the table puts it, with the names from all of its kind.
NOTES = {
    r"reads the weight of (.*) without calling": "{}: read without a call, refused",
    r"^(\S+) is part of nn\.MultiheadAttention": "{}: in nn.MultiheadAttention, refused",
    r"^\S+ \((\w+)\) has a forward of its own": "{}: a forward of its own, refused",
    r"matches no linear layer": "no linear layers but the head, refused",
    r"shares? (?:its|a) weight": "layers that share a weight, refused",
    r"^(\d+%) of the parameters": "{} outside of linear layers, warned",
    r"^r=4 is above the rank": "a layer smaller than the rank, warned",
    r"^audit: no gradient": "a part that got no gradient, named by `audit`",
    r"^transformers saves": "transformers itself saves the base otherwise",
    r"^PEFT does not load": "PEFT reads it otherwise, warned",
}


def row_of(dense: Journey, quantized: Journey) -> str:
    """A row of the table."""
    said: dict[str, dict[str, None]] = {}
    for text in (*dense.refused, *dense.warned, *quantized.refused, *quantized.warned):
        note, names = note_of(text)
        said.setdefault(note, {}).update(dict.fromkeys(names))
    notes = "; ".join(note.format(", ".join(names)) for note, names in said.items())

    count = f"{dense.layers} of {dense.linear}"
    in_nf4 = "" if quantized.layers == dense.layers else f", {quantized.layers} in NF4"
    works = "yes" if dense.complete and quantized.complete else "no"
    return f"| `{dense.name}` | {works} | {count}{in_nf4} | {notes} |"


def note_of(text: str) -> tuple[str, list[str]]:
    """How the table puts a message, and the names in it."""
    for pattern, note in NOTES.items():
        if found := re.search(pattern, text):
            return note, [name for names in found.groups() for name in _short(names)]
    raise ValueError(f"the table has no words for: {text}")


def _short(names: str) -> list[str]:
    """Names without the blocks that they are in: `layers.0.mlp.fc1, layers.1.mlp.fc1` is `fc1`."""
    if names.endswith("%"):
        return [names]
    last = [re.split(r" and \d+ more$", name)[0].rpartition(".")[2] for name in names.split(", ")]
    return [f"`{name}`" for name in dict.fromkeys(last)]


def table(folder: Path) -> str:
    """The page with its table made anew, from all architectures."""
    kinds: dict[str, list[str]] = {}
    for name, architecture in ARCHITECTURES.items():
        row = row_of(travel(name, False, folder), travel(name, True, folder))
        kinds.setdefault(architecture.kind, []).append(row)

    head, _, rest = PAGE.read_text().partition(START)
    return f"{head}{START}\n{_tables(kinds.items())}\n{END}{rest.partition(END)[2]}"


def _tables(kinds: Iterable[tuple[str, list[str]]]) -> str:
    text = ""
    for kind, rows in kinds:
        text += f"\n### {kind.capitalize()}\n\n"
        text += (
            "| class | works | layers with an adapter | what is left out, and how it is said |\n"
        )
        text += "|---|---|---|---|\n" + "\n".join(rows) + "\n"
    return text


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        PAGE.write_text(table(Path(temporary)))
    print(f"{PAGE} has {len(ARCHITECTURES)} architectures", file=sys.stderr)
