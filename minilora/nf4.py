"""NF4Weight: what a quantized weight is, and the way in and out of it."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora import ops

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class NF4Weight:
    r"""A weight in 4-bit NormalFloat (QLoRA, arXiv:2305.14314, section 3). Not a tensor: a record of tensors.

    weight = code[q] * absmax, with absmax = map8[codes] * absmax2 + offset when it is double-quantized.

    Attributes:
        packed: uint8 [ceil(n/2)], two codes a byte, the first weight in the high nibble.
        absmax: float32 [ceil(n/block_size)]; double-quantized: uint8 codes of the same length.
        absmax2: None; double-quantized: float32 [ceil(blocks/256)].
        offset: None; double-quantized: float32 scalar.
        shape: the weight's shape, for a linear layer [out, in].
        dtype: the dtype that the weight had, and that `dequantize()` returns.
        block_size: weights that share an absmax, counted over the flattened weight.
        quant_type: "nf4".

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
        """(packed, absmax, absmax2, offset): what every kernel takes."""
        return self.packed, self.absmax, self.absmax2, self.offset

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor of the record."""
        return sum(t.nbytes for t in self.tensors if t is not None)

    def numel(self) -> int:
        """Number of weights (not of stored bytes)."""
        return self.shape.numel()

    def to(self, device: torch.device | str) -> "NF4Weight":
        """Returns the same bits on `device`."""
        moved = {
            k: None if t is None else t.to(device)
            for k, t in zip(_TENSORS, self.tensors, strict=True)
        }
        return dataclasses.replace(self, **moved)  # type: ignore[arg-type]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the dense weight in `dtype` (default: the dtype it had): see `dequantize_nf4`."""
        return dequantize_nf4(self, dtype)


_TENSORS = ("packed", "absmax", "absmax2", "offset")


def check_block_size(block_size: int) -> None:
    """Raises ValueError unless `block_size` is one that the kernels take."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(
            f"block_size={block_size}: choose one of {', '.join(map(str, BLOCK_SIZES))} (QLoRA uses 64)"
        )


def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    r"""Quantizes a weight of any shape to 4-bit NormalFloat.

    q = argmin_j |code_j - w / absmax|, absmax = max |w| over each block of the flattened weight (QLoRA, section 3).
    The bytes equal those of bitsandbytes' `quantize_4bit(quant_type="nf4")`, but for a short last block whose values sit on a
    threshold: there its CPU build divides by absmax, where it multiplies by 1/absmax everywhere else.

    Args:
        weight: float32, bfloat16 or float16 (float64 is quantized from its float32 rounding), any shape, not empty.
        block_size: 32, 64, ... 4096.
        double_quant: store the absmax in 8 bits too: 4.127 bits a weight in place of 4.5.

    Raises:
        TypeError: the weight is not a floating-point tensor.
        ValueError: it is empty, on the meta device, or holds NaN or infinity; or the block size is not one of those.

    Example:
        >>> w = quantize_nf4(torch.randn(4096, 64))
        >>> round(8 * w.nbytes / w.numel(), 3)
        4.127
    """
    check_block_size(block_size)
    if not isinstance(weight, Tensor) or weight.dtype not in DTYPES:
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(
            f"a weight to quantize must be a float32, bfloat16, float16 or float64 tensor, not {found}"
        )
    if weight.numel() == 0:
        raise ValueError(f"nothing to quantize: the weight has shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise ValueError("the weight is on the meta device and has no values: load it first")
    weight = weight.detach()
    low, high = weight.aminmax()  # NaN comes through, and no copy of the weight is made
    if not (
        math.isfinite(low.float()) and math.isfinite(high.float())
    ):  # float64 can be too large for float32
        raise ValueError(
            "the weight holds NaN or infinity: a block's absmax would be useless, mend the checkpoint first"
        )
    absmax2 = offset = None
    packed, absmax = ops.quantize(weight, block_size)
    if double_quant:
        absmax, absmax2, offset = ops.double_quantize(absmax)
    return NF4Weight(packed, absmax, absmax2, offset, weight.shape, weight.dtype, block_size)


def dequantize_nf4(w: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the dense weight, code[q] * absmax, computed in float32 and rounded once to `dtype`.

    Args:
        w: what `quantize_nf4` returned.
        dtype: float32, bfloat16, float16 or float64; None: `w.dtype`.

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
    return ops.dequantize(*w.tensors, w.shape, dtype, w.block_size)  # type: ignore[no-any-return]
