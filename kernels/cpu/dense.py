"""Products with a dense weight on the CPU: the functions of reference/dense.py.

Both are Y = L R with L [M, K] and R [K, N]. As in many_rows.py, a thread computes columns of Y,
with panels of 32 columns of R that stay in its cache; here they are copied from W. K may be a
vocabulary of tens of thousands: a panel has some of its rows, and the sums so far are kept in
float32 until they are rounded, once. Several panels lie side by side, so that rows of Y are
written, and rows of L read, for many columns at a time.

BLAS multiplies on processors without AVX-512, and where the sizes do not fit (`_is_fast`).
"""

import ctypes
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ..reference import dense as reference
from . import team
from .avx512 import AVX512, AVX512_BF16
from .moves import prefetch_to_write, transpose_16
from .panels import copy_columns
from .products import COLUMNS, ROWS, add_tile, store_sum_of_products
from .runtime import jit
from .team import elements, pointer
from .words import clear, padded, zeros

# The fewest products that are worth a thread of their own.
_GRAIN = 1 << 19

# Words of a column of a panel, and of all panels that lie side by side: 512 KB.
_CHUNK = 512
_SIDE_BY_SIDE = 1 << 17

_NAMES = ("units", "kernel", "forward", "M", "K", "N", "L", "W", "Y")


class _Call(ctypes.Structure):
    """A call, as the threads read it."""

    _fields_ = tuple((name, ctypes.c_int64) for name in _NAMES)


_CALL = np.dtype(_Call)

# Columns of Y that a team counts as one row: it divides rows in multiples of 16.
_UNIT = COLUMNS // 16


@jit
def _multiply(call: Any, dtype: Any, start: int, stop: int) -> None:
    """Columns [start, stop) of Y."""
    W = elements(call.W, dtype, 0, call.K * call.N)
    steps = call.K * W.itemsize // 4
    chunk = min(steps, _CHUNK)

    # As many columns at a time as fit, in parts of almost equal size.
    most = max(1, _SIDE_BY_SIDE // (chunk * COLUMNS)) * COLUMNS
    parts = -(-(stop - start) // most)
    width = padded(-(-(stop - start) // parts), COLUMNS)
    panels = zeros(chunk * width)
    sums = zeros(padded(call.M, ROWS) * width).view(np.float32)

    for first in range(start, stop, width):
        last = min(first + width, stop)
        clear(sums)
        for k in range(0, steps, chunk):
            count = min(chunk, steps - k)
            _copy(call, W, first, last, k, count, panels)
            _add(call, dtype, first, last, k, count, panels, sums)


@jit
def _copy(
    call: Any,
    W: Any,
    first: int,
    last: int,
    k: int,
    count: int,
    panels: Any,
) -> None:
    """Words [k, k + count) of columns [first, last) of R."""
    numbers = 4 // W.itemsize
    for column in range(first, last, COLUMNS):
        panel = panels[(column - first) * count :]
        if call.forward:
            words = call.K // numbers
            _transpose_rows(W.view(np.uint32), words, column, k, count, panel)
        else:
            rows = W[k * numbers * call.N :]
            copy_columns(rows, call.N, count, column, panel)


@jit
def _transpose_rows(
    W: Any,
    words: int,
    first: int,
    k: int,
    count: int,
    panel: Any,
) -> None:
    """A panel of W^T: words [k, k + count), multiples of 16, of rows [first, first + 32) of W."""
    for i in range(0, COLUMNS, 16):
        for step in range(0, count, 16):
            source = (first + i) * words + k + step
            transpose_16(W, source, words, panel, step * COLUMNS + i, COLUMNS)


@jit
def _add(
    call: Any,
    dtype: Any,
    first: int,
    last: int,
    k: int,
    count: int,
    panels: Any,
    sums: Any,
) -> None:
    """Adds the products of words [k, k + count) to the sums; after the last ones, writes Y."""
    M, N = call.M, call.N
    Y = elements(call.Y, dtype, 0, M * N)
    numbers = 4 // Y.itemsize
    steps = call.K // numbers
    L = elements(call.L, np.uint32, 0, M * steps)
    is_last = k + count == steps

    at = 0
    for top in range(0, M, ROWS):
        # The last rows may be computed twice.
        m = min(top, M - ROWS)
        l = m * steps + k
        for column in range(first, last, COLUMNS):
            p = (column - first) * count
            tile = sums[at : at + ROWS * COLUMNS]
            at += ROWS * COLUMNS
            if not is_last:
                add_tile(numbers, L, l, steps, panels, p, count, tile)
                continue
            for i in range(ROWS):
                prefetch_to_write(Y, (m + i) * N + column)
            # There is no low-rank term.
            arrays = (L, panels, L, panels, tile, Y)
            sizes = (0, 0, l, steps, p, count, m * N + column, N)
            store_sum_of_products(np.float32(0), arrays, sizes)


def _multiply_bfloat16(address: int, start: int, stop: int) -> None:
    call = carray(pointer(address), 1, _CALL)[0]
    _multiply(call, np.uint16, start * _UNIT, stop * _UNIT)


def _multiply_float32(address: int, start: int, stop: int) -> None:
    call = carray(pointer(address), 1, _CALL)[0]
    _multiply(call, np.uint32, start * _UNIT, stop * _UNIT)


def _is_fast(L: Tensor, W: Tensor, Y: Tensor) -> bool:
    """Whether the kernels take these, on this processor; PyTorch refuses what is wrong."""
    V, H = W.shape
    if {L.shape[1], Y.shape[1]} != {V, H} or V % COLUMNS or H % COLUMNS:
        return False
    if len(L) < ROWS or len(Y) != len(L) or not (W.is_contiguous() and Y.is_contiguous()):
        return False
    if any(t.dtype != L.dtype or not t.is_cpu for t in (W, Y)):
        return False
    if L.dtype == torch.bfloat16:
        return AVX512_BF16
    return AVX512 and L.dtype == torch.float32


def _run(L: Tensor, W: Tensor, Y: Tensor, forward: bool) -> None:
    # Kept in a variable: it lives as long as the call.
    L = L.contiguous()
    (M, K), N = L.shape, Y.shape[1]
    addresses = L.data_ptr(), W.data_ptr(), Y.data_ptr()
    call = _Call(N // _UNIT, 0, forward, M, K, N, *addresses)
    kernel = _multiply_float32 if L.dtype == torch.float32 else _multiply_bfloat16
    team.run(kernel, call, call.units, M * N * K // _GRAIN)


def product(h: Tensor, W: Tensor, out: Tensor) -> Tensor:
    """out = h W^T, [M, V]; returns it."""
    if not _is_fast(h, W, out):
        return reference.product(h, W, out)
    _run(h, W, out, forward=True)
    return out


def product_backward(g: Tensor, W: Tensor) -> Tensor:
    """Returns g W, [M, H]."""
    out = g.new_empty((len(g), W.shape[1]))
    if not _is_fast(g, W, out):
        return reference.product_backward(g, W)
    _run(g, W, out, forward=False)
    return out
