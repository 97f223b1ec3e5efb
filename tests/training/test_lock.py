"""One run at a time in a folder; a process that was killed leaves it free.

The lock of Windows is tested with a stand-in of `msvcrt` that has its two names: on Windows itself
none of this has run.
"""

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from interrupted import contents, in_step, interrupt

from minilora.training import FinetuneConfig, finetune, lock
from minilora.training.lock import LOCK, hold_folder

Configure = Callable[..., FinetuneConfig]

HOLDER = f"pid {os.getpid()} on {socket.gethostname()}"


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_the_folder_says_who_works_there(
    resume: bool, resumable: Configure
) -> None:
    config = resumable(resume=resume)
    if resume:
        interrupt(resumable(), 1)
    found: list[Any] = []

    def start_another() -> None:
        before = contents(Path(config.out))
        message = rf"another run is working in .*run \({HOLDER}\)"
        for again in (False, True):
            with pytest.raises(BlockingIOError, match=message):
                finetune(resumable(resume=again))
        found.append(contents(Path(config.out)) == before)

    with in_step(1, start_another):
        finetune(config)
    assert found == [True] and not (Path(config.out) / LOCK).exists()


def test_a_folder_is_free_after_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from minilora.training import lock\n"
        "with lock.hold_folder(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False)
    assert done.returncode == -9 and (tmp_path / "run" / LOCK).exists()
    with hold_folder(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).read_text() == HOLDER
    assert list((tmp_path / "run").iterdir()) == []


def test_what_was_created_for_nothing_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), hold_folder(tmp_path / "a" / "b"):
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_run_that_ended_in_between_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that was opened is removed before it is locked."""
    original, calls = lock._lock, [0]

    def removed_first(path: Path, handle: int) -> None:
        calls[0] += 1
        if calls[0] == 1:
            path.unlink()
        original(path, handle)

    monkeypatch.setattr(lock, "_lock", removed_first)
    with hold_folder(tmp_path), pytest.raises(BlockingIOError), hold_folder(tmp_path):
        pass
    assert calls[0] == 3


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    (tmp_path / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match=LOCK), hold_folder(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "kept"


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    message = "run is not a folder"
    with pytest.raises(NotADirectoryError, match=message), hold_folder(tmp_path / "run"):
        pass


def test_the_lock_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locking(handle: int, mode: int, count: int) -> None:
        assert (mode, count) == (2, 1) and os.lseek(handle, 0, os.SEEK_CUR) >= 1 << 30
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    with hold_folder(tmp_path), pytest.raises(BlockingIOError, match=HOLDER), hold_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_locked_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "msvcrt", None)
    message = "cannot be locked .*no second run"
    with pytest.warns(UserWarning, match=message), hold_folder(tmp_path):
        pass
