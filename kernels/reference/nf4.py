r"""NF4 in plain PyTorch: the specification that every faster kernel is held to, bit for bit.

NF4 (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3) stores a weight as one of 16 levels, the quantiles of a
standard normal distribution scaled to [-1, 1], times the largest magnitude ("absmax") of its block of 64:

    w  ~  code[q] * absmax          q: 4 bits a weight,  absmax: 32 bits a block of 64,  4.5 bits a weight together

Double quantization stores the absmax in 8 bits too, in groups of 256 with one float32 each and one offset for all:

    absmax  ~  map8[c] * absmax2 + offset          8 bits a block + 32 bits a group: 4.127 bits a weight together

Layout (bitsandbytes' own, so that files can be exchanged): the weight is flattened row by row, blocks run over the flat
order and only the last may be short, two codes share a byte, the first in the high nibble.

Dimension letters: n weights, b = ceil(n / block_size) blocks, g = ceil(b / 256) groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TINY = 1e-38  # the reciprocal of a smaller absmax would be infinite, and 0 * infinity no number
GROUP = 256  # blocks that share one absmax2 (QLoRA section 3: "blocksize of 256 for the second quantization")

# QLoRA appendix E. `derive_nf4` computes them; these digits are the ones that every NF4 file in the world was made with.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def derive_nf4() -> Tensor:
    r"""Returns the 16 NF4 levels, float64 [16], from the normal distribution.

    A level is a quantile of the normal distribution. An even number of quantiles has no zero,
    and a weight of zero must stay zero, so QLoRA (section 3, equation 4) joins two halves that share it: 8 quantiles at
    equal steps of probability for the positive side, 7 for the negative,

        q_i = Phi^-1(p_i),    p from 1 - delta to 1/2,    delta = (1/32 + 1/30) / 2,

    divided by the largest. `delta` keeps the outermost quantile finite; the published levels use 1 - delta = 0.9677083.

    Example:
        >>> bool((derive_nf4() - torch.tensor(NF4, dtype=torch.float64)).abs().max() < 2**-23)  # an ulp of float32
        True
    """
    outermost = 0.9677083

    def half(levels: int) -> Tensor:
        p = torch.linspace(outermost, 0.5, levels + 1, dtype=torch.float64)[:-1]
        quantiles: Tensor = torch.special.ndtri(p)
        return quantiles

    codes = torch.cat([-half(7), torch.zeros(1, dtype=torch.float64), half(8)]).sort().values
    return codes / codes.max()


def derive_map8() -> Tensor:
    r"""Returns the 256 values of the signed 8-bit "dynamic map", float32 [256], ascending in [-0.993, 1].

    Dettmers (arXiv:1511.04561, section 2): the number's decade is coded by a run of zeros, so small numbers have few
    fraction bits and large ones many. Decade 10^(i-6) holds 2^i values, the midpoints of an even division of [0.1, 1],
    for i = 0 ... 6, with both signs; 0 and 1 complete the 256.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for i in range(7):
        edges = _edges(2**i)
        decade = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [decade, -decade]
    return torch.cat(values).sort().values


def _edges(parts: int) -> Tensor:
    """[0.1, 1] in equal parts, float32 [parts + 1]. `torch.linspace` rounds otherwise where a processor has no fused multiply-add;
    float64 rounded once gives every processor the bits of those that have it."""
    i = torch.arange(parts + 1, dtype=torch.float64)
    start = torch.tensor(0.1, dtype=torch.float32).double()
    step = ((1 - start).float() / parts).double()
    return torch.where(i < (parts + 1) // 2, start + step * i, 1 - step * (parts - i)).float()


with torch.device("cpu"):  # whatever the caller's default device is while this is imported
    CODE = torch.tensor(NF4, dtype=torch.float32)  # [16]
    MAP8 = derive_map8()  # float32 [256]


def midpoints(code: Tensor) -> Tensor:
    """Returns the thresholds of nearest rounding, float32 [len(code) - 1]: code j + 1 is nearer where y > threshold j."""
    return (code[:-1] + code[1:]) / 2


def _normalised(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Returns float32 x [n] as (x / absmax [b, block], absmax [b]); the last block is filled with zeros."""
    b = -(-x.numel() // block)
    rows = torch.zeros(b * block, dtype=torch.float32, device=x.device)
    rows[: x.numel()] = x
    rows = rows.view(b, block)
    absmax = rows.abs().amax(1)
    reciprocal = 1 / absmax.clamp(
        min=TINY
    )  # bitsandbytes multiplies by 1/absmax: not the same bits as x/absmax
    return rows * reciprocal[:, None], absmax


def quantize(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    r"""Returns (packed uint8 [ceil(n/2)], absmax float32 [b]) of a float tensor of any shape.

    q = argmin_j |code_j - x / absmax| : the number of thresholds below x / absmax. A block of zeros gets absmax 0, code 7.
    """
    x = x.detach().reshape(-1).float()
    y, absmax = _normalised(x, block_size)
    q = (
        torch.bucketize(y, midpoints(CODE).to(x.device))
        .to(torch.uint8)
        .view(-1)[: x.numel() + x.numel() % 2]
    )
    return q[0::2] << 4 | q[1::2], absmax


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (codes uint8 [b], absmax2 float32 [g], offset float32 scalar) of an absmax, float32 [b].

    The offset is the mean, summed in float64 and rounded once, so that every backend finds the same one.
    """
    offset = absmax.double().mean().float()
    y, absmax2 = _normalised(absmax - offset, GROUP)
    codes = torch.bucketize(y, midpoints(MAP8).to(absmax.device)).to(torch.uint8)
    codes[absmax2 == 0] = 0  # nothing to divide by: every code decodes to the offset
    return codes.view(-1)[: absmax.numel()], absmax2, offset


def double_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """Returns absmax = map8[codes] * absmax2 + offset, float32 [b]; the product and the sum are rounded one by one."""
    scale = absmax2.repeat_interleave(GROUP)[: codes.numel()]
    return MAP8.to(codes.device)[codes.int()] * scale + offset


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int,
) -> Tensor:
    """Returns code[q] * absmax, computed in float32 and rounded once to `dtype`, in `shape`.

    With `absmax2` and `offset`, `absmax` holds the uint8 codes of the double quantization.
    """
    if absmax2 is not None and offset is not None:
        absmax = double_dequantize(absmax, absmax2, offset)
    n = torch.Size(shape).numel()
    q = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:n]
    scale = absmax.repeat_interleave(block_size)[:n]
    return (CODE.to(packed.device)[q.int()] * scale).to(dtype).view(tuple(shape))
