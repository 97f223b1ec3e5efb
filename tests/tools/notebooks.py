"""Runs the notebooks and stores their outputs, and how long they took on how many cores.

    python tests/tools/notebooks.py [NOTEBOOK ...]

first_cells.py says in each notebook how long it takes.
tests/project/test_notebooks.py runs them again and compares.
"""

import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"

# Seconds that a cell may take, on two cores.
LIMIT = 400

# By how much a measured number may differ, relatively: another processor rounds bfloat16 products
# differently, and a training run then takes another path.
DRIFT = 0.05

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?")


def paths() -> list[Path]:
    """All of them, in the order of their numbers."""
    return sorted(FOLDER.glob("*.ipynb"), key=lambda path: int(path.name.partition("-")[0]))


def execute(path: Path, where: Path) -> Any:
    """The notebook with the outputs of a fresh run in the folder `where`; errors are raised."""
    notebook = nbformat.read(path, as_version=4)
    # Progress bars are no use to somebody who reads the stored output.
    quiet = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
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
        # The time at which it ran, which differs in every run.
        cell.metadata.pop("execution", None)
    return notebook


def printed(notebook: Any, tag: str) -> list[str]:
    """What the cells with this tag print.

    "headline" has to be reproduced exactly, the numbers of "measured" may differ by `DRIFT`.
    """
    cells = [c for c in notebook.cells if tag in c.metadata.get("tags", [])]
    return [
        "".join(o.text for o in c.outputs if o.output_type == "stream" and o.name == "stdout")
        for c in cells
    ]


def drifted(expected: str, found: str) -> list[str]:
    """The numbers that differ by more than `DRIFT`, as "was -> is".

    The whole text, if anything but a number differs.
    """
    if NUMBER.sub("#", expected).split() != NUMBER.sub("#", found).split():
        return [f"{expected} -> {found}"]
    pairs = [(a, b) for a, b in zip(NUMBER.findall(expected), NUMBER.findall(found), strict=True)]
    values = [(a, b, float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs]
    return [f"{a} -> {b}" for a, b, was, now in values if abs(now - was) > DRIFT * abs(was)]


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    for path in [Path(name) for name in sys.argv[1:]] or paths():
        # What a notebook writes is not left in the repository.
        with tempfile.TemporaryDirectory() as scratch:
            start = time.perf_counter()
            notebook = execute(path, Path(scratch))
            seconds = time.perf_counter() - start
        notebook.metadata.setdefault("minilora", {})
        notebook.metadata["minilora"] |= {"seconds": round(seconds), "cores": cores()}
        nbformat.write(notebook, path)
        print(path.name)


if __name__ == "__main__":
    main()
