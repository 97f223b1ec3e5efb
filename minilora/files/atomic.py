"""Files and folders that are either complete or absent.

Every write goes to a temporary name beside its target, is forced to the disk (fsync), and is then
renamed. A full disk, Ctrl-C or a kill therefore leaves what was there before.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Returns the temporary name of a file or folder while it is being written."""
    return path.with_name(f".{path.name}.partial")


def sync(path: Path) -> None:
    """Blocks until a file's bytes, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
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

    If the block raises, the temporary files are removed and the old files stay.
    """
    temporary = [partial_path(path) for path in paths]
    try:
        yield temporary

        for path in temporary:
            sync(path)
        for path, target in zip(temporary, paths, strict=True):
            path.replace(target)

        # The renames themselves.
        for folder in {path.parent for path in paths}:
            sync(folder)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder; syncs it and renames it to `path` if the block succeeds.

    A folder that exists at `path` is replaced. If the block raises, the temporary folder is
    removed and `path` stays as it was.
    """
    temporary = partial_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary

        sync_tree(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_files(path) as (temporary,):
        temporary.write_text(text)
