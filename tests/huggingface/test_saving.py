"""A model is saved whole or not at all, and where it cannot be is said before any work."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError

from minilora.huggingface.saving import check_new_path, save_model


@pytest.mark.parametrize("error", [SafetensorError("I/O error: No space left"), OSError("full")])
def test_a_full_disk_leaves_nothing(error: Exception, tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        (path / "model.safetensors").write_text("half")
        raise error

    model: Any = SimpleNamespace(save_pretrained=fails)
    with pytest.raises(OSError, match=r"merged could not be written"):
        save_model(model, SimpleNamespace(), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_what_exists_and_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name in (".", "file", "link"):
        with pytest.raises(ValueError, match="already exists"):
            check_new_path(tmp_path / name)
    with pytest.raises(NotADirectoryError, match="file is not a folder"):
        check_new_path(tmp_path / "file" / "x")
    assert check_new_path(str(tmp_path / "a" / "b/")) == tmp_path / "a" / "b"
