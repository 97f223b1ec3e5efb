"""RMSNorm on the CPU: the functions of reference/rms_norm.py, one row after another.

PyTorch's operations, five of a forward and seven of a backward, read and write a tensor of float32
each; here a row stays in the L1 cache. Every rounding is that of the reference, but a row's sum is
in another order, which may change the last bits of its mean.
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
from .floats import as_stored, rounded, widened
from .runtime import jit, jit_reordered
from .team import elements, pointer

# The fewest elements that are worth a thread of their own.
_GRAIN = 1 << 14

_DTYPES = (torch.float32, torch.bfloat16)

_ONE = np.float32(1)


_INTEGERS = ("rows", "kernel", "size", "itemsize", "weighting")
_ADDRESSES = ("x", "w", "r", "y", "dy", "dx")


class _Call(ctypes.Structure):
    """A call, as the threads read it: forward from x to y and r, backward from dy to dx."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_int64) for name in _ADDRESSES),
        ("eps", ctypes.c_float),
    )


_CALL = np.dtype(_Call)


@jit
def _factors(w: Any, weighting: int) -> Any:
    """What n is multiplied by, in float32."""
    factors = np.empty(w.size, np.float32)
    for i in range(np.uint64(w.size)):
        factors[i] = widened(w[i])
    if weighting == Weighting.ONE_PLUS:
        factors += _ONE
    return factors


@jit_reordered
def _sum_of_squares(x: Any) -> Any:
    total = np.float32(0)
    for i in range(np.uint64(x.size)):
        value = widened(x[i])
        total += value * value
    return total


@jit_reordered
def _sum_of_products(
    dy: Any,
    w: Any,
    x: Any,
    r: Any,
) -> Any:
    """The sum of dn n."""
    total = np.float32(0)
    for i in range(np.uint64(x.size)):
        n = widened(x[i]) * r
        dn = widened(dy[i]) * w[i]
        total += dn * n
    return total


@jit
def _forward(
    x: Any,
    w: Any,
    y: Any,
    eps: Any,
    rounds_first: bool,
) -> Any:
    """One row; returns its r."""
    size = np.float32(x.size)
    mean = _sum_of_squares(x) / size
    r = _ONE / np.sqrt(mean + eps)

    for i in range(np.uint64(x.size)):
        n = widened(x[i]) * r
        if rounds_first:
            n = as_stored(n, y)
        y[i] = rounded(w[i] * n, y)
    return r


@jit
def _backward(
    dy: Any,
    x: Any,
    w: Any,
    r: Any,
    dx: Any,
) -> None:
    """One row."""
    size = np.float32(x.size)
    mean = _sum_of_products(dy, w, x, r) / size

    for i in range(np.uint64(x.size)):
        n = widened(x[i]) * r
        dn = widened(dy[i]) * w[i]
        dx[i] = rounded((dn - n * mean) * r, dx)


@jit
def _rms_norm(call: Any, dtype: Any, start: int, stop: int) -> None:
    """Rows [start, stop) of a call whose elements have the given type."""
    r = elements(call.r, np.float32, 0, stop)
    w = elements(call.w, dtype, 0, call.size)
    w = _factors(w, call.weighting)
    rounds_first = call.weighting == Weighting.AFTER_ROUNDING

    for row in range(start, stop):
        first, last = row * call.size, (row + 1) * call.size
        x = elements(call.x, dtype, first, last)
        if call.dy == 0:
            y = elements(call.y, dtype, first, last)
            r[row] = _forward(x, w, y, call.eps, rounds_first)
        else:
            dy = elements(call.dy, dtype, first, last)
            dx = elements(call.dx, dtype, first, last)
            _backward(dy, x, w, r[row], dx)


def _rms_norm_rows(address: int, start: int, stop: int) -> None:
    call = carray(pointer(address), 1, _CALL)[0]
    if call.itemsize == 2:
        _rms_norm(call, np.uint16, start, stop)
    else:
        _rms_norm(call, np.float32, start, stop)


def _run(weighting: Weighting, eps: float, **tensors: Tensor) -> None:
    """Runs a call with these tensors at its addresses."""
    x, rows = tensors["x"], tensors["r"].numel()
    call = _Call(
        rows=rows,
        size=x.shape[-1],
        itemsize=x.itemsize,
        weighting=weighting,
        eps=eps,
        **{name: t.data_ptr() for name, t in tensors.items()},
    )
    team.run(_rms_norm_rows, call, rows, x.numel() // _GRAIN)


def _is_supported(x: Tensor, w: Tensor) -> bool:
    same = w.dtype == x.dtype and w.shape == x.shape[-1:]
    return same and x.dtype in _DTYPES


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
    _run(weighting, eps, x=x, w=w, y=y, r=r)
    return y, r


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    weighting: Weighting,
) -> Tensor:
    """Returns dx [..., I] from dy [..., I], both in the dtype of x, and the r of the forward."""
    if not _is_supported(x, w) or dy.dtype != x.dtype or dy.shape != x.shape:
        return reference.rms_norm_backward(dy, x, w, r, weighting)

    x, w = x.contiguous(), w.contiguous()
    dy, r = dy.contiguous(), r.contiguous()
    dx = torch.empty_like(x)
    _run(weighting, 0.0, dy=dy, x=x, w=w, r=r, dx=dx)
    return dx
