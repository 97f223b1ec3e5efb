"""What glibc's malloc does with memory that is freed, on Linux; elsewhere nothing happens here.

Freed blocks stay in the heap for the next ones, except a large block that has a mapping of its own,
and a large free end of the heap: both go back to the operating system. The next training step gets
their pages anew, one page fault for every 4 KB.
"""

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# In <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# Bytes of a block from which on it gets a mapping: the most that malloc takes, and where it moves
# this threshold by itself as large blocks are freed. The free end may then have twice as many.
_LARGEST_BLOCK = 32 << 20
_LARGEST_END = 2 * _LARGEST_BLOCK

# The most that a C int can say.
_NEVER = 2**31 - 1


def return_freed_memory() -> None:
    """Returns freed memory to the operating system."""
    gc.collect()
    _malloc("malloc_trim")(0)


@contextmanager
def freed_memory_is_kept() -> Iterator[None]:
    """Inside the block, the free end of the heap is kept; afterwards it is returned.

    The process has as much memory at the end of a training step as it needed at most in it.
    """
    mallopt = _malloc("mallopt")
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        mallopt(_M_TRIM_THRESHOLD, _LARGEST_END)
        _malloc("malloc_trim")(0)


def _malloc(name: str) -> Callable[..., Any]:
    """A function of glibc's; where the C library is another one, a function that does nothing."""
    if sys.platform != "linux":
        return _nothing
    return getattr(ctypes.CDLL(None), name, _nothing)


def _nothing(*args: Any) -> None:
    pass
