"""SwiGLU on the CPU: the functions of reference/swiglu.py, in one pass over the elements.

Rounded where PyTorch rounds. Only its exp is another one: results in float32 may differ by their
last bit.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ..reference import swiglu as reference
from . import team
from .exponential import exp
from .floats import multiply_add, rounded, widened
from .runtime import jit
from .team import pointer

# The fewest elements that are worth a thread of their own.
_GRAIN = 1 << 13

_DTYPES = (torch.float32, torch.bfloat16)

_ONE = np.float32(1)


class _Call(ctypes.Structure):
    """A call, as the threads read it: forward from g and u to y, backward from dy to dg and du."""

    _names = ("n", "kernel", "itemsize", "g", "u", "y", "dy", "dg", "du")
    _fields_ = tuple((name, ctypes.c_int64) for name in _names)


_CALL = np.dtype(_Call)


@jit
def _forward(g: Any, u: Any, y: Any) -> None:
    for i in range(np.uint64(g.size)):
        gate = widened(g[i])
        activated = gate / (_ONE + exp(-gate))
        y[i] = rounded(widened(rounded(activated, y)) * widened(u[i]), y)


@jit
def _backward(dy: Any, g: Any, u: Any, dg: Any, du: Any) -> None:
    for i in range(np.uint64(g.size)):
        gate, gradient = widened(g[i]), widened(dy[i])
        denominator = _ONE + exp(-gate)
        activated = gate / denominator
        s = _ONE / denominator

        product = widened(rounded(gradient * widened(u[i]), dg))
        dg[i] = rounded(product * s * multiply_add(gate, _ONE - s, _ONE), dg)
        du[i] = rounded(gradient * widened(rounded(activated, du)), du)


@jit
def _elements(call: Any, dtype: Any, start: int, stop: int) -> None:
    """Elements [start, stop) of a call, of the given type."""
    g = carray(pointer(call.g), call.n, dtype)[start:stop]
    u = carray(pointer(call.u), call.n, dtype)[start:stop]
    if call.dy == 0:
        y = carray(pointer(call.y), call.n, dtype)[start:stop]
        _forward(g, u, y)
    else:
        dy = carray(pointer(call.dy), call.n, dtype)[start:stop]
        dg = carray(pointer(call.dg), call.n, dtype)[start:stop]
        du = carray(pointer(call.du), call.n, dtype)[start:stop]
        _backward(dy, g, u, dg, du)


def _swiglu_elements(address: int, start: int, stop: int) -> None:
    call = carray(pointer(address), 1, _CALL)[0]
    if call.itemsize == 2:
        _elements(call, np.uint16, start, stop)
    else:
        _elements(call, np.float32, start, stop)


def _is_supported(g: Tensor, *others: Tensor) -> bool:
    same = all(t.dtype == g.dtype and t.shape == g.shape for t in others)
    return same and g.dtype in _DTYPES


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    """Returns silu(g) * u; all three have one shape and dtype."""
    if not _is_supported(g, u):
        return reference.swiglu(g, u)

    g, u = g.contiguous(), u.contiguous()
    y = torch.empty_like(g)
    n = g.numel()
    call = _Call(n=n, itemsize=g.itemsize, g=g.data_ptr(), u=u.data_ptr(), y=y.data_ptr())
    team.run(_swiglu_elements, call, n, n // _GRAIN)
    return y


def swiglu_backward(dy: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (dg, du)."""
    if not _is_supported(g, u, dy):
        return reference.swiglu_backward(dy, g, u)

    dy, g, u = dy.contiguous(), g.contiguous(), u.contiguous()
    dg, du = torch.empty_like(g), torch.empty_like(g)
    n = g.numel()
    call = _Call(n=n, itemsize=g.itemsize, g=g.data_ptr(), u=u.data_ptr())
    call.dy, call.dg, call.du = dy.data_ptr(), dg.data_ptr(), du.data_ptr()
    team.run(_swiglu_elements, call, n, n // _GRAIN)
    return dg, du
