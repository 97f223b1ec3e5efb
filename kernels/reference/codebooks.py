r"""The levels that a code stands for: 16 for a weight, 256 for a double-quantized absmax.

All three backends look levels up by `w.quant_type`: another 4-bit format is one more entry in
`CODEBOOKS`. NF4, "4-bit NormalFloat", is from QLoRA (Dettmers et al. 2023, arXiv:2305.14314,
section 3 and appendix E); FP4 has the levels and the codes of bitsandbytes; the 8-bit map is from
Dettmers (arXiv:1511.04561, section 2).
"""

import functools

import torch
from torch import Tensor

# The published digits, which every NF4 file is made with. `derive_nf4` computes them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# A sign and three bits: the values of `get_4bit_type("fp4")` in bitsandbytes' functional.py, in the
# order of their codes, which is not ascending. Zero has two codes, 0 and 8.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = (
    *(m / 12 for m in _FP4_MAGNITUDES),
    *(0.0 - m / 12 for m in _FP4_MAGNITUDES),
)

# The level of each code 0 ... 15, in [-1, 1]. A level of zero keeps a weight of zero exactly.
CODEBOOKS: dict[str, tuple[float, ...]] = {"nf4": NF4, "fp4": FP4}


def derive_nf4() -> Tensor:
    r"""Returns the 16 NF4 levels, float64 [16], from the normal distribution.

    A weight of zero must stay zero, but an even number of quantiles has no zero. QLoRA (section 3,
    equation 4) therefore joins two halves that share it, 8 positive quantiles and 7 negative ones,

        q_i = Phi^-1(p_i),    p from 1 - delta to 1/2,    delta = (1/32 + 1/30) / 2,

    divided by the largest. `delta` keeps the outermost quantile finite.

    Example:
        >>> error = (derive_nf4() - torch.tensor(NF4, dtype=torch.float64)).abs().max()
        >>> bool(error < 2**-23)  # the spacing of float32 numbers at 1
        True
    """
    # 1 - delta, with the digits that the published levels were computed from.
    outermost = 0.9677083

    def half(levels: int) -> Tensor:
        p = torch.linspace(outermost, 0.5, levels + 1, dtype=torch.float64)
        quantiles: Tensor = torch.special.ndtri(p[:-1])
        return quantiles

    zero = torch.zeros(1, dtype=torch.float64)
    halves = [-half(7), zero, half(8)]
    quantiles = torch.cat(halves).sort().values
    return quantiles / quantiles.max()


def derive_map8() -> Tensor:
    r"""Returns the 256 values of the signed 8-bit "dynamic map", float32 [256], in [-0.993, 1].

    For i = 0 ... 6, decade 10^(i-6) holds 2^i values of each sign, the midpoints of an even
    division of [0.1, 1]: larger numbers have a finer grid. 0 and 1 complete the 256.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32)]

    for i in range(7):
        scale = 10.0 ** (i - 6)
        decade = midpoints(_edges(2**i)) * scale
        values += [decade, -decade]

    return torch.cat(values).sort().values


def _edges(parts: int) -> Tensor:
    """Returns [0.1, 1] divided into equal parts, float32 [parts + 1].

    Computed in float64 and rounded once, which gives every processor the bits that `torch.linspace`
    has only where there is fused multiply-add.
    """
    i = torch.arange(parts + 1, dtype=torch.float64)
    start = torch.tensor(0.1, dtype=torch.float32).double()
    step = ((1 - start).float() / parts).double()

    from_below = start + step * i
    from_above = 1 - step * (parts - i)
    is_lower = i < (parts + 1) // 2
    return torch.where(is_lower, from_below, from_above).float()


def midpoints(levels: Tensor) -> Tensor:
    """Returns the thresholds of nearest rounding, float32 [len(levels) - 1], for sorted levels."""
    return (levels[:-1] + levels[1:]) / 2


@functools.cache
def levels(quant_type: str) -> Tensor:
    """Returns the 16 levels of a quantization type by code, float32 [16], on the CPU.

    Raises ValueError if no codebook has that name.
    """
    if quant_type not in CODEBOOKS:
        known = ", ".join(map(repr, CODEBOOKS))
        raise ValueError(f"quant_type={quant_type!r}: there is a codebook for {known}")

    # Explicit device and dtype: the caller may have changed the defaults.
    values = CODEBOOKS[quant_type]
    return torch.tensor(values, dtype=torch.float32, device="cpu")


@functools.cache
def thresholds(quant_type: str) -> Tensor:
    """Returns the 15 thresholds between the sorted levels of a quantization type, float32 [15]."""
    return midpoints(levels(quant_type).sort().values)


@functools.cache
def ascending_codes(quant_type: str) -> Tensor:
    """Returns the codes of a quantization type, uint8 [16], from the lowest level to the highest.

    For NF4 they are 0 ... 15. Of two codes with the same level the smaller is first.
    """
    return levels(quant_type).argsort(stable=True).to(torch.uint8)


# The caller may have changed the default device before importing this file.
with torch.device("cpu"):
    MAP8 = derive_map8()
