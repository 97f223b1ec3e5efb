"""The file of what was measured on a card: written whole, merged, and never believed unread."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="what is tuned is written in Triton")

from minilora.kernels.gpu import tuned

CARD = "NVIDIA H100 80GB HBM3"
DENSE = {"path": "dense"}
TILE = {"path": "tile", "BM": 64, "BO": 64, "BI": 64, "warps": 4, "stages": 4}
LINES = [{"rows": 16, "path": "skinny"}, {"rows": 64, "weights": 4096} | TILE, DENSE]
TABLE = {"forward": LINES, "backward": [DENSE]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_what_is_stored_is_loaded(cache: Path) -> None:
    assert tuned.load(CARD) is None
    path = tuned.store(CARD, {(4096, 11008): TABLE})
    assert path == cache / "minilora" / "NVIDIA-H100-80GB-HBM3.json"
    assert tuned.load(CARD) == {(4096, 11008): TABLE}
    assert tuned.load("NVIDIA T4") is None


def test_other_shapes_are_added_and_the_same_replaced(cache: Path) -> None:
    dense = {"forward": [DENSE], "backward": [DENSE]}
    tuned.store(CARD, {(64, 64): TABLE, (64, 128): TABLE})
    path = tuned.store(CARD, {(64, 128): dense, (32, 64): dense})
    assert tuned.load(CARD) == {(32, 64): dense, (64, 64): TABLE, (64, 128): dense}

    # Nothing is left beside the file.
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tuned.store(CARD, {(64, 64): TABLE})

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        tuned.store(CARD, {(64, 128): TABLE})
    assert tuned.load(CARD) == {(64, 64): TABLE}
    assert list(path.parent.iterdir()) == [path]


def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A path that is not absolute is to be ignored, says the XDG Base Directory Specification.
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert tuned.file_of("a/../b").parent == tmp_path / ".cache" / "minilora"
    assert tuned.file_of("a/../b").name == "a-b.json"


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ([], "last line"),
        ([{"rows": 1, "path": "skinny"}], "last line"),
        ([{"rows": 1, "path": "fast"}, DENSE], "no path"),
        ([["rows", 1], DENSE], "no path"),
        ([{"path": "skinny"}, DENSE], "does not say path, rows"),
        ([{"rows": 1} | TILE | {"colour": 1}, DENSE], "does not say BI, BM, BO, path, rows"),
        ([{"rows": True, "path": "skinny"}, DENSE], "no positive integer for rows"),
        ([{"rows": 1, "weights": -1, "path": "dense"}, DENSE], "positive integer for weights"),
        ([{"rows": 1} | TILE | {"BM": 48}, DENSE], "BM that is none of"),
        ([{"rows": 9, "path": "dense"}, {"rows": 1} | TILE, DENSE], "after a line of 9 rows"),
        ([{"rows": 65, "path": "skinny"}, DENSE], "at most 64 rows"),
    ],
    ids=str,
)
def test_a_table_that_is_not_sound_is_refused(lines: Any, fault: str, cache: Path) -> None:
    with pytest.raises(ValueError, match=fault):
        tuned.store(CARD, {(64, 64): {"forward": lines, "backward": [DENSE]}})
    assert list(cache.iterdir()) == []

    # Nor is it read.
    path = tuned.store(CARD, {(64, 64): TABLE})
    content = json.loads(path.read_text())
    content["weights"][0]["forward"] = lines
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=fault):
        assert tuned.load(CARD) is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"card": "NVIDIA T4"}, "card 'NVIDIA T4', this is 'NVIDIA H100 80GB HBM3'"),
        ({"triton": "2.0"}, "triton '2.0'"),
        ({"weights": None}, "no tables"),
        ({"weights": [1]}, "no shape"),
        ({"weights": [{"shape": [0, 64], **TABLE}]}, "no shape"),
        ({"weights": [{"shape": [64, 64], "forward": LINES}]}, "backward: a list"),
    ],
    ids=str,
)
def test_a_file_that_is_foreign_or_incomplete_is_left_alone(
    change: dict[str, Any], fault: str
) -> None:
    path = tuned.store(CARD, {(64, 64): TABLE})
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.warns(UserWarning, match=rf"H100.*\.json is not used .*{fault}"):
        assert tuned.load(CARD) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff", "[" * 100000], ids=len)
def test_a_damaged_file_is_left_alone(text: str) -> None:
    path = tuned.store(CARD, {(64, 64): TABLE})
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match="is not used"):
        assert tuned.load(CARD) is None
