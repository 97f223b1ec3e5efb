"""Every stored notebook still runs, and prints the numbers that are stored in it. `make notebooks` runs this."""

from pathlib import Path

import nbformat
import pytest

pytest.importorskip("nbclient", reason="the notebooks are run with nbclient")
import notebooks


@pytest.mark.notebook
@pytest.mark.filterwarnings("default")  # Jupyter's own
@pytest.mark.parametrize("path", notebooks.paths(), ids=lambda path: path.stem)
def test_a_stored_notebook_runs_and_says_what_it_said(path: Path, tmp_path: Path) -> None:
    stored = nbformat.read(path, as_version=4)
    expected = notebooks.headlines(stored)
    assert expected and all(expected), "nothing in it is tagged as a headline"
    assert notebooks.headlines(notebooks.execute(path, tmp_path)) == expected


@pytest.mark.parametrize("path", notebooks.paths(), ids=lambda path: path.stem)
def test_a_stored_notebook_has_its_outputs_its_question_and_its_solutions(path: Path) -> None:
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    texts = [cell.source for cell in stored.cells if cell.cell_type == "markdown"]
    assert "**The question:" in texts[0]
    assert any("## Exercises" in text for text in texts) and any("### Solutions" in text for text in texts)
    outputs = [output for cell in stored.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "it has no picture"
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
