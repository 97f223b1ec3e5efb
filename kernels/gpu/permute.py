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
from torch import Tensor

from ..reference import codebooks
from .runtime import tl, triton

# Copies of the planes in memory: one for each row that a warp reads at a time.
COPIES = tl.constexpr(8)


@functools.cache
def byte_planes(device: torch.device, quant_type: str, dtype: torch.dtype) -> Tensor:
    """Returns the bytes of the 16 levels in a 16-bit dtype, first all low ones: uint8 [8, 2, 16].

    There are eight copies because a kernel in which every lane reads the same address makes the
    compiler hold the planes in uniform registers, of which `prmt` takes none: it then moves one to
    an ordinary register for almost every permute, one instruction more per weight.
    """
    levels = codebooks.levels(quant_type).to(dtype)
    planes = levels.view(torch.uint8).view(16, 2).T
    return planes.repeat(COPIES.value, 1, 1).to(device)


@triton.jit
def load_planes(planes_ptr, rows):
    """The eight registers of `byte_planes`, in the shape of `rows`: a copy for every eighth row."""
    word = planes_ptr.to(tl.pointer_type(tl.int32)) + 8 * (rows % COPIES)
    l0, l1, l2, l3 = tl.load(word), tl.load(word + 1), tl.load(word + 2), tl.load(word + 3)
    h0, h1, h2, h3 = tl.load(word + 4), tl.load(word + 5), tl.load(word + 6), tl.load(word + 7)
    return l0, l1, l2, l3, h0, h1, h2, h3


def _look_up() -> str:
    """Returns the PTX that turns word $4 into four registers of two levels, in memory order.

    The planes are $5 to $8, low bytes, and $9 to $12, high bytes.
    """
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

        for name, first in (("low", 5), ("high", 9)):
            text += [
                f"prmt.b32 x, ${first}, ${first + 1}, code;",
                f"prmt.b32 y, ${first + 2}, ${first + 3}, code;",
                f"prmt.b32 {name}, x, y, which;",
            ]

        # Nibbles 1, 0 and 3, 2 are weights 0, 1 and 2, 3: a byte's first is in its high nibble.
        text += [
            f"prmt.b32 ${half}, low, high, 0x4051;",
            f"prmt.b32 ${half + 1}, low, high, 0x6273;",
        ]

    return "{" + " ".join(text) + "}"


_LOOK_UP = tl.constexpr(_look_up())


@triton.jit
def _pair(first, second, levels):
    """Two levels in one int32, the first in the low half."""
    a = tl.load(levels + first).to(tl.int16, bitcast=True)
    b = tl.load(levels + second).to(tl.int16, bitcast=True)
    return a.to(tl.int32) & 0xFFFF | b.to(tl.int32) << 16


@triton.jit
def level_pairs(word, levels, PTX: tl.constexpr):
    """Four int32 of two 16-bit levels each: weights (0, 1), (2, 3), (4, 5), (6, 7) of every word.

    levels: what `load_planes` returned, with PTX; without, the pointer to the 16 levels, 16 bits
    each.
    """
    if PTX:
        l0, l1, l2, l3, h0, h1, h2, h3 = levels
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            _LOOK_UP,
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
            [word, l0, l1, l2, l3, h0, h1, h2, h3],
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
