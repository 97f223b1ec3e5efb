"""What the CPU kernels run on: compiled functions, arrays, memory and threads.

Numba's own `parallel=True` is not used: its threading layers abort when two threads call at once
("workqueue") or after a fork ("omp"). Here a kernel is serial, releases the GIL, and works on a
range [start, stop) of rows; `run` distributes the ranges over a small thread pool. A forked child
gets a pool of its own: threads do not survive a fork, locks do.
"""

import ctypes
import hashlib
import itertools
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

# NumPy has no bfloat16: kernels see its bits.
_NUMPY = {
    torch.uint8: np.uint8,
    torch.float32: np.float32,
    torch.bfloat16: np.uint16,
}

# Bytes of a huge page on x86-64 and on most aarch64 systems.
_HUGE = 2 << 20
_MADV_HUGEPAGE = 14

_madvise = None
if sys.platform == "linux":
    _madvise = getattr(ctypes.CDLL(None), "madvise", None)

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


# Windows has no fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _digest_of_sources() -> str:
    """Identifies every file whose code or constants are compiled into a kernel."""
    kernels = Path(__file__).parents[1]
    compiled = kernels.glob("cpu/*.py")
    constants = kernels.glob("reference/*.py")

    files = sorted([*compiled, *constants])
    sources = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(sources).hexdigest()[:12]


_SOURCES = _digest_of_sources()


def name_for_cache(function: Callable[..., Any]) -> None:
    """Makes the cache on disk notice when any source of a kernel changes.

    Numba names the cached file after the function and compares the time and size of the file that
    holds it, not of the files that its helpers come from. So the function's name gets a digest of
    all of them.
    """
    # Once, also if compiling it fails and is tried again.
    function.__qualname__ = f"{function.__name__}_{_SOURCES}"


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiles `function` at its first call, without the GIL, and caches the machine code on disk.

    See `name_for_cache`.
    """
    name_for_cache(function)
    options |= {"nogil": True, "boundscheck": False, "error_model": "numpy"}

    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:
        # Neither the package's folder nor the user's cache folder is writable.
        return numba.njit(**options)(function)  # type: ignore[no-any-return]


def jit_reordered(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jit` for a sum, whose terms may be added in any order: else LLVM does not vectorise it."""
    return jit(function, fastmath={"reassoc"})


def jit_inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jit` for a function that takes no longer than a call with its many arguments."""
    return jit(function, forceinline=True)


def array(t: Tensor) -> Any:
    """Returns the memory of a contiguous CPU tensor as a flat, writable numpy array.

    The array keeps the tensor alive. Not `t.numpy()`: that makes the storage non-resizable for
    good, and FSDP2 then fails on it.
    """
    assert t.is_contiguous() and t.is_cpu
    nbytes = t.nbytes
    if nbytes == 0:
        return np.empty(0, _NUMPY[t.dtype])

    kind = ctypes.c_char * nbytes
    buffer = kind.from_address(t.data_ptr())
    buffer.owner = t  # type: ignore[attr-defined]
    return np.frombuffer(buffer, dtype=_NUMPY[t.dtype])  # type: ignore[call-overload]


def bits(t: Tensor) -> Any:
    """Returns the memory of a float32 or bfloat16 tensor as uint32 or uint16: see `array`."""
    unsigned = np.uint32 if t.dtype == torch.float32 else np.uint16
    return array(t).view(unsigned)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns torch.empty(shape), asking the operating system for 2 MB pages if it is large.

    Touching fresh memory costs one page fault per 4 kB: 7 ms for 32 MB, more than it takes to
    dequantize into it.
    """
    out = torch.empty(shape, dtype=dtype)
    start = out.data_ptr()
    end = start + out.nbytes

    # The huge pages that lie wholly inside.
    first = -(-start // _HUGE) * _HUGE
    size = (end - first) // _HUGE * _HUGE

    if _madvise is not None and size >= 4 * _HUGE:
        # A hint: the results do not depend on what it returns.
        _madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return out


def _ranges(rows: tuple[int, int], grain: int) -> list[tuple[int, int]]:
    """Divides rows [first, last) into one range per thread, of at least `grain` rows each."""
    first, last = rows
    size = last - first
    parts = min(torch.get_num_threads(), size // grain)
    parts = max(1, parts)

    edges = [first + size * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(edges))


def run(
    kernel: Callable[..., Any],
    *args: Any,
    rows: tuple[int, int],
    grain: int,
) -> None:
    """Calls `kernel(*args, start, stop)` over ranges that together are `rows`, in several threads.

    There are at most torch.get_num_threads() ranges. None has fewer than `grain` rows, unless it is
    the only one.
    """
    global _pool
    own, *others = _ranges(rows, grain)

    if others and _pool is None:
        workers = os.cpu_count()
        _pool = ThreadPoolExecutor(workers, thread_name_prefix="minilora")

    pending: list[Future[Any]] = []
    try:
        for start, stop in others:
            assert _pool is not None
            pending.append(_pool.submit(kernel, *args, start, stop))
        kernel(*args, *own)
    finally:
        # Never return while another thread still writes to the caller's memory.
        for future in pending:
            future.result()
