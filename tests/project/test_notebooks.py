"""Every notebook still runs, and prints the numbers that are stored in it: `make notebooks`."""

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

import minilora

pytest.importorskip("nbclient", reason="the notebooks are run with nbclient")
import notebooks

# What a notebook may name beside minilora.__all__ and the kernels that it explains: the demo's
# data, the model, and how an example becomes a loss. Module -> names.
ALSO = {
    "demo.orders": {"make_orders"},
    "demo.sheets": {"read_sheets", "split_by_tool"},
    "huggingface": {"load_dense", "generate", "gradient_checkpointing"},
    "training.data": {"encode", "load_examples"},
    "training.batches": {"collate"},
    "training.loss": {"evaluate"},
}
EACH = pytest.mark.parametrize("path", notebooks.paths(), ids=lambda path: path.stem)


@pytest.mark.notebook
@pytest.mark.filterwarnings("default")  # Jupyter's own
@EACH
def test_a_stored_notebook_runs_and_prints_what_it_printed(path: Path, tmp_path: Path) -> None:
    stored = nbformat.read(path, as_version=4)
    expected = notebooks.printed(stored, "headline")
    assert expected and all(expected), "nothing in it is tagged as a headline"
    found = notebooks.execute(path, tmp_path)
    assert notebooks.printed(found, "headline") == expected
    measured = zip(
        notebooks.printed(stored, "measured"), notebooks.printed(found, "measured"), strict=True
    )
    assert [line for was, now in measured for line in notebooks.drifted(was, now)] == []


@EACH
def test_a_stored_notebook_has_its_outputs_its_question_and_its_solutions(path: Path) -> None:
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    texts = [cell.source for cell in stored.cells if cell.cell_type == "markdown"]
    assert "**The question:" in texts[0]
    assert any("## Exercises" in text for text in texts)
    assert any("### Solutions" in text for text in texts)
    outputs = [
        output for cell in stored.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert any("image/png" in output.get("data", {}) for output in outputs), "it has no picture"
    assert not any(
        output.output_type == "error" or output.get("name") == "stderr" for output in outputs
    )


@EACH
def test_a_notebook_names_public_things_only(path: Path) -> None:
    cells = [
        cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"
    ]
    assert [name for cell in cells for name in private(ast.parse(cell))] == []


def private(tree: ast.AST) -> list[str]:
    """What the code names of minilora that is not public."""
    named = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    named += [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    named += [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    dotted = [name for name in named if re.fullmatch(r"minilora\.[\w.]+", name)]
    names = [name.removeprefix("minilora.") for name in dotted]
    return [name for name in names if not public(name)]


def public(name: str) -> bool:
    parts = name.split(".")
    if any(part.startswith("_") for part in parts):
        return False
    if parts[0] == "kernels" or parts[0] in minilora.__all__:
        return True
    module, _, last = name.rpartition(".")
    return last in ALSO.get(module, ()) or any(f"{also}.".startswith(f"{name}.") for also in ALSO)


@EACH
def test_the_links_of_a_notebook_lead_somewhere(path: Path) -> None:
    texts = [
        cell.source
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "markdown"
    ]
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", "\n".join(texts))
    assert [
        link
        for link in links
        if not link.startswith("https://") and not (path.parent / link).exists()
    ] == []


@pytest.mark.parametrize(
    ("was", "now", "moved"),
    [
        ("loss 2.70, 1,000 bytes", "loss 2.80, 1,020 bytes", 0),
        ("loss 2.70", "loss 2.90", 1),
        ("loss 2.70, then 2.50", "loss 2.00, then 3.00", 2),
        ("loss -0.5", "loss 0.5", 1),
        ("loss 0", "loss 0.1", 1),
        ("1e-3", "2e-3", 1),
        ("q_proj 2.7", "k_proj 2.7", 1),
        ("2.7", "2.7 2.7", 1),
    ],
)
def test_a_measured_text_may_drift_by_five_percent_and_no_more(
    was: str, now: str, moved: int
) -> None:
    assert len(notebooks.drifted(was, now)) == moved


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import minilora\nminilora.inject(m)\nminilora.kernels.reference.nf4.NF4", []),
        (
            "from minilora.training.loss import evaluate, token_losses",
            ["training.loss.token_losses"],
        ),
        ("from minilora.huggingface import generate, load_dense", []),
        ("from minilora.kernels.reference import codebooks, nf4", []),
        ("import minilora.surgery", ["surgery"]),
        ("minilora.plan(m).__dict__", []),
        ("minilora.huggingface._x", ["huggingface._x"]),
        ("from minilora import adapted", ["adapted"]),
    ],
)
def test_private_names_are_seen(code: str, found: list[Any]) -> None:
    assert private(ast.parse(code)) == found
