"""What the CPU kernels run on: compiled functions, arrays, memory and threads.

Numba's own `parallel=True` is not used: its threading layers abort when two threads call at once ("workqueue") or after a
fork ("omp"). Here a kernel is serial, releases the GIL, and works on a range [start, stop) of rows; `run` hands the ranges
to a small pool. A forked child gets a pool of its own: threads do not survive a fork, locks do.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

_NUMPY = {
    torch.uint8: np.uint8,
    torch.float32: np.float32,
    torch.bfloat16: np.uint16,  # numpy has no bfloat16: kernels see its bits
}

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_forget_pool)


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `function` at its first call, without the GIL, and keeps the machine code on disk where that is possible.

    The disk cache is keyed on the file that holds the kernel, not on the files it imports: a kernel and its helpers share
    one file.
    """
    options: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # neither the package's folder nor the user's cache can be written to
        return numba.njit(**options)(function)  # type: ignore[no-any-return]


def array(t: Tensor) -> Any:
    """Returns a contiguous CPU tensor's memory as a flat, writable numpy array that keeps the tensor alive.

    Not `t.numpy()`: that makes the storage non-resizable for good, and FSDP2 then fails on it.
    """
    assert t.is_contiguous() and t.device.type == "cpu"
    if not t.nbytes:
        return np.empty(0, _NUMPY[t.dtype])
    buffer = (ctypes.c_char * t.nbytes).from_address(t.data_ptr())
    buffer.owner = t  # type: ignore[attr-defined]
    return np.frombuffer(buffer, dtype=_NUMPY[t.dtype])  # type: ignore[call-overload]


_HUGE = 2 << 20  # bytes of a huge page on x86-64 and on most of aarch64
_MADV_HUGEPAGE = 14
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns torch.empty(shape), asking the kernel for 2 MB pages where the tensor is large.

    Touching fresh memory costs a page fault each 4 kB: 7 ms for 32 MB, more than it takes to dequantize into it.
    """
    out = torch.empty(shape, dtype=dtype)
    first = -(-out.data_ptr() // _HUGE) * _HUGE
    size = (out.data_ptr() + out.nbytes - first) // _HUGE * _HUGE
    if _madvise is not None and size >= 4 * _HUGE:
        _madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_HUGEPAGE
        )  # a hint: what it returns changes nothing
    return out


def run(kernel: Callable[..., Any], *args: Any, rows: tuple[int, int], grain: int) -> None:
    """Calls `kernel(*args, start, stop)` over `rows` in up to torch.get_num_threads() threads, `grain` rows each at least."""
    global _pool
    first, last = rows
    parts = max(1, min(torch.get_num_threads(), (last - first) // grain))
    edges = [first + (last - first) * i // parts for i in range(parts + 1)]
    if parts > 1 and _pool is None:
        _pool = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="minilora")
    pending = (
        [_pool.submit(kernel, *args, *edges[i : i + 2]) for i in range(1, parts)]
        if _pool is not None
        else []
    )
    try:
        kernel(*args, *edges[:2])
    finally:
        for (
            future
        ) in pending:  # never leave while another thread still writes into the caller's memory
            future.result()
