"""Errors of a full disk, which say that there is no space but not for what."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def naming(path: Path, done: str = "written") -> Iterator[None]:
    """Gives an OSError in the block the name of what could not be written, if it has none.

    safetensors raises an error of its own, which becomes an OSError.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "filename", None) is not None or str(path.parent) in str(error):
            raise
        raise OSError(f"{path} could not be {done}: {error}") from error
