"""The README's snippet runs as shown; every public name has an example, and all of them run."""

import ast
import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import clean_install
import pytest
import sizes
import torch
from embedded import needs_model

import minilora

EXAMPLE = re.compile(r"^ *>>> .*$", re.MULTILINE)


def modules() -> list[Any]:
    """Every module that has examples; one that trains the demo's model needs it."""
    found: list[Any] = []
    for path in sizes.library_files():
        examples = "\n".join(EXAMPLE.findall(path.read_text()))
        parts = path.relative_to(sizes.ROOT).with_suffix("").parts
        name = ".".join(parts if parts[0] == "minilora" else ("minilora", *parts))
        if "smollm2" in examples:
            found.append(pytest.param(name, marks=needs_model))
        elif examples:
            found.append(name)
    return found


@pytest.mark.parametrize("name", modules())
def test_the_examples_of_a_module_run(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = importlib.import_module(name)
    result = doctest.testmod(
        module, extraglobs={"torch": torch, "minilora": minilora, "tmp": tmp_path}
    )
    assert result.attempted and not result.failed


@pytest.mark.parametrize("name", minilora.__all__)
def test_every_public_name_has_an_example(name: str) -> None:
    text = getattr(minilora, name).__doc__ or ""
    assert ">>> " in text and "+SKIP" not in text


def test_the_examples_of_the_core_are_among_them() -> None:
    names = {getattr(module, "values", [module])[0] for module in modules()}
    assert {"minilora.nf4", "minilora.surgery", "minilora.kernels.reference.codebooks"} <= names


def test_the_snippet_of_the_readme_prints_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown = clean_install.snippet()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    series = clean_install.losses(printed)
    assert clean_install.falls(series)
    assert re.sub(r"\d+\.\d+", "", printed) == re.sub(r"\d+\.\d+", "", shown)
    assert series == pytest.approx(clean_install.losses(shown), rel=0.05)

    # Saved for this model, and merged: the plain layers compute what was trained.
    assert {p.name for p in (tmp_path / "my-adapter").iterdir()} >= {"adapter_model.safetensors"}
    kinds = {type(module) for module in names["model"].modules()}
    assert kinds == {torch.nn.Sequential, torch.nn.Linear, torch.nn.GELU}
    error = torch.nn.functional.mse_loss(names["model"](names["x"]), names["y"]).item()
    assert error == pytest.approx(series[-1], rel=0.05)


def test_the_snippet_is_short_and_needs_the_core_alone() -> None:
    code, _ = clean_install.snippet()
    assert len(code.splitlines()) <= 20
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or node.names[0].name]
    }
    assert imported == {"minilora", "torch"}
    used = set(re.findall(r"minilora\.(\w+)", code))
    assert used == {"quantize", "inject", "adapter_parameters", "save_adapter", "merge"}


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        ([2.0, 0.5, 0.1], True),
        ([2.0, 0.5, 0.3], False),
        ([2.0, 0.05, 0.1], False),
        ([2.0, 0.1], False),
        ([], False),
    ],
    ids=["falls", "not far", "rises at the end", "too short", "nothing printed"],
)
def test_which_losses_fall(series: list[float], expected: bool) -> None:
    assert clean_install.falls(series) == expected
    assert clean_install.losses("".join(f"step 1  loss {x:.4f}\n" for x in series)) == series
