"""Files and folders that are either complete or absent.

Every write goes to a folder of its own beside the target, `.NAME.RANDOM.partial`, is forced to the
disk (fsync), and is then renamed. A full disk, Ctrl-C or a kill therefore leaves what was there
before.

The folder is created exclusively, under a random name and for this user alone: nothing that was put
there before is followed or overwritten. Its owner holds a lock on it, which ends with the process.
What a killed process left can thus be told from what another one is writing, and is removed by the
next write of the same target.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from minilora.files.disk_errors import naming

try:
    import fcntl
except ImportError:  # Windows: leftovers of killed processes stay
    fcntl = None  # type: ignore[assignment]


def sync(path: Path) -> None:
    """Blocks until a file's bytes, or the names in a folder, are on the disk."""
    windows = os.name == "nt"
    if windows and path.is_dir():  # cannot be opened there
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Syncs everything in a folder, nested folders included, and then the folder itself."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            file = Path(root, name)
            if not file.is_symlink():
                sync(file)
        sync(Path(root))


@contextmanager
def atomic_files(*paths: Path) -> Iterator[list[Path]]:
    """Yields a temporary path for each target; moves all of them into place if the block succeeds.

    If the block raises, the temporary files are removed and the old files stay. After a kill
    between two renames, `unfinished` finds the files that were not moved.
    """
    with _private_folder(paths[0]) as folder:
        temporary = [folder / path.name for path in paths]
        with naming(paths[0]):
            yield temporary

            for path in temporary:
                sync(path)
            _move_all(temporary, paths, folder)

            # The renames themselves.
            for parent in {path.parent for path in paths}:
                sync(parent)

    # Not before: until here, what a killed process left may be the other half of what is there.
    _remove_leftovers(paths[0])


def _move_all(temporary: Sequence[Path], targets: Sequence[Path], folder: Path) -> None:
    """Moves all files into place; if one of them cannot be moved, those before it are moved back.

    Ctrl-C between two renames is raised after the last one.
    """
    before = [folder / f"{target.name}.before" for target in targets[:-1]]
    for old, target in zip(before, targets, strict=False):
        if target.is_file():
            shutil.copy2(target, old)
    try:
        _rename(temporary, targets)
    except KeyboardInterrupt:
        _rename(temporary, targets)
        raise
    except OSError:
        for path, target, old in zip(temporary, targets, before, strict=False):
            if old.exists():
                old.replace(target)
            elif not path.exists():
                target.unlink()
        raise


def _rename(temporary: Sequence[Path], targets: Sequence[Path]) -> None:
    for path, target in zip(temporary, targets, strict=True):
        if path.exists():
            path.replace(target)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder; syncs it and renames it to `path` if the block succeeds.

    A folder that exists at `path` is replaced. If the block raises, the temporary folder is
    removed and `path` stays as it was.

    Raises:
        NotADirectoryError: `path` is a file.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, where a folder is to be written")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    with _private_folder(path) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        with naming(path):
            yield temporary

            sync_tree(temporary)
            _replace_folder(temporary, path, folder / "replaced")
            sync(path.parent)


def _replace_folder(new: Path, path: Path, aside: Path) -> None:
    if not path.exists() and not path.is_symlink():
        new.rename(path)
        return
    path.rename(aside)
    try:
        new.rename(path)
    except BaseException:
        aside.rename(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_files(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")


def unfinished(first: Path, name: str) -> list[Path]:
    """Files of this name that a killed `atomic_files(first, ...)` left beside their target."""
    found = (folder / name for folder in _temporary_folders(first))
    return [path for path in found if path.is_file() and not path.is_symlink()]


@contextmanager
def _private_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, for this user alone and locked by this process, then removed."""
    folder, lock = _locked_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int | None]:
    while True:
        made = tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        folder = Path(made)
        if fcntl is None:
            return folder, None
        with contextlib.suppress(FileNotFoundError):
            lock = _lock(folder, wait=True)
            # Another process may have taken it for a leftover before it was locked.
            if folder.exists():
                return folder, lock
            if lock is not None:
                os.close(lock)


def _lock(folder: Path, wait: bool) -> int | None:
    """A handle that holds the folder's lock; None: the file system has no locks, or it is taken."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_leftovers(path: Path) -> None:
    """Removes the temporary folders of this target whose process has ended."""
    for folder in _temporary_folders(path) if fcntl is not None else ():
        # It is gone already, or is a link and not ours.
        with contextlib.suppress(OSError):
            lock = _lock(folder, wait=False)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _temporary_folders(path: Path) -> list[Path]:
    # As tempfile.mkdtemp names them.
    name = re.compile(rf"\.{re.escape(path.name)}\.\w{{8}}\.partial")
    found = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(folder for folder in found if name.fullmatch(folder.name))
