"""RMSNorm on the CPU: the functions of reference/rms_norm.py, in one pass over the rows.

PyTorch's five operations of a forward, and seven of a backward, read and write a tensor of float32
each; here a row stays in the L1 cache. Every rounding is that of the reference, but the sums of a
row are in another order.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ..reference import rms_norm as reference
from ..reference.rms_norm import Weighting
from . import team
from .floats import rounded, widened
from .runtime import jit, jit_reordered
from .team import pointer

# The fewest elements that are worth a thread of their own.
_GRAIN = 1 << 14

_DTYPES = (torch.float32, torch.bfloat16)


class _Call(ctypes.Structure):
    """A call, as the threads read it: forward if dy is 0, and then `out` is y; else it is dx."""

    _names = ("rows", "kernel", "size", "itemsize", "weighting", "x", "w", "r", "dy", "out")
    _fields_ = (*((name, ctypes.c_int64) for name in _names), ("eps", ctypes.c_float))


_CALL = np.dtype(_Call)


@jit
def _weight(w: Any, weighting: int) -> Any:
    """What n is multiplied by, in float32."""
    w32 = np.empty(w.size, np.float32)
    for i in range(np.uint64(w.size)):
        w32[i] = widened(w[i])
    if weighting == Weighting.ONE_PLUS:
        w32 += np.float32(1)
    return w32


@jit_reordered
def _sum_of_squares(x: Any) -> Any:
    total = np.float32(0)
    for i in range(np.uint64(x.size)):
        value = widened(x[i])
        total += value * value
    return total


@jit_reordered
def _sum_of_products(dy: Any, w32: Any, x: Any, r: Any) -> Any:
    """sum(dn n) of a row."""
    total = np.float32(0)
    for i in range(np.uint64(x.size)):
        total += (widened(dy[i]) * w32[i]) * (widened(x[i]) * r)
    return total


@jit
def _forward(
    x: Any,
    w32: Any,
    y: Any,
    r: Any,
    eps: Any,
    weighting: int,
) -> None:
    """Rows of x [rows, I]."""
    rounds_first = weighting == Weighting.AFTER_ROUNDING
    for row in range(np.uint64(x.shape[0])):
        mean = _sum_of_squares(x[row]) / np.float32(x.shape[1])
        r[row] = scale = np.float32(1) / np.sqrt(mean + eps)

        for i in range(np.uint64(x.shape[1])):
            n = widened(x[row, i]) * scale
            if rounds_first:
                n = widened(rounded(n, y))
            y[row, i] = rounded(w32[i] * n, y)


@jit
def _backward(dy: Any, x: Any, w32: Any, r: Any, dx: Any) -> None:
    """Rows of dy [rows, I]."""
    for row in range(np.uint64(x.shape[0])):
        scale = r[row]
        mean = _sum_of_products(dy[row], w32, x[row], scale) / np.float32(x.shape[1])

        for i in range(np.uint64(x.shape[1])):
            n = widened(x[row, i]) * scale
            dn = widened(dy[row, i]) * w32[i]
            dx[row, i] = rounded((dn - n * mean) * scale, dx)


@jit
def _rows(call: Any, dtype: Any, start: int, stop: int) -> None:
    """Rows [start, stop) of a call whose elements have the given type."""
    shape = call.rows, call.size
    w32 = _weight(carray(pointer(call.w), call.size, dtype), call.weighting)
    x = carray(pointer(call.x), shape, dtype)[start:stop]
    out = carray(pointer(call.out), shape, dtype)[start:stop]
    r = carray(pointer(call.r), call.rows, np.float32)[start:stop]

    if call.dy == 0:
        _forward(x, w32, out, r, call.eps, call.weighting)
    else:
        dy = carray(pointer(call.dy), shape, dtype)[start:stop]
        _backward(dy, x, w32, r, out)


def _rms_norm_rows(address: int, start: int, stop: int) -> None:
    call = carray(pointer(address), 1, _CALL)[0]
    if call.itemsize == 2:
        _rows(call, np.uint16, start, stop)
    else:
        _rows(call, np.float32, start, stop)


def _call(x: Tensor, w: Tensor, weighting: Weighting, out: Tensor, r: Tensor) -> _Call:
    return _Call(
        rows=r.numel(),
        size=w.numel(),
        itemsize=x.itemsize,
        weighting=weighting,
        x=x.data_ptr(),
        w=w.data_ptr(),
        r=r.data_ptr(),
        out=out.data_ptr(),
    )


def _is_supported(x: Tensor, w: Tensor, *others: Tensor) -> bool:
    same = all(t.dtype == x.dtype and t.shape == x.shape for t in others)
    return same and x.dtype in _DTYPES and w.dtype == x.dtype and w.shape == x.shape[-1:]


def rms_norm(
    x: Tensor,
    w: Tensor,
    eps: float,
    weighting: Weighting,
) -> tuple[Tensor, Tensor]:
    """Returns y [..., I] in the dtype of x, and r [..., 1] in float32."""
    if not _is_supported(x, w):
        return reference.rms_norm(x, w, eps, weighting)

    x, w = x.contiguous(), w.contiguous()
    y = torch.empty_like(x)
    r = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
    call = _call(x, w, weighting, y, r)
    call.eps = eps
    team.run(_rms_norm_rows, call, call.rows, x.numel() // _GRAIN)
    return y, r


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    weighting: Weighting,
) -> Tensor:
    """Returns dx [..., I] in the dtype of x."""
    if not _is_supported(x, w, dy):
        return reference.rms_norm_backward(dy, x, w, r, weighting)

    dy, x, w, r = (t.contiguous() for t in (dy, x, w, r))
    dx = torch.empty_like(x)
    call = _call(x, w, weighting, dx, r)
    call.dy = dy.data_ptr()
    team.run(_rms_norm_rows, call, call.rows, x.numel() // _GRAIN)
    return dx
