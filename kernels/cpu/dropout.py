"""Dropout on the CPU: the function of reference/dropout.py, bit for bit the same.

PyTorch draws its mask one number after another, in 6 ns each. Counters are independent of each
other, and eight of them fit an AVX-512 register.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ..reference import dropout as reference
from ..reference.dropout import KEY_STEPS, MULTIPLIERS, ROUNDS
from . import team
from .nf4 import rounded_to_bfloat16
from .runtime import jit
from .team import pointer

# Counters at a time: their words stay in the L1 cache.
_CHUNK = 512

# The fewest elements that are worth a thread of their own.
_GRAIN = 1 << 14

_M0, _M1 = (np.uint64(m) for m in MULTIPLIERS)
_K0, _K1 = (np.uint64(k) for k in KEY_STEPS)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


@jit
def _words(first: int, seed: Any, out: Any) -> None:
    """out [4, n] = the four words of the counters first, first + 1, ..."""
    for i in range(out.shape[1]):
        c0 = np.uint64(first) + np.uint64(i)
        c1 = c2 = c3 = np.uint64(0)
        k0, k1 = seed & _LOW, seed >> _HALF
        for _ in range(ROUNDS):
            even, odd = c0 * _M0, c2 * _M1

            c0 = odd >> _HALF ^ c1 ^ k0
            c1 = odd & _LOW
            c2 = even >> _HALF ^ c3 ^ k1
            c3 = even & _LOW

            k0, k1 = k0 + _K0 & _LOW, k1 + _K1 & _LOW
        out[0, i] = c0
        out[1, i] = c1
        out[2, i] = c2
        out[3, i] = c3


@jit
def _dropout(
    x: Any,
    y: Any,
    seed: Any,
    threshold: Any,
    scale: np.float32,
    start: int,
    stop: int,
) -> None:
    """The elements of the counters [start, stop), bit patterns of float32 or bfloat16."""
    quarter = -(-x.size // 4)
    words = np.empty((4, _CHUNK), np.uint32)
    value = np.empty(_CHUNK, np.float32)
    value_bits = value.view(np.uint32)
    shift = np.uint32(32 - 8 * x.itemsize)

    for first in range(start, stop, _CHUNK):
        n = min(_CHUNK, stop - first)
        _words(first, seed, words)
        for j in range(4):
            # Unsigned: an index that may be negative keeps the loops from vector instructions.
            at = np.uint64(j * quarter + first)
            left = x.size - j * quarter - first
            size = np.uint64(max(0, min(n, left)))
            drawn = words[j]
            for i in range(size):
                value_bits[i] = np.uint32(x[at + i]) << shift
            for i in range(size):
                value[i] *= scale
            for i in range(size):
                level = value_bits[i]
                if y.itemsize == 2:
                    level = rounded_to_bfloat16(level)
                y[at + i] = level * np.uint32(drawn[i] >= threshold)


class _Call(ctypes.Structure):
    """A call, as the threads read it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("counters", "kernel", "n", "itemsize", "x", "y")),
        ("seed", ctypes.c_uint64),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_float),
    )


_CALL = np.dtype(_Call)


def _dropout_counters(address: int, start: int, stop: int) -> None:
    call = carray(pointer(address), 1, _CALL)[0]
    n = call.n
    if call.itemsize == 2:
        x16 = carray(pointer(call.x), n, np.uint16)
        y16 = carray(pointer(call.y), n, np.uint16)
        _dropout(x16, y16, call.seed, call.threshold, call.scale, start, stop)
    else:
        x32 = carray(pointer(call.x), n, np.uint32)
        y32 = carray(pointer(call.y), n, np.uint32)
        _dropout(x32, y32, call.seed, call.threshold, call.scale, start, stop)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Returns x with elements zeroed with probability p, and the others divided by 1 - p.

    seed: int64 scalar in [0, 2^63), on the CPU.
    """
    if x.dtype not in (torch.float32, torch.bfloat16):
        return reference.dropout(x, p, seed)

    x = x.contiguous()
    y = torch.empty_like(x)
    n = x.numel()
    call = _Call(
        -(-n // 4),
        0,
        n,
        x.itemsize,
        x.data_ptr(),
        y.data_ptr(),
        seed.item(),
        int(p * 2**32),
        1 / (1 - p),
    )
    team.run(_dropout_counters, call, call.counters, n // _GRAIN)
    return y
