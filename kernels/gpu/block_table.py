r"""The 16 weights that a block can hold as a table in registers, for the tiles.

A weight is round(level[code] * absmax), and a block has one absmax: whatever its codes, its weights
are among 16 products. A thread that decodes 32 weights of a block computes all 16, rounds them to
16 bits, as `dequantize` does, and looks its weights up by byte permutes, as `permute.py` looks up
bare levels:

    absmax  ->  16 products, 8 conversions of two each, 8 permutes into planes of bytes
    word    ->  22 instructions for 8 weights, in each of four words

These are 120 instructions for 32 weights: 3.75 per weight, nothing from memory. Where there is no
PTX (AMD, Triton's interpreter), `decode` of nf4.py computes the same bits from a table in memory.
"""

import functools

import torch

from ..reference import codebooks
from .permute import level_pairs
from .runtime import tl, triton

_CONVERT = {torch.bfloat16: "cvt.rn.bf16x2.f32", torch.float16: "cvt.rn.f16x2.f32"}


@functools.cache
def table_ptx(quant_type: str, dtype: torch.dtype) -> str:
    """Returns the PTX that turns the absmax $8 into a table of 16 weights in a 16-bit dtype.

    Registers $0 to $3 are their low bytes, $4 to $7 their high bytes.
    """
    bits = codebooks.levels(quant_type).view(torch.int32).tolist()
    text = [".reg .f32 a, b;", ".reg .b32 p, q;"]

    for j in range(4):
        for pair, first in (("p", 4 * j), ("q", 4 * j + 2)):
            text += [
                f"mul.rn.f32 a, $8, {_float(bits[first])};",
                f"mul.rn.f32 b, $8, {_float(bits[first + 1])};",
                f"{_CONVERT[dtype]} {pair}, b, a;",
            ]
        text += [f"prmt.b32 ${j}, p, q, 0x6420;", f"prmt.b32 ${j + 4}, p, q, 0x7531;"]

    return "{" + " ".join(text) + "}"


def _float(bits: int) -> str:
    return f"0f{bits & 0xFFFFFFFF:08X}"


@triton.jit
def _table(absmax, PTX: tl.constexpr):
    """The table of each block: four registers of low bytes, four of high bytes."""
    return tl.inline_asm_elementwise(
        PTX,
        "=r,=r,=r,=r,=r,=r,=r,=r,f",
        [absmax],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _four(a, b, c, d):
    """Four tensors in one, [.., 2, 2]: joining appends an index, the last is the lowest bit."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def decode_with_table(word, absmax, DTYPE: tl.constexpr, PTX: tl.constexpr, OPAQUE: tl.constexpr):
    """The weights of words [R, C], one absmax for each four: absmax [R, C / 4] -> [R, 8 C].

    PTX: what `table_ptx` returns for DTYPE.
    OPAQUE: hide from Triton how W was put together, for the sake of `mma.sync`.
    """
    ROWS: tl.constexpr = word.shape[0]
    WORDS: tl.constexpr = word.shape[1]
    table = _table(absmax, PTX)

    # A thread has four neighbouring words.
    even, odd = tl.split(tl.reshape(word, (ROWS, WORDS // 4, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    a0, a1, a2, a3 = level_pairs(w0, table, True)
    b0, b1, b2, b3 = level_pairs(w1, table, True)
    c0, c1, c2, c3 = level_pairs(w2, table, True)
    d0, d1, d2, d3 = level_pairs(w3, table, True)

    # [R, C / 4, word, pair], then the two halves of a pair.
    pairs = _four(
        _four(a0, b0, c0, d0), _four(a1, b1, c1, d1), _four(a2, b2, c2, d2), _four(a3, b3, c3, d3)
    )
    low = (pairs & 0xFFFF).to(tl.int16)
    high = (pairs >> 16).to(tl.int16)
    W = tl.reshape(tl.join(low, high), (ROWS, 8 * WORDS)).to(DTYPE, bitcast=True)

    if OPAQUE:
        # Does nothing, but Triton cannot look through it. It would find the joins and for their
        # sake have mma.sync take four neighbours of a row from each thread (kWidth 4), at the price
        # of several moves per instruction.
        W = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [W], dtype=W.dtype, is_pure=False, pack=2
        )
    return W
