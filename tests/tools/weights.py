"""Packed weights for the tests of kernels, quantized by the reference."""

from torch import Tensor

from minilora.kernels.reference import nf4 as reference
from minilora.kernels.reference.nf4 import PackedWeight


def packed_weight(
    x: Tensor, block_size: int = 64, double: bool = False, quant_type: str = "nf4"
) -> PackedWeight:
    """Returns the quantized x, with or without double quantization."""
    packed, absmax = reference.quantize(x, block_size, quant_type)
    scales = reference.double_quantize(absmax) if double else (absmax, None, None)
    return PackedWeight(packed, *scales, tuple(x.shape), block_size, quant_type)
