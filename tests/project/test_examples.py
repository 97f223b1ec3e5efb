"""Every example in a docstring runs, and every public name has one."""

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

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
