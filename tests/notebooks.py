"""Runs the notebooks: `python tests/notebooks.py` runs them all and stores their outputs; tests/test_notebooks.py compares."""

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
LIMIT = 180  # seconds, of two cores


def paths() -> list[Path]:
    return sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path, where: Path) -> Any:
    """The notebook with the outputs of a fresh run, in the working directory `where`. An error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": str(where)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran: another with every run
    return notebook


def headlines(notebook: Any) -> list[str]:
    """What the cells that are tagged "headline" print."""
    cells = [c for c in notebook.cells if "headline" in c.metadata.get("tags", [])]
    return ["".join(o.text for o in c.outputs if o.output_type == "stream" and o.name == "stdout") for c in cells]


def main() -> None:
    for path in [Path(name) for name in sys.argv[1:]] or paths():
        nbformat.write(execute(path, FOLDER), path)
        print(path.name)


if __name__ == "__main__":
    main()
