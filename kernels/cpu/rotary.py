"""Rotary position embeddings on the CPU: the function of reference/rotary.py, in one pass.

PyTorch's operations write -b, the rotated x, both products and their sum; here an element is read
twice and written once, with the same roundings.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ..reference import rotary as reference
from ..reference.rotary import turned_back
from . import team
from .floats import as_stored, rounded, widened
from .runtime import jit
from .team import elements, pointer

__all__ = ["rotary", "turned_back"]

# The fewest elements that are worth a thread of their own.
_GRAIN = 1 << 14

_DTYPES = (torch.float32, torch.bfloat16)

_NAMES = ("rows", "kernel", "itemsize", "heads", "D", "angles", "x", "cos", "sin", "y")


class _Call(ctypes.Structure):
    """A call, as the threads read it. A row is the heads of a position; `angles` repeat."""

    _fields_ = tuple((name, ctypes.c_int64) for name in _NAMES)


_CALL = np.dtype(_Call)


@jit
def _rotate(
    x: Any,
    cos: Any,
    sin: Any,
    y: Any,
) -> None:
    """One head of one position."""
    half = np.uint64(x.size // 2)
    for i in range(half):
        j = i + half
        a, b = widened(x[i]), widened(x[j])

        kept = as_stored(a * widened(cos[i]), y)
        turned = as_stored(-b * widened(sin[i]), y)
        y[i] = rounded(kept + turned, y)

        kept = as_stored(b * widened(cos[j]), y)
        turned = as_stored(a * widened(sin[j]), y)
        y[j] = rounded(kept + turned, y)


@jit
def _rotary(call: Any, dtype: Any, start: int, stop: int) -> None:
    """Rows [start, stop) of a call whose elements have the given type."""
    D = call.D
    for row in range(start, stop):
        angle = row % call.angles * D
        cos = elements(call.cos, dtype, angle, angle + D)
        sin = elements(call.sin, dtype, angle, angle + D)
        for head in range(row * call.heads, (row + 1) * call.heads):
            first, last = head * D, (head + 1) * D
            x = elements(call.x, dtype, first, last)
            y = elements(call.y, dtype, first, last)
            _rotate(x, cos, sin, y)


def _rotary_rows(address: int, start: int, stop: int) -> None:
    call = carray(pointer(address), 1, _CALL)[0]
    if call.itemsize == 2:
        _rotary(call, np.uint16, start, stop)
    else:
        _rotary(call, np.float32, start, stop)


def _is_supported(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if any(t.dtype != x.dtype for t in (cos, sin)) or x.dtype not in _DTYPES:
        return False
    B, _, L, D = x.shape
    return cos.shape == sin.shape and cos.shape in [(B, L, D), (1, L, D)] and D % 2 == 0


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns y [B, heads, L, D], in memory [B, L, heads, D] as the layers around want it."""
    if not _is_supported(x, cos, sin):
        return reference.rotary(x, cos, sin)

    # Kept in variables: they live as long as the call.
    x, cos, sin = x.transpose(1, 2).contiguous(), cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)
    B, L, heads, D = x.shape
    angles = len(cos) * L
    addresses = (t.data_ptr() for t in (x, cos, sin, y))
    call = _Call(B * L, 0, x.itemsize, heads, D, angles, *addresses)
    team.run(_rotary_rows, call, B * L, x.numel() // _GRAIN)
    return y.transpose(1, 2)
