"""Atomic writes: complete and synced, or as if nothing had been tried."""

import os
from pathlib import Path

import pytest

from minilora.files.atomic import atomic_files, atomic_folder, partial_path, write_text


def write_nested(folder: Path) -> set[str]:
    """What `save_pretrained` may leave: files beside subfolders. Returns all relative paths."""
    (folder / "inner" / "deep").mkdir(parents=True)
    names = ["top.txt", "inner/middle.txt", "inner/deep/bottom.txt"]
    for name in names:
        (folder / name).write_text(name)
    return {*names, "inner", "inner/deep", "."}


def test_a_folder_appears_complete_and_everything_in_it_was_synced_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    synced: list[tuple[Path, bool]] = []
    fsync = os.fsync

    def spy(handle: int) -> None:
        synced.append((Path(f"/proc/self/fd/{handle}").readlink(), target.exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    with atomic_folder(target) as partial:
        expected = write_nested(partial)
        assert not target.exists()

    before_rename = {path for path, renamed in synced if not renamed}
    assert before_rename == {partial / name for name in expected}
    assert [path for path, renamed in synced if renamed] == [tmp_path]
    assert (target / "inner" / "deep" / "bottom.txt").read_text() == "inner/deep/bottom.txt"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_a_folder_that_could_not_be_written_leaves_the_old_one(
    error: BaseException, tmp_path: Path
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.txt").write_text("old")

    with pytest.raises(type(error)), atomic_folder(target) as partial:
        write_nested(partial)
        raise error
    assert [p.name for p in target.iterdir()] == ["old.txt"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_replaced_and_what_a_kill_left_is_not_kept(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.txt").write_text("old")
    left = partial_path(target)
    left.mkdir()
    (left / "left.txt").write_text("left by a kill")

    with atomic_folder(target) as partial:
        (partial / "new.txt").write_text("new")
    assert [p.name for p in target.iterdir()] == ["new.txt"]
    assert list(tmp_path.iterdir()) == [target]


def test_several_files_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("old")
    with pytest.raises(ValueError, match="stop"), atomic_files(one, two) as temporary:
        for path in temporary:
            path.write_text("half")
        raise ValueError("stop")
    assert one.read_text() == "old" and list(tmp_path.iterdir()) == [one]

    with atomic_files(one, two) as temporary:
        for path in temporary:
            path.write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
    assert one.read_text() == two.read_text() == "new"


def test_text_is_written_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "one\n")
    write_text(tmp_path / "a.txt", "two\n")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["two\n"]
