"""One run at a time in a folder: a lock on OUT/.minilora.lock for as long as the run lasts.

The operating system holds the lock (`flock`; on Windows `msvcrt.locking`) and releases it when the
process ends, however it ends: a run that was killed leaves a file that locks nothing. The file
says who holds it. On NFS a lock is seen by other machines only if the server supports locks.
"""

import os
import socket
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:
    fcntl = None

msvcrt: Any
try:
    import msvcrt
except ImportError:
    msvcrt = None

LOCK = ".minilora.lock"

# msvcrt locks bytes, which nobody else can read then: one far behind the text.
_LOCKED_BYTE = 1 << 30

# How often the file may vanish between being opened and being locked.
_TRIES = 100


@contextmanager
def hold_folder(out: Path) -> Iterator[None]:
    """Holds a run's folder inside the block; the folder is created if it does not exist.

    Afterwards the lock's file is removed, and so are folders that were created and are empty.

    Raises:
        BlockingIOError: another run holds the folder; the message says which.
        OSError: the folder cannot be created or written to.
    """
    created: list[Path] = []
    handle = None
    try:
        handle = _locked(out, created)
        yield
    finally:
        if handle is not None:
            _release(out / LOCK, handle)
        for folder in reversed(created):
            with suppress(OSError):
                folder.rmdir()


def _locked(out: Path, created: list[Path]) -> int:
    """Returns the handle of the locked file; adds the folders that it creates to `created`."""
    path = out / LOCK
    for _ in range(_TRIES):
        _make_folders(out, created)
        try:
            handle = _open(path)
        except FileNotFoundError:
            # The run before removed the folder, which was empty.
            continue
        try:
            _lock(path, handle)
            if _is_still(path, handle):
                _write_holder(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        # The run before ended and removed the file that this one had opened.
        os.close(handle)
    raise OSError(f"{path} vanished {_TRIES} times while it was being locked: start the run again")


def _make_folders(out: Path, created: list[Path]) -> None:
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    for folder in reversed(missing):
        with suppress(FileExistsError):
            folder.mkdir()
            created.append(folder)
    if not out.is_dir():
        raise NotADirectoryError(f"{out} is not a folder: choose another output folder")


def _open(path: Path) -> int:
    # Not through a symbolic link: what it leads to is not the run's.
    no_follow = getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | no_follow, 0o644)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path} is not a regular file: remove it")
    return handle


def _lock(path: Path, handle: int) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            _warn(path, "this Python has neither fcntl nor msvcrt")
    except (BlockingIOError, PermissionError):
        raise BlockingIOError(
            f"another run is working in {path.parent} ({_holder(handle)}): wait until it has "
            "ended, or choose another output folder"
        ) from None
    except OSError as error:
        _warn(path, str(error))


def _warn(path: Path, reason: str) -> None:
    warnings.warn(
        f"{path} cannot be locked ({reason}): make sure that no second run works in this folder",
        stacklevel=2,
    )


def _is_still(path: Path, handle: int) -> bool:
    """Whether the file that was opened is the one that is there."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _write_holder(handle: int) -> None:
    text = f"pid {os.getpid()} on {socket.gethostname()}"
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, text.encode())


def _holder(handle: int) -> str:
    os.lseek(handle, 0, os.SEEK_SET)
    text = os.read(handle, 200).decode(errors="replace")
    return ascii(text)[1:-1] or "which has only just begun"


def _release(path: Path, handle: int) -> None:
    # Removed while it is locked, so that nobody removes the file of the next run. Windows removes
    # no file that is open.
    with suppress(OSError):
        path.unlink()
    if fcntl is not None:
        # By name, in case that a child process has inherited the handle.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)
