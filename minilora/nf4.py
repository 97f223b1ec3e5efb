r"""What a 4-bit weight is, and the way in and out of it (QLoRA, arXiv:2305.14314, section 3).

    weight = code[q] * absmax                          q: 4 bits, absmax: one per block of 64
    absmax = map8[c] * absmax2 + offset                c: 8 bits, absmax2: one per 256 blocks

The second line is double quantization: 4.127 bits per weight in place of 4.5. The mathematics is in
`kernels/reference/`; here is the record that holds the result, and the checks before it is made.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora import ops
from minilora.kernels.reference.codebooks import CODEBOOKS

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class NF4Weight:
    r"""A weight in 4-bit NormalFloat. Not a tensor: a record of tensors that travels whole.

    Attributes:
        packed: uint8 [ceil(n/2)], two codes per byte, the first weight in the high nibble.
        absmax: float32 [ceil(n/block_size)]; double-quantized: uint8 codes of the same length.
        absmax2: None; double-quantized: float32 [ceil(blocks/256)].
        offset: None; double-quantized: float32 scalar.
        shape, dtype: those of the weight; `dequantize()` returns them.
        block_size: number of weights that share an absmax, counted over the flattened weight.
        quant_type: name of the codebook, "nf4".

    Example:
        >>> w = quantize_nf4(torch.randn(128, 64))
        >>> w.shape, w.dtype, w.nbytes
        (torch.Size([128, 64]), torch.float32, 4232)
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    block_size: int = 64
    quant_type: str = "nf4"

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(packed, absmax, absmax2, offset)."""
        return self.packed, self.absmax, self.absmax2, self.offset

    @property
    def double_quantized(self) -> bool:
        return self.absmax2 is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in self.tensors if t is not None)

    def numel(self) -> int:
        """Number of weights (not of stored bytes)."""
        return self.shape.numel()

    def to(self, device: torch.device | str) -> "NF4Weight":
        """Returns the same bits on `device`."""
        names = ("packed", "absmax", "absmax2", "offset")
        moved = {n: t.to(device) for n in names if (t := getattr(self, n)) is not None}
        return dataclasses.replace(self, **moved)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the dense weight in `dtype` (default: the dtype it had): see `dequantize_nf4`."""
        return dequantize_nf4(self, dtype)


def quantize_nf4(
    weight: Tensor, block_size: int = 64, double_quant: bool = True, quant_type: str = "nf4"
) -> NF4Weight:
    r"""Quantizes a weight of any shape to 4-bit NormalFloat.

        q = argmin_j |code_j - w / absmax|,    absmax = max |w| over each block

    Blocks run over the flattened weight. The bytes are those of bitsandbytes'
    `quantize_4bit(quant_type="nf4")`, except for an incomplete last block with values exactly on a
    rounding boundary: there its CPU build divides by absmax, and multiplies by 1/absmax elsewhere.

    Args:
        weight: float32, bfloat16 or float16 (float64 is rounded to float32 first), of any shape.
        block_size: 32, 64, ... 4096.
        double_quant: store the absmax in 8 bits too: 4.127 bits per weight in place of 4.5.
        quant_type: name of the codebook.

    Raises:
        TypeError: the weight is not a floating-point tensor.
        ValueError: it is empty, has no values or holds NaN or infinity; there is no such format.

    Example:
        >>> w = quantize_nf4(torch.randn(4096, 64))
        >>> round(8 * w.nbytes / w.numel(), 3)
        4.127
    """
    check_format(block_size, quant_type)
    _check_dense(weight)
    weight = weight.detach()

    absmax2 = offset = None
    packed, absmax = ops.quantize(weight, block_size, quant_type)
    if double_quant:
        absmax, absmax2, offset = ops.double_quantize(absmax)

    tensors = packed, absmax, absmax2, offset
    return NF4Weight(*tensors, weight.shape, weight.dtype, block_size, quant_type)


def dequantize_nf4(w: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the dense weight, code[q] * absmax, computed in float32 and rounded once to `dtype`.

    `dtype` may be float32, bfloat16, float16 or float64. Default: `w.dtype`.

    Raises:
        TypeError: another dtype.

    Example:
        >>> w = quantize_nf4(torch.tensor([[0.5, -1.0, 0.0, 1.0]]))
        >>> dequantize_nf4(w)[0, 1:]
        tensor([-1.,  0.,  1.])
    """
    dtype = w.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise TypeError(
            f"dtype={dtype}: an NF4 weight decodes to float32, bfloat16, float16 or float64"
        )
    dense: Tensor = ops.dequantize(w, dtype)
    return dense


def check_format(block_size: int, quant_type: str) -> None:
    """Raises ValueError unless the kernels have this block size and this codebook."""
    if block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise ValueError(f"block_size={block_size}: choose one of {sizes} (QLoRA uses 64)")
    if quant_type not in CODEBOOKS:
        names = ", ".join(map(repr, CODEBOOKS))
        raise ValueError(f"quant_type={quant_type!r}: minilora quantizes to {names}")


def is_finite(weight: Tensor) -> bool:
    """Whether no value is NaN or infinite, as float32 too. Makes no copy of the weight."""
    return all(math.isfinite(bound.float()) for bound in weight.detach().aminmax())


def _check_dense(weight: Tensor) -> None:
    if not isinstance(weight, Tensor) or weight.dtype not in DTYPES:
        found = getattr(weight, "dtype", type(weight).__name__)
        raise TypeError(f"a weight to quantize is a floating-point tensor, not {found}")
    if weight.numel() == 0:
        raise ValueError(f"nothing to quantize: the weight has shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise ValueError("the weight is on the meta device and has no values: load it first")
    if not is_finite(weight):
        raise ValueError("the weight holds NaN or infinity: repair the checkpoint first")
