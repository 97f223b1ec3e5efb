"""The cross-entropy of rows of logits on the CPU: the function of reference/softmax.py, by rows.

A row of 49,152 logits in bfloat16 stays in the L2 cache while three loops pass over it: its
maximum, its exponentials and their sum, its gradient. PyTorch's operations take eight, in float32.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ..reference import softmax as reference
from . import team
from .exponential import exp_of_negative
from .floats import bits_of_float32, float32_of_bits, rounded, widened
from .runtime import jit, jit_reordered
from .team import elements, pointer

# The fewest logits that are worth a thread of their own.
_GRAIN = 1 << 13

# Exponentials whose sum is added to that of the others in float64: the error of a long row's sum
# is no larger than that of a short one's.
_CHUNK = 1024

_DTYPES = (torch.float32, torch.bfloat16)

_ONE = np.float32(1)

# The last bit of an int32, its others, and the lowest int32.
_SIGN, _MAGNITUDE, _LOWEST = np.int32(31), np.int32(0x7FFFFFFF), np.int32(-(2**31))

_INTEGERS = ("rows", "kernel", "itemsize", "V", "z", "y", "losses")


class _Call(ctypes.Structure):
    """A call, as the threads read it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("scale", ctypes.c_float),
    )


_CALL = np.dtype(_Call)


@jit
def _ordered(bits: Any) -> Any:
    """The bits of a float32 number as an int32 of the same order; and back."""
    return bits ^ ((bits >> _SIGN) & _MAGNITUDE)


@jit
def _maximum(z: Any, scale: Any) -> Any:
    """The maximum of a z, as integers: LLVM vectorises no loop in which a NaN could appear."""
    highest = _LOWEST
    for v in range(np.uint64(z.size)):
        value = widened(z[v]) * scale
        highest = max(highest, _ordered(bits_of_float32(value)))
    return float32_of_bits(_ordered(highest))


@jit_reordered
def _exponentials(
    z: Any,
    scale: Any,
    highest: Any,
    e: Any,
) -> Any:
    """e = exp(a z - highest); returns their sum."""
    total = np.float32(0)
    for v in range(np.uint64(z.size)):
        e[v] = exp_of_negative(widened(z[v]) * scale - highest)
        total += e[v]
    return total


@jit
def _row(
    z: Any,
    target: int,
    scale: Any,
    e: Any,
) -> Any:
    """Returns the loss of a row, and leaves its gradient in z."""
    highest = _maximum(z, scale)
    f_target = widened(z[target]) * scale

    total = 0.0
    for v in range(0, z.size, _CHUNK):
        stop = min(v + _CHUNK, z.size)
        total += _exponentials(z[v:stop], scale, highest, e[v:stop])

    factor = np.float32(scale / total)
    for v in range(np.uint64(z.size)):
        z[v] = rounded(e[v] * factor, z)
    p = np.float32(e[target] / total)
    z[target] = rounded((p - _ONE) * scale, z)
    return np.float32(np.log(total)) + (highest - f_target)


@jit
def _softmax(call: Any, dtype: Any, start: int, stop: int) -> None:
    """Rows [start, stop) of a call whose logits have the given type."""
    V = call.V
    y = elements(call.y, np.int64, 0, stop)
    losses = elements(call.losses, np.float32, 0, stop)
    e = np.empty(V, np.float32)
    for row in range(start, stop):
        z = elements(call.z, dtype, row * V, (row + 1) * V)
        losses[row] = _row(z, y[row], call.scale, e)


def _softmax_rows(address: int, start: int, stop: int) -> None:
    call = carray(pointer(address), 1, _CALL)[0]
    if call.itemsize == 2:
        _softmax(call, np.uint16, start, stop)
    else:
        _softmax(call, np.float32, start, stop)


def softmax_cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Returns the loss of each row [N]; afterwards `logits` [N, V] holds the gradient."""
    is_supported = logits.is_contiguous() and logits.dtype in _DTYPES
    if softcap is not None or not is_supported or not logits.numel():
        return reference.softmax_cross_entropy_(logits, labels, scale, softcap)

    # Kept in a variable: it lives as long as the call.
    labels = labels.contiguous()
    N, V = logits.shape
    losses = torch.empty(N, dtype=torch.float32)
    addresses = logits.data_ptr(), labels.data_ptr(), losses.data_ptr()
    call = _Call(N, 0, logits.itemsize, V, *addresses, scale)
    team.run(_softmax_rows, call, N, logits.numel() // _GRAIN)
    return losses
