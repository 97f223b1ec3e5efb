"""SwiGLU on the CPU: the functions of reference/swiglu.py, in one pass over the elements.

It rounds where PyTorch does. Its exp is another one, also within 1 ulp: in float32 the last bits of
a result may differ, in bfloat16 no gate shows it.
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
from .floats import as_stored, multiply_add, rounded, widened
from .runtime import jit
from .team import elements, pointer

# The fewest elements that are worth a thread of their own.
_GRAIN = 1 << 13

_DTYPES = (torch.float32, torch.bfloat16)

_ONE = np.float32(1)


_NAMES = ("n", "kernel", "itemsize", "g", "u", "y", "dy", "dg", "du")


class _Call(ctypes.Structure):
    """A call, as the threads read it: forward from g and u to y, backward from dy to dg and du."""

    _fields_ = tuple((name, ctypes.c_int64) for name in _NAMES)


_CALL = np.dtype(_Call)


@jit
def _forward(g: Any, u: Any, y: Any) -> None:
    for i in range(np.uint64(g.size)):
        gate = widened(g[i])
        up = widened(u[i])

        activated = gate / (_ONE + exp(-gate))
        activated = as_stored(activated, y)
        y[i] = rounded(activated * up, y)


@jit
def _backward(
    dy: Any,
    g: Any,
    u: Any,
    dg: Any,
    du: Any,
) -> None:
    for i in range(np.uint64(g.size)):
        gradient = widened(dy[i])
        gate = widened(g[i])
        up = widened(u[i])

        reciprocal = _ONE + exp(-gate)
        activated = as_stored(gate / reciprocal, du)
        du[i] = rounded(gradient * activated, du)

        s = _ONE / reciprocal
        slope = multiply_add(gate, _ONE - s, _ONE)
        product = as_stored(gradient * up, dg)
        dg[i] = rounded(product * s * slope, dg)


@jit
def _swiglu(call: Any, dtype: Any, start: int, stop: int) -> None:
    """Elements [start, stop) of a call, of the given type."""
    g = elements(call.g, dtype, start, stop)
    u = elements(call.u, dtype, start, stop)
    if call.dy == 0:
        y = elements(call.y, dtype, start, stop)
        _forward(g, u, y)
    else:
        dy = elements(call.dy, dtype, start, stop)
        dg = elements(call.dg, dtype, start, stop)
        du = elements(call.du, dtype, start, stop)
        _backward(dy, g, u, dg, du)


def _swiglu_elements(address: int, start: int, stop: int) -> None:
    call = carray(pointer(address), 1, _CALL)[0]
    if call.itemsize == 2:
        _swiglu(call, np.uint16, start, stop)
    else:
        _swiglu(call, np.float32, start, stop)


def _run(**tensors: Tensor) -> None:
    """Runs a call with these tensors at its addresses."""
    n = tensors["g"].numel()
    addresses = {name: t.data_ptr() for name, t in tensors.items()}
    call = _Call(n=n, itemsize=tensors["g"].itemsize, **addresses)
    team.run(_swiglu_elements, call, n, n // _GRAIN)


def _is_supported(g: Tensor, *others: Tensor) -> bool:
    if any(t.dtype != g.dtype or t.shape != g.shape for t in others):
        return False
    return g.dtype in _DTYPES


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    """Returns silu(g) * u; all three have one shape and dtype."""
    if not _is_supported(g, u):
        return reference.swiglu(g, u)

    g, u = g.contiguous(), u.contiguous()
    y = torch.empty_like(g)
    _run(g=g, u=u, y=y)
    return y


def swiglu_backward(
    dy: Tensor,
    g: Tensor,
    u: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns (dg, du)."""
    if not _is_supported(g, u, dy):
        return reference.swiglu_backward(dy, g, u)

    dy = dy.contiguous()
    g, u = g.contiguous(), u.contiguous()
    dg, du = torch.empty_like(g), torch.empty_like(g)
    _run(dy=dy, g=g, u=u, dg=dg, du=du)
    return dg, du
