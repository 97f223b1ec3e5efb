"""Weights that show a fused multiply-add where two roundings are promised.

    absmax = map8[code] * absmax2 + offset        with offset = -round(map8[code] * absmax2)

The reference rounds the product, then the sum, which is 0: so is every weight, and every product
with W. A fused multiply-add rounds once. What it leaves is the rounding error of the product, and
no weight is 0 whose level is not. With ordinary numbers the two differ in the last bit of the
absmax, and hardly ever in a weight of 16 bits.
"""

import math

import torch

from minilora.kernels.reference.codebooks import MAP8
from minilora.kernels.reference.nf4 import GROUP, PackedWeight

# What is left must not vanish in float16: about 2^-14 of an absmax2 of this size.
_LARGE = 2.0**13


def cancelling_weight(
    shape: tuple[int, ...], block_size: int = 64, quant_type: str = "nf4", code: int = 50
) -> PackedWeight:
    """Returns a double-quantized weight of random codes whose every absmax is 0.

    Args:
        shape: of the weight, [O, I] for a product
        code: of every absmax, one that stands for a negative number: the offset is positive then,
            as a mean of absmax is
    """
    draw = torch.Generator().manual_seed(code)
    level = MAP8[code]
    scales = _LARGE * (1 + torch.rand(1000, generator=draw))
    lost = (level.double() * scales.double() - level * scales).abs()
    scale = scales[lost.argmax()]

    n = math.prod(shape)
    blocks = -(-n // block_size)
    packed = torch.randint(256, ((n + 1) // 2,), generator=draw).to(torch.uint8)
    codes = torch.full((blocks,), code, dtype=torch.uint8)
    absmax2 = scale.repeat(-(-blocks // GROUP))
    return PackedWeight(packed, codes, absmax2, -(level * scale), shape, block_size, quant_type)
