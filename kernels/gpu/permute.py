r"""Eight codes to eight 16-bit levels by byte permutes, for the skinny product.

NVIDIA's `prmt` picks any four bytes out of two registers, so two registers are a table of eight bytes and one instruction looks
up four. The table of 16 levels in bfloat16 or float16 is two planes, of low and of high bytes, 16 bytes or four registers each.
For the four codes of half a word, in each plane:

    x = prmt(plane 0, plane 1, code & 7)    y = prmt(plane 2, plane 3, code & 7)    prmt(x, y, lane + 4 * (code >> 3))

then two permutes lay low and high bytes side by side. 22 instructions for 8 weights, nothing from memory, no conversion.
`levels` is that, or where there is no PTX (AMD) the same levels from a table in memory. Tested on every 16-bit half of a word.
"""

import torch

from ..reference import nf4 as reference
from .runtime import tl, triton


def ptx(dtype: torch.dtype) -> str:
    """The PTX that turns word $4 into four registers of two levels, in the order of memory."""
    bits = reference.CODE.to(dtype).view(torch.int16).tolist()

    def plane(shift: int) -> list[str]:
        level = [b >> shift & 255 for b in bits]
        return [hex(sum(level[4 * i + j] << 8 * j for j in range(4))) for i in range(4)]

    # A selector's nibble i: three bits of code i; in the last permute i, or i + 4 where the code has bit 3.
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
        for name, (p0, p1, p2, p3) in (("low", plane(0)), ("high", plane(8))):
            text += [
                f"prmt.b32 x, {p0}, {p1}, code;",
                f"prmt.b32 y, {p2}, {p3}, code;",
                f"prmt.b32 {name}, x, y, which;",
            ]
        # Nibbles 1, 0 and 3, 2 are weights 0, 1 and 2, 3: the first of a byte is in its high nibble.
        text += [
            f"prmt.b32 ${half}, low, high, 0x4051;",
            f"prmt.b32 ${half + 1}, low, high, 0x6273;",
        ]
    return "{" + " ".join(text) + "}"


BFLOAT16, FLOAT16 = tl.constexpr(ptx(torch.bfloat16)), tl.constexpr(ptx(torch.float16))


@triton.jit
def _pair(first, second, code16):
    """Two levels in one int32, the first in the low half."""
    a, b = (
        tl.load(code16 + first).to(tl.int16, bitcast=True),
        tl.load(code16 + second).to(tl.int16, bitcast=True),
    )
    return a.to(tl.int32) & 0xFFFF | b.to(tl.int32) << 16


@triton.jit
def levels(word, code16, PTX: tl.constexpr):
    """Four int32 of two 16-bit levels each: weights (0, 1), (2, 3), (4, 5), (6, 7) of every word."""
    if PTX:
        asm: tl.constexpr = BFLOAT16 if code16.dtype.element_ty == tl.bfloat16 else FLOAT16
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            asm,
            "=r,=r,=r,=r,r",
            [word],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        p0 = _pair(word >> 4 & 15, word & 15, code16)
        p1 = _pair(word >> 12 & 15, word >> 8 & 15, code16)
        p2 = _pair(word >> 20 & 15, word >> 16 & 15, code16)
        p3 = _pair(word >> 28 & 15, word >> 24 & 15, code16)
    return p0, p1, p2, p3
