"""Files that are whole or are not there: every write goes to a temporary file in the same folder, fsync, rename."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial(path: Path) -> Path:
    """Returns the temporary name of a file that is being written."""
    return path.with_name(f".{path.name}.partial")


def sync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic(*paths: Path) -> Iterator[list[Path]]:
    """Yields a temporary path for each of `paths`, in its folder; on leaving without an error all are moved into place.

    On an error (a full disk, Ctrl-C) the temporary files are removed and the old ones stay. A kill leaves the old ones too.
    """
    temporary = [partial(path) for path in paths]
    try:
        yield temporary
        for path in temporary:
            sync(path)
        for path, target in zip(temporary, paths, strict=True):
            path.replace(target)
        sync(paths[0].parent)  # the renames themselves
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with atomic(path) as (temporary,):
        temporary.write_text(text)
