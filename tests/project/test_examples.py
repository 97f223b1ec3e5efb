"""Every example in a docstring runs, and every public name has one."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch
from embedded import needs_model

import minilora

MODULES = [
    "show",
    "weight",
    "functional",
    "modules",
    "surgery",
    "merging",
    "checkpoint",
    "plan",
    "optim",
    "retry",
    pytest.param("recipe", marks=needs_model),
    "kernels.reference.nf4",
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = importlib.import_module(f"minilora.{name}")
    result = doctest.testmod(
        module, extraglobs={"torch": torch, "minilora": minilora, "tmp": tmp_path}
    )
    assert result.attempted and not result.failed


@pytest.mark.parametrize("name", minilora.__all__)
def test_every_public_name_has_an_example(name: str) -> None:
    text = getattr(minilora, name).__doc__ or ""
    assert ">>> " in text and "+SKIP" not in text
