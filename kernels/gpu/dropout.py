"""Dropout on a GPU, with Triton: the function of reference/dropout.py, bit for bit the same."""

import torch
from torch import Tensor

from ..reference import dropout as reference
from .runtime import FLOATS, check, launch, tl, triton

# Counters of one program: four elements each.
_COUNTERS = 2048


@triton.jit
def _dropout(x_ptr, y_ptr, n, quarter, seed, threshold, scale, COUNTERS: tl.constexpr):
    """The elements c, c + quarter, c + 2 quarter and c + 3 quarter of COUNTERS counters c."""
    c = tl.program_id(0) * COUNTERS + tl.arange(0, COUNTERS)
    words = tl.randint4x(seed, c)
    for j in tl.static_range(4):
        i = c.to(tl.int64) + j * quarter
        mask = (c < quarter) & (i < n)
        value = tl.load(x_ptr + i, mask=mask).to(tl.float32) * scale
        keep = words[j].to(tl.uint32, bitcast=True).to(tl.int64) >= threshold
        kept = tl.where(keep, value, 0.0).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + i, kept, mask=mask)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Returns x with elements zeroed with probability p, and the others divided by 1 - p.

    seed: int64 scalar in [0, 2^63), on the CPU.
    """
    check("x", x, FLOATS, x.device)
    if x.dtype == torch.float64:
        return reference.dropout(x, p, seed)

    x = x.contiguous()
    y = torch.empty_like(x)
    quarter = -(-x.numel() // 4)
    launch(
        _dropout, (-(-quarter // _COUNTERS),), x, y, x.numel(), quarter, int(seed),
        int(p * 2**32), 1 / (1 - p), COUNTERS=_COUNTERS, num_warps=4,
    )  # fmt: skip
    return y
