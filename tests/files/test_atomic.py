"""Atomic writes: complete and synced, or as if nothing had been tried."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from minilora.files.atomic import atomic_files, atomic_folder, write_text


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


def killed_in(
    enter: Callable[[], AbstractContextManager[Any]], write: Callable[[Any], Any]
) -> None:
    """Enters the context in a child that writes and then dies, so that no `finally` runs."""
    pid = os.fork()
    if pid == 0:
        context = enter()
        write(context.__enter__())
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_folder_is_replaced_and_what_a_kill_left_is_not_kept(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.txt").write_text("old")
    killed_in(lambda: atomic_folder(target), lambda partial: (partial / "a.txt").write_text("a"))
    assert len(list(tmp_path.iterdir())) == 2

    with atomic_folder(target) as partial:
        (partial / "new.txt").write_text("new")
    assert [p.name for p in target.iterdir()] == ["new.txt"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_kill_left_is_removed_and_what_is_being_written_is_not(
    kind: str, tmp_path: Path
) -> None:
    target = tmp_path / "target"

    def write() -> AbstractContextManager[Any]:
        return atomic_files(target) if kind == "file" else atomic_folder(target)

    def fill(temporary: Any) -> None:
        path = temporary[0] if kind == "file" else temporary / "inner"
        path.write_text("text")

    for _ in range(3):
        killed_in(write, fill)
    with write() as mine:
        fill(mine)
        with write() as other:
            fill(other)
        assert len(list(tmp_path.glob(".target.*"))) == 1
        fill(mine)
    assert list(tmp_path.iterdir()) == [target]


def test_nothing_that_was_planted_is_followed_or_removed(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.mkdir()
    (victim / "a.txt").write_text("mine")
    folder.mkdir()
    (folder / ".a.txt.partial").symlink_to(victim / "a.txt")
    (folder / ".a.txt.12345678.partial").symlink_to(victim, target_is_directory=True)
    (folder / ".b.partial").symlink_to(victim, target_is_directory=True)

    write_text(folder / "a.txt", "new")
    with atomic_folder(folder / "b") as partial:
        (partial / "c.txt").write_text("new")
    assert (victim / "a.txt").read_text() == "mine"
    assert (folder / "a.txt").read_text() == "new" and not (folder / "a.txt").is_symlink()
    assert [p.name for p in (folder / "b").iterdir()] == ["c.txt"]


def test_a_link_at_the_target_is_replaced_and_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.txt").write_text("mine")
    (tmp_path / "b").symlink_to(elsewhere, target_is_directory=True)
    with atomic_folder(tmp_path / "b") as partial:
        (partial / "c.txt").write_text("new")
    assert not (tmp_path / "b").is_symlink() and (elsewhere / "a.txt").read_text() == "mine"


@pytest.mark.parametrize("there", [True, False])
def test_if_one_file_cannot_be_moved_the_others_are_moved_back(there: bool, tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    if there:
        first.write_text("old")
    (second / "inner").mkdir(parents=True)
    with pytest.raises(OSError), atomic_files(first, second) as files:
        for file in files:
            file.write_text("new")
    assert first.exists() == there and (not there or first.read_text() == "old")
    assert sorted(tmp_path.iterdir()) == sorted([first, second] if there else [second])


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(NotADirectoryError, match="a is a file"), atomic_folder(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_text() == "mine"


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "target", Path.rename
    target.mkdir()
    (target / "old.txt").write_text("old")

    def fail(path: Path, to: Path) -> Path:
        if path.name == "target" and path.parent != tmp_path:
            raise OSError("cannot be renamed")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="cannot be renamed"), atomic_folder(target):
        pass
    assert [p.name for p in target.iterdir()] == ["old.txt"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_and_folders_have_the_mode_that_the_umask_gives(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "a")
        with atomic_folder(tmp_path / "b") as partial:
            (partial / "c.txt").write_text("c")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o777 & ~umask


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


def test_ctrl_c_between_two_renames_does_not_leave_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = [tmp_path / "a", tmp_path / "b"]
    for target in targets:
        target.write_text("old")
    original, calls = Path.replace, [0]

    def interrupted(path: Path, target: Path) -> Path:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return original(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_files(*targets) as temporary:
        for path in temporary:
            path.write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert [target.read_text() for target in targets] == ["new", "new"]


@pytest.mark.parametrize("write", [atomic_files, atomic_folder])
def test_a_disk_that_is_full_when_it_is_synced_is_named(
    write: Callable[[Path], AbstractContextManager[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    target = tmp_path / "target"
    with (
        pytest.raises(OSError, match=r"target could not be written: .*No space"),
        write(target) as t,
    ):
        (t[0] if isinstance(t, list) else t / "inner").write_text("text")
    assert list(tmp_path.iterdir()) == []
