r"""What a 4-bit weight is, and the way in and out of it (QLoRA, arXiv:2305.14314, section 3).

    weight = code[q] * absmax                          q: 4 bits, absmax: one per block of 64
    absmax = map8[c] * absmax2 + offset                c: 8 bits, absmax2: one per 256 blocks

The second line is double quantization: 4.127 bits per weight in place of 4.5. The mathematics is in
`kernels/reference/`; here is the record that holds the result, and the checks before it is made.
"""

from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from minilora import ops
from minilora.kernels.reference.codebooks import levels

PARTS = ("packed", "absmax", "absmax2", "offset")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_NO_TENSOR = (
    "{} was asked of a 4-bit weight, which is no tensor: the model reads a layer's weight without "
    "calling the layer. Leave the layer out of minilora.quantize with exclude=, or compute with "
    "weight.dequantize()"
)


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
        quant_type: name of the codebook, "nf4" or "fp4".

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

    @classmethod
    def __torch_function__(cls, function: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """PyTorch calls this where a weight is taken for a tensor, as F.linear(x, layer.weight)."""
        raise TypeError(_NO_TENSOR.format(getattr(function, "__name__", function)))

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    __rmatmul__ = __matmul__

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(_NO_TENSOR.format(name))

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
        moved = {n: t.to(device) for n in PARTS if (t := getattr(self, n)) is not None}
        return replace(self, **moved)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the dense weight in `dtype` (default: the dtype it had): see `dequantize_nf4`."""
        return dequantize_nf4(self, dtype)


def quantize_nf4(
    weight: Tensor, block_size: int = 64, double_quant: bool = True, quant_type: str = "nf4"
) -> NF4Weight:
    r"""Quantizes a weight of any shape to 4 bits: NormalFloat, or FP4 with `quant_type="fp4"`.

        q = argmin_j |code_j - w / absmax|,    absmax = max |w| over each block

    Blocks run over the flattened weight. Codes and absmax are those of bitsandbytes'
    `quantize_4bit`, except for an incomplete last block with values exactly on a rounding boundary:
    there its CPU build divides by absmax, and multiplies by 1/absmax elsewhere. The 8-bit codes of
    double quantization are the nearest; its own, from a table, differ in 0.1 to 0.3 % of blocks.

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
    check_values(weight, double_quant)
    packed, absmax = ops.quantize(weight.detach(), block_size, quant_type)
    scales = absmax, None, None
    if double_quant:
        scales = ops.double_quantize(absmax)
    return NF4Weight(packed, *scales, weight.shape, weight.dtype, block_size, quant_type)


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
        raise TypeError(f"dtype={dtype}: an NF4 weight decodes to one of {DTYPES}")
    return ops.dequantize(w, dtype)


def check_format(block_size: int, quant_type: str) -> None:
    """Raises ValueError unless the kernels have this block size and this codebook."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size={block_size}: choose one of {BLOCK_SIZES} (QLoRA uses 64)")
    levels(quant_type)


def check_values(weight: Tensor, double_quant: bool, name: str = "the weight") -> None:
    """Raises TypeError or ValueError unless these are finite floats. Makes no copy of them."""
    if not isinstance(weight, Tensor) or weight.dtype not in DTYPES:
        found = getattr(weight, "dtype", type(weight).__name__)
        raise TypeError(f"a weight to quantize is a floating-point tensor, not {found}")
    if weight.numel() == 0:
        raise ValueError(f"nothing to quantize: {name} has shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values: load the model first")

    # Rounding an absmax to 8 bits may make it 0.4 % larger.
    largest = min(torch.finfo(dtype).max for dtype in (weight.dtype, torch.float32))
    largest *= 0.99 if double_quant else 1
    if not all(abs(bound.item()) <= largest for bound in weight.detach().aminmax()):
        fault = f"{name} holds NaN or infinity, or a value above {largest:.3g}: to quantize"
        raise ValueError(f"{fault}, repair it, use a wider dtype, or leave it out with exclude=")
