"""The heads of a tensor [B, heads, positions, D] in memory of any order, to and from words."""

import ctypes
from typing import Any

import numpy as np
from numba import carray
from torch import Tensor

from .floats import rounded
from .moves import copy
from .products import COLUMNS
from .runtime import jit
from .team import pointer
from .words import BLOCK, padded, zeros

_FIELDS = ("address", "itemsize", "batch", "head", "position")


class Strided(ctypes.Structure):
    """A tensor: its address, the bytes of an element, and how many elements apart things are."""

    _fields_ = tuple((name, ctypes.c_int64) for name in _FIELDS)


def strided(t: Tensor) -> Strided:
    """Describes a tensor whose last dimension is contiguous."""
    batch, head, position, _ = t.stride()
    return Strided(t.data_ptr(), t.itemsize, batch, head, position)


@jit
def _copy_rows(
    x: Any,
    first: int,
    stride: int,
    rows: int,
    D: int,
    out: Any,
    width: int,
) -> None:
    for i in range(rows):
        copy(x, first + i * stride, out, i * width, D)


@jit
def read_head(
    t: Any,
    b: int,
    head: int,
    positions: int,
    D: int,
) -> Any:
    """Returns one head as rows of words."""
    width = padded(D, COLUMNS)
    first = b * t.batch + head * t.head
    extent = first + (positions - 1) * t.position + D
    rows = zeros(padded(positions, BLOCK) * width * t.itemsize // 4)
    if t.itemsize == 2:
        x16 = carray(pointer(t.address), extent, np.uint16)
        halves = rows.view(np.uint16)
        _copy_rows(x16, first, t.position, positions, D, halves, width)
    else:
        x32 = carray(pointer(t.address), extent, np.uint32)
        _copy_rows(x32, first, t.position, positions, D, rows, width)
    return rows


@jit
def _round(
    x: Any,
    width: int,
    rows: int,
    D: int,
    out: Any,
    first: int,
    stride: int,
) -> None:
    for i in range(rows):
        source = np.uint64(i * width)
        target = np.uint64(first + i * stride)
        for d in range(np.uint64(D)):
            out[target + d] = rounded(x[source + d], out)


@jit
def write_head(
    t: Any,
    b: int,
    head: int,
    at: int,
    rows: int,
    x: Any,
    D: int,
) -> None:
    """Writes float32 rows to one head's positions from `at` on, in the tensor's dtype."""
    width = padded(D, COLUMNS)
    first = b * t.batch + head * t.head + at * t.position
    extent = first + (rows - 1) * t.position + D
    if t.itemsize == 2:
        y16 = carray(pointer(t.address), extent, np.uint16)
        _round(x, width, rows, D, y16, first, t.position)
    else:
        y32 = carray(pointer(t.address), extent, np.float32)
        _round(x, width, rows, D, y32, first, t.position)
