"""Dropout on the CPU: the function of reference/dropout.py, bit for bit the same.

PyTorch draws its mask one number after another, in 6 ns each. Counters are independent of each
other, and eight of them fit an AVX-512 register.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..reference import dropout as reference
from ..reference.dropout import KEY_STEPS, MULTIPLIERS, ROUNDS
from .nf4 import rounded_to_bfloat16
from .runtime import bits, jit, run

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
            c0, c2 = odd >> _HALF ^ c1 ^ k0, even >> _HALF ^ c3 ^ k1
            c1, c3 = odd & _LOW, even & _LOW
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


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Returns x with elements zeroed with probability p, and the others divided by 1 - p.

    seed: int64 scalar in [0, 2^63), on the CPU.
    """
    if x.dtype not in (torch.float32, torch.bfloat16):
        return reference.dropout(x, p, seed)

    x = x.contiguous()
    y = torch.empty_like(x)
    run(
        _dropout,
        bits(x),
        bits(y),
        np.uint64(seed.item()),
        np.uint32(int(p * 2**32)),
        np.float32(1 / (1 - p)),
        rows=(0, -(-x.numel() // 4)),
        grain=_GRAIN // 4,
    )
    return y
