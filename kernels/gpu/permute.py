r"""Eight codes to eight 16-bit levels by byte permutes, for the skinny product.

NVIDIA's `prmt` picks any four bytes out of two registers, so two registers are a table of eight
bytes and one instruction looks up four. The table of 16 levels in bfloat16 or float16 is two
planes, of low and of high bytes, 16 bytes or four registers each. For the four codes of half a
word, in each plane:

    x = prmt(plane 0, plane 1, code & 7)
    y = prmt(plane 2, plane 3, code & 7)
    bytes = prmt(x, y, lane + 4 * (code >> 3))

then two permutes put low and high bytes side by side: 22 instructions for 8 weights, nothing from
memory, no conversion. Where there is no PTX (AMD), `level_pairs` loads the same levels from a table
in memory. Tested on every 16-bit half of a word.
"""

import functools

import torch

from ..reference import codebooks
from .runtime import tl, triton


@functools.cache
def ptx(quant_type: str, dtype: torch.dtype) -> str:
    """Returns the PTX that turns word $4 into four registers of two levels, in memory order."""
    bits = codebooks.levels(quant_type).to(dtype).view(torch.int16).tolist()
    planes = {"low": _plane(bits, 0), "high": _plane(bits, 8)}

    # Nibble i of a selector: three bits of code i; in the last permute i, or i + 4 where the code
    # has bit 3.
    text = [
        ".reg .b32 code, which, x, y, low, high;",
        "and.b32 code, $4, 0x77777777;",
        "shr.u32 which, $4, 1;",
        "and.b32 which, which, 0x44444444;",
        "or.b32 which, which, 0x32103210;",
    ]

    for half in (0, 2):
        if half:
            text += ["shr.u32 code, code, 16;", "shr.u32 which, which, 16;"]

        for name, (p0, p1, p2, p3) in planes.items():
            text += [
                f"prmt.b32 x, {p0}, {p1}, code;",
                f"prmt.b32 y, {p2}, {p3}, code;",
                f"prmt.b32 {name}, x, y, which;",
            ]

        # Nibbles 1, 0 and 3, 2 are weights 0, 1 and 2, 3: a byte's first is in its high nibble.
        text += [
            f"prmt.b32 ${half}, low, high, 0x4051;",
            f"prmt.b32 ${half + 1}, low, high, 0x6273;",
        ]

    return "{" + " ".join(text) + "}"


def _plane(bits: list[int], shift: int) -> list[str]:
    """Returns one byte of each of the 16 levels, as four hexadecimal words."""
    byte = [b >> shift & 255 for b in bits]
    words = [sum(byte[4 * i + j] << 8 * j for j in range(4)) for i in range(4)]
    return [hex(word) for word in words]


@triton.jit
def _pair(first, second, levels):
    """Two levels in one int32, the first in the low half."""
    a = tl.load(levels + first).to(tl.int16, bitcast=True)
    b = tl.load(levels + second).to(tl.int16, bitcast=True)
    return a.to(tl.int32) & 0xFFFF | b.to(tl.int32) << 16


@triton.jit
def level_pairs(word, levels, PTX: tl.constexpr):
    """Four int32 of two 16-bit levels each: weights (0, 1), (2, 3), (4, 5), (6, 7) of every word.

    PTX: what `ptx` returns for these levels, or None to look them up in `levels`, 16 bits each.
    """
    if PTX is not None:
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            PTX,
            "=r,=r,=r,=r,r",
            [word],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        p0 = _pair(word >> 4 & 15, word & 15, levels)
        p1 = _pair(word >> 12 & 15, word >> 8 & 15, levels)
        p2 = _pair(word >> 20 & 15, word >> 16 & 15, levels)
        p3 = _pair(word >> 28 & 15, word >> 24 & 15, levels)
    return p0, p1, p2, p3
