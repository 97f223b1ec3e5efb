"""Every notebook begins alike: a badge, its time, what it needs, and a cell that installs it."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

pytest.importorskip("nbclient", reason="tests/tools/notebooks.py runs notebooks with it")
import first_cells
import readme

import notebooks

EACH = pytest.mark.parametrize("path", notebooks.paths(), ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


@EACH
def test_a_notebook_begins_with_what_the_tool_writes(path: Path) -> None:
    stored = read(path)
    assert stored == first_cells.with_first_cells(stored, path.name), (
        "out of date: python tests/tools/first_cells.py"
    )


def edited(notebook: Any, cell: str, was: str, now: str) -> None:
    (found,) = [c for c in notebook.cells if c.id == cell]
    assert was in found.source
    found.source = found.source.replace(was, now)


@pytest.mark.parametrize(
    "edit",
    [
        lambda n: edited(n, "begin", "Time:", "About:"),
        lambda n: edited(n, "begin", first_cells.REPOSITORY[-8:], "another"),
        lambda n: edited(n, "install", "--no-deps", "--deps"),
        lambda n: n.cells.reverse(),
        lambda n: n.metadata["minilora"].update(seconds=3600),
        lambda n: n.metadata["minilora"].update(needs="nothing"),
    ],
    ids=["heading", "badge", "install", "order", "time", "needs"],
)
def test_a_change_is_seen(edit: Callable[[Any], object]) -> None:
    path = notebooks.paths()[0]
    changed = read(path)
    edit(changed)
    assert changed != first_cells.with_first_cells(changed, path.name)


def test_the_badge_is_up_to_date() -> None:
    badge = readme.badge("open in", "Colab", readme.ORANGE)
    assert first_cells.BADGE.read_text() == badge


def test_the_repository_is_named_in_one_place() -> None:
    """Everything else takes it from there: addresses of Colab, and what pip installs."""
    sources = [p for p in (readme.ROOT / "tests").rglob("*.py") if p != Path(__file__)]
    named = [p.name for p in sources if first_cells.REPOSITORY in p.read_text()]
    assert named == ["first_cells.py"]
    assert first_cells.REPOSITORY in first_cells.INSTALL
    owner_and_name = first_cells.REPOSITORY.removeprefix("https://github.com/")
    assert f"/github/{owner_and_name}/" in first_cells.colab("x.ipynb")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(5, "about a minute"), (60, "about a minute"), (61, "about 2 minutes"), (150, "about 3 min")],
)
def test_times_are_rounded_up(seconds: float, said: str) -> None:
    assert first_cells.minutes(seconds).startswith(said)


def test_all_of_them_together_fit_into_fifteen_minutes_of_two_cores() -> None:
    facts = [read(path).metadata["minilora"] for path in notebooks.paths()]
    core_seconds = sum(fact["seconds"] * fact["cores"] for fact in facts)
    assert len(facts) == 12 and 0 < core_seconds <= 2 * 15 * 60


def imports_of(notebook: Any) -> str:
    """All import statements of a notebook, in their order."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    statements = [node for cell in cells for node in ast.parse(cell).body]
    wanted = [n for n in statements if isinstance(n, ast.Import | ast.ImportFrom)]
    return "\n".join(map(ast.unparse, wanted))


def run(command: list[str | Path], where: Path) -> str:
    """What it prints. It sees nothing of this environment's packages."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=where, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.soak
def test_the_first_cells_install_what_the_notebooks_import(tmp_path: Path) -> None:
    """In an empty virtual environment, with a wheel of this source in the repository's place."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "-w", tmp_path, readme.ROOT], tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    run([sys.executable, "-m", "venv", tmp_path / "env"], tmp_path)
    python = tmp_path / "env" / "bin" / "python"

    for path in notebooks.paths():
        notebook = read(path)
        (install,) = [cell.source for cell in notebook.cells if cell.id == "install"]
        assert install.count(first_cells.SOURCE) == 1
        script = tmp_path / f"{path.stem}.py"
        where = "import minilora\nprint(minilora.__file__)"
        local = install.replace(first_cells.SOURCE, wheel.as_uri())
        script.write_text(f"{local}\n{imports_of(notebook)}\n{where}\n")
        imported_from = run([python, "-I", script], tmp_path).split()[-1]
        assert Path(imported_from).is_relative_to(tmp_path / "env")
