"""Runs the notebooks: `python tests/tools/notebooks.py` runs them all and stores their outputs; tests/project/test_notebooks.py compares."""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
LIMIT = 180  # seconds that a cell may take, on two cores
DRIFT = 0.05  # of a measured number: bfloat16 products round otherwise on another processor, and a training goes another way
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?")


def paths() -> list[Path]:
    return sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path, where: Path) -> Any:
    """The notebook with the outputs of a fresh run, in the working directory `where`. An error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    quiet = os.environ | {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1"
    }  # transformers' bars are for who waits, not for who reads
    where_it_runs = {"metadata": {"path": str(where)}}
    client = NotebookClient(
        notebook,
        timeout=LIMIT,
        kernel_name="python3",
        resources=where_it_runs,
        coalesce_streams=True,
    )
    client.execute(env=quiet)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran: another with every run
    return notebook


def printed(notebook: Any, tag: str) -> list[str]:
    """What the cells with this tag print: "headline", what has to stay to the letter; "measured", what may drift a little."""
    cells = [c for c in notebook.cells if tag in c.metadata.get("tags", [])]
    return [
        "".join(o.text for o in c.outputs if o.output_type == "stream" and o.name == "stdout")
        for c in cells
    ]


def drifted(expected: str, found: str) -> list[str]:
    """The numbers that moved by more than DRIFT, "was -> is"; the whole text if anything but a number is another."""
    if NUMBER.sub("#", expected).split() != NUMBER.sub("#", found).split():
        return [f"{expected} -> {found}"]
    pairs = [(a, b) for a, b in zip(NUMBER.findall(expected), NUMBER.findall(found), strict=True)]
    values = [(a, b, float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs]
    return [f"{a} -> {b}" for a, b, was, now in values if abs(now - was) > DRIFT * abs(was)]


def main() -> None:
    for path in [Path(name) for name in sys.argv[1:]] or paths():
        with (
            tempfile.TemporaryDirectory() as scratch
        ):  # what a notebook writes is not left in the repository
            notebook = execute(path, Path(scratch))
        nbformat.write(notebook, path)
        print(path.name)


if __name__ == "__main__":
    main()
