"""Runs a compiled kernel in PyTorch's own OpenMP threads, for work of a few microseconds.

The threads of PyTorch's products keep spinning for a moment, and those of a small model's layers
follow each other within it: handing them work takes two microseconds, waking a thread of another
pool thirty, and it then shares its core with one that spins. Numba code cannot see these threads,
so their runtime is asked by name.

A forked child has lost the threads and their runtime hangs there; other systems have another
runtime. Both use the thread pool of runtime.py.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import runtime

_FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


def _openmp() -> dict[str, Any]:
    """The functions of the OpenMP runtime that PyTorch is linked with; {}: they are not there."""
    folder = Path(torch.__file__).parent / "lib"
    try:
        # A symbol is searched in the library and in those that it is linked with.
        library = ctypes.CDLL(str(folder / "libtorch_cpu.so"))
        return {name: getattr(library, name) for name in _FUNCTIONS}
    except (OSError, AttributeError):
        return {}


_OPENMP = _openmp()
_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)

if _OPENMP:
    for _name, _function in _OPENMP.items():
        _address = ctypes.cast(_function, ctypes.c_void_p).value
        binding.add_symbol(f"minilora_{_name}", _address)

    _parallel = _OPENMP["GOMP_parallel"]
    _parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    _parallel.restype = None

_thread = types.ExternalFunction("minilora_omp_get_thread_num", types.int32())
_threads = types.ExternalFunction("minilora_omp_get_num_threads", types.int32())

_KERNEL = types.void(types.intp, types.intp, types.intp)


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typing: Any, address: Any) -> Any:
    """An address as the pointer that `numba.carray` makes an array of."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), build


@runtime.jit
def elements(address: int, dtype: Any, start: int, stop: int) -> Any:
    """Elements [start, stop) of the array at an address, flat."""
    return numba.carray(pointer(address), stop, dtype)[start:]


@intrinsic  # type: ignore[untyped-decorator]
def _call(typing: Any, kernel: Any, address: Any, start: Any, stop: Any) -> Any:
    """Calls a kernel by its address."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [arg.type for arg in args[1:]])
        b.call(b.inttoptr(args[0], function.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), build


def _share(address: Any) -> None:
    """What each thread of a team runs: the kernel for its share of the rows, multiples of 16."""
    rows, kernel = numba.carray(pointer(address), 2, types.int64)
    share = -(-rows // _threads())
    share = (share + 15) // 16 * 16

    start = min(rows, _thread() * share)
    stop = min(rows, start + share)
    if start < stop:
        _call(kernel, address, start, stop)


@functools.cache
def compiled(function: Callable[..., None], signature: Any = _KERNEL) -> Any:
    """Returns a kernel as a C function: compiled at its first call, and cached on disk."""
    options = {"nopython": True, "boundscheck": False, "error_model": "numpy"}
    runtime.name_for_cache(function)
    try:
        return numba.cfunc(signature, cache=True, **options)(function)
    except RuntimeError:
        # Neither the package's folder nor the user's cache folder is writable.
        return numba.cfunc(signature, **options)(function)


@functools.cache
def _address_of_share() -> int:
    return int(compiled(_share, types.void(types.intp)).address)


def run(
    function: Callable[..., None],
    call: ctypes.Structure,
    rows: int,
    grains: int,
) -> None:
    """Calls `function(address of call, start, stop)` over ranges that together are the rows.

    The call begins with two int64: the number of rows, and one that is for this module. There are
    as many ranges as there is work for, `grains`, but no more than PyTorch has threads.
    """
    kernel = compiled(function)
    address = ctypes.addressof(call)
    threads = max(1, min(torch.get_num_threads(), grains))
    if not _OPENMP or _is_forked:
        grain = max(1, -(-rows // threads))
        runtime.run(kernel.ctypes, address, rows=(0, rows), grain=grain)
        return
    call.kernel = kernel.address
    _parallel(_address_of_share(), address, threads, 0)
