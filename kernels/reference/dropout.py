r"""Dropout with a mask that is a function of a seed, so that a backward draws it again.

    y_i = x_i / (1 - p)   if word_i >= p 2^32,   else 0

word_i is a 32-bit word of Philox4x32-10, the counter-based generator of Salmon et al. 2011
("Parallel random numbers: as easy as 1, 2, 3"), with which CUDA and Triton draw too. Its key is the
seed. A counter c gives four words: those of the elements c, c + q, c + 2q and c + 3q, where q is a
quarter of the number of elements, rounded up.

The gradient is the same function of dy: nothing has to be kept but the seed.
"""

from typing import Any

import torch
from torch import Tensor

# The multipliers of the two pairs of words, and what a round adds to the key (the golden ratio and
# sqrt(3) - 1, times 2^32).
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

_LOW = 0xFFFFFFFF


def words(n: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns n random words, int64 [n] in [0, 2^32)."""
    quarter = -(-n // 4)
    c0 = torch.arange(quarter, device=device)
    c1 = c2 = c3 = torch.zeros_like(c0)
    k0 = seed & _LOW
    k1 = _high(seed)

    for _ in range(ROUNDS):
        # 64-bit products of 32-bit words: the sign bit is a bit like the others.
        even = c0 * MULTIPLIERS[0]
        odd = c2 * MULTIPLIERS[1]

        c0 = _high(odd) ^ c1 ^ k0
        c1 = odd & _LOW
        c2 = _high(even) ^ c3 ^ k1
        c3 = even & _LOW

        k0 = (k0 + KEY_STEPS[0]) & _LOW
        k1 = (k1 + KEY_STEPS[1]) & _LOW
    return torch.cat([c0, c1, c2, c3])[:n]


def _high(x: Any) -> Any:
    """The upper 32 of 64 bits."""
    return x >> 32 & _LOW


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Returns x with elements zeroed with probability p, and the others divided by 1 - p.

    seed: int64 scalar in [0, 2^63), on the CPU.
    """
    drawn = words(x.numel(), int(seed), x.device)
    keep = drawn.view(x.shape) >= int(p * 2**32)
    scale = 1 / (1 - p)
    return torch.where(keep, x * scale, 0).to(x.dtype)
