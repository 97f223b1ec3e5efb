r"""4-bit weights in plain PyTorch: the specification that every faster kernel matches bit for bit.

NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3) stores a weight as one of 16 levels
in [-1, 1] times the largest magnitude ("absmax") of its block of 64; FP4 does so with other levels
(see `codebooks.py`):

    w  ~  level[q] * absmax                  4 + 32/64 = 4.5 bits per weight

Double quantization also stores the absmax in 8 bits, in groups of 256 with one float32 each, plus
one offset for the whole weight:

    absmax  ~  map8[c] * absmax2 + offset    4 + 8/64 + 32/(64 * 256) = 4.127 bits per weight

Layout (that of bitsandbytes, so that files can be exchanged): the weight is flattened row by row,
blocks run over the flat order and only the last may be short, two codes share a byte, the first in
the high nibble.

Dimensions: n weights, b = ceil(n / block_size) blocks, g = ceil(b / 256) groups.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .codebooks import MAP8, ascending_codes, levels, midpoints, thresholds

# A smaller absmax has an infinite reciprocal, and 0 * infinity is not a number.
TINY = 1e-38

# Blocks that share one absmax2 (QLoRA, section 3: "blocksize of 256 for the second quantization").
GROUP = 256


class Parts(NamedTuple):
    """The tensors of a `PackedWeight`; in a Triton kernel their pointers."""

    packed: Any
    absmax: Any
    absmax2: Any = None
    offset: Any = None


class PackedWeight(NamedTuple):
    """A 4-bit weight as the kernels take it."""

    packed: Tensor  # uint8 [ceil(n/2)], two codes per byte, the first weight in the high nibble
    absmax: Tensor  # float32 [b]; double-quantized: uint8 codes [b]
    absmax2: Tensor | None  # None; double-quantized: float32 [g]
    offset: Tensor | None  # None; double-quantized: float32 scalar
    shape: tuple[int, ...]  # the shape of the weight, for a linear layer [O, I]
    block_size: int  # weights that share an absmax, counted over the flattened weight
    quant_type: str = "nf4"  # name of the levels in `CODEBOOKS`

    @property
    def tensors(self) -> Parts:
        return Parts(self.packed, self.absmax, self.absmax2, self.offset)

    @property
    def double_quantized(self) -> bool:
        return self.absmax2 is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def numel(self) -> int:
        """Number of weights (not of stored bytes)."""
        return torch.Size(self.shape).numel()


def _normalized(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Returns (x / absmax [b, block_size], absmax [b]) of float32 x [n], padded with zeros."""
    padded = F.pad(x, (0, -x.numel() % block_size))
    blocks = padded.view(-1, block_size)
    absmax = blocks.abs().amax(1)

    # bitsandbytes multiplies by 1 / absmax, which differs from x / absmax in the last bit.
    reciprocal = 1 / absmax.clamp(min=TINY)
    return blocks * reciprocal[:, None], absmax


def quantize(x: Tensor, block_size: int, quant_type: str = "nf4") -> tuple[Tensor, Tensor]:
    r"""Returns (packed uint8 [ceil(n/2)], absmax float32 [b]) of a float tensor of any shape.

        q = argmin_j |level_j - x / absmax|

    The number of thresholds below x / absmax says which level, counted from the lowest. A block of
    zeros gets absmax 0 and the code of 0.
    """
    x = x.detach().reshape(-1).float()
    y, absmax = _normalized(x, block_size)
    edges = thresholds(quant_type).to(x.device)
    codes = ascending_codes(quant_type).to(x.device)
    q = codes[torch.bucketize(y, edges)]

    # A weight of odd length fills its last byte with the code of 0, from the padding.
    n = x.numel() + x.numel() % 2
    pairs = q.flatten()[:n].view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1], absmax


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns (codes uint8 [b], absmax2 float32 [g], offset float32 scalar) of absmax float32 [b].

        offset = mean(absmax),    c = argmin_j |map8_j - (absmax - offset) / absmax2|

    The mean is summed in float64 and rounded once, so that every backend gets the same value.
    """
    offset = absmax.double().mean().float()
    y, absmax2 = _normalized(absmax - offset, GROUP)
    edges = midpoints(MAP8).to(absmax.device)
    codes = torch.bucketize(y, edges).to(torch.uint8)

    # Nothing to divide by: every code dequantizes to the offset.
    codes[absmax2 == 0] = 0
    codes = codes.flatten()[: absmax.numel()]
    return codes, absmax2, offset


def double_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """Returns absmax = map8[codes] * absmax2 + offset, float32 [b]; product and sum both round."""
    scale = absmax2.repeat_interleave(GROUP)[: codes.numel()]
    level = MAP8.to(codes.device)[codes.int()]
    return level * scale + offset


def dequantize(w: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Returns level[q] * absmax in `w.shape`, computed in float32 and rounded once to `dtype`."""
    absmax = w.absmax
    if w.absmax2 is not None and w.offset is not None:
        absmax = double_dequantize(absmax, w.absmax2, w.offset)

    n = w.numel()
    first, second = w.packed >> 4, w.packed & 15
    pairs = torch.stack([first, second], dim=1)
    q = pairs.flatten()[:n]
    scale = absmax.repeat_interleave(w.block_size)[:n]

    codebook = levels(w.quant_type).to(w.device)
    level = codebook[q.int()]
    return (level * scale).to(dtype).view(w.shape)
