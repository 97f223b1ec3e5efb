"""The tables of the course and the equations of docstrings, before they are pages."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def module(name: str) -> Any:
    """A file of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def course() -> Any:
    return module("course")


def test_every_notebook_belongs_to_a_section_of_the_lesson(course: Any) -> None:
    notebooks = course.notebooks()
    assert len(notebooks) >= 8
    assert [n.path for n in notebooks if not n.sections] == []
    numbers = [int(n.number) for n in notebooks]
    assert numbers == sorted(numbers)


def test_sources_and_pages_of_the_lesson_are_there(course: Any) -> None:
    named = [path for section in course.LESSON for path in (*section.sources, *section.pages)]
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_a_question_and_a_time_are_those_of_the_notebook(course: Any, tmp_path: Path) -> None:
    cell = {"source": ["# 12 · A title\n", "\n", "**The question: is it\n", "so?** Text."]}
    path = tmp_path / "12-a-title.ipynb"
    course.ROOT = tmp_path
    for seconds, time in ((61, "2 min"), (60, "1 min"), (None, course.UNKNOWN)):
        metadata = {"minilora": {"seconds": seconds}} if seconds else {}
        path.write_text(json.dumps({"cells": [cell], "metadata": metadata}))
        found = course.read(path)
        assert found[1:] == ("12", "a-title", "A title", "is it so?", time)
    cell["source"] = ["# 12 · A title\n"]
    path.write_text(json.dumps({"cells": [cell], "metadata": {}}))
    with pytest.raises(ValueError, match=r"12-a-title.ipynb: its first cell has no title"):
        course.read(path)
    course.ROOT = ROOT


def test_only_a_mark_is_filled(course: Any) -> None:
    assert course.filled("# A\n\n<!-- else -->\n") == "# A\n\n<!-- else -->\n"
    assert course.filled("<!-- notebooks: Merging -->").startswith("| notebook | its question |")


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        ("v <- b2 v + (1 - b2) g^2", r"v \leftarrow \beta_2 v + (1 - \beta_2) g^2"),
        ("m / (sqrt(v / (1 - x)) + eps)", r"m / (\sqrt{v / (1 - x)} + \varepsilon)"),
        ("<a, b> / |a|^2", r"\langle a, b\rangle / \lvert a\rvert^2"),
        ("argmin_j |code_j - w|", r"\arg\min_j \lvert \mathrm{code}_j - w\rvert"),
    ],
)
def test_an_equation_in_plain_text_becomes_latex(plain: str, expected: str) -> None:
    pytest.importorskip("griffe", reason="the reference is made with griffe")
    assert module("docstrings").latex(plain) == expected


def test_only_the_description_of_a_docstring_has_equations() -> None:
    pytest.importorskip("griffe", reason="the reference is made with griffe")
    text = "Does it.\n\n    a = b        c = d\n\nArgs:\n    x: text\n\n    y = z\n"
    found = module("docstrings").typeset(text)
    assert "$$\n\\begin{gathered}\na = b \\\\\nc = d\n\\end{gathered}\n$$" in found
    assert found.endswith("Args:\n    x: text\n\n    y = z\n")
