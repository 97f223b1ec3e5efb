"""Matrices as words of 32 bits: one float32 number, or two bfloat16 numbers that are multiplied
with two others and added, by one instruction.

    rows        [rows, width / numbers]             neighbours of a row in a word
    pairs       [rows / numbers, width]             neighbours of a column in a word
    columns     [blocks, width / numbers, 64]       the rows' words, transposed in blocks of 64 rows

For float32 words are numbers, and rows and pairs the same. All sizes are padded with zeros: rows to
a multiple of 64, the width to one of 32.
"""

from typing import Any

import numpy as np

from .floats import rounded
from .moves import copy, transpose_16
from .runtime import jit

# Rows of a block.
BLOCK = 64


@jit
def padded(size: int, multiple: int) -> int:
    """Returns the next multiple."""
    return -(-size // multiple) * multiple


@jit
def zeros(size: int) -> Any:
    """Returns words that begin with a cache line: loads across two take twice as long."""
    memory = np.zeros(size + 16, np.uint32)
    first = (-memory.ctypes.data) % 64 // 4
    return memory[first : first + size]


@jit
def pair(low: Any, high: Any) -> Any:
    """Returns two bfloat16 numbers as a word."""
    above = np.uint32(high) << np.uint32(16)
    return np.uint32(low) | above


@jit
def as_pairs(rows: Any, width: int, numbers: int) -> Any:
    """Returns rows as pairs."""
    if numbers == 1:
        return rows
    x = rows.view(np.uint16)
    out = zeros(rows.size)
    for first in range(0, rows.size, width):
        even, odd = 2 * first, 2 * first + width
        low, high = x[even : even + width], x[odd : odd + width]
        pairs = out[first : first + width]
        for i in range(np.uint64(width)):
            pairs[i] = pair(low[i], high[i])
    return out


@jit
def as_columns(rows: Any, words: int) -> Any:
    """Returns rows of so many words as columns."""
    out = zeros(rows.size)
    for first in range(0, rows.size, BLOCK * words):
        for r in range(0, BLOCK, 16):
            for c in range(0, words, 16):
                source, target = first + r * words + c, first + c * BLOCK + r
                transpose_16(rows, source, words, out, target, BLOCK)
    return out


@jit
def clear(x: Any) -> None:
    """x = 0. Numba's x[:] = 0 takes ten times as long."""
    for i in range(np.uint64(x.size)):
        x[i] = 0


@jit
def round_to_rows(x: Any, numbers: int, out: Any) -> None:
    """out = float32 rows x as rows of words."""
    if numbers == 1:
        copy(x.view(np.uint32), 0, out, 0, x.size)
        return
    halves = out.view(np.uint16)
    for i in range(np.uint64(x.size)):
        halves[i] = rounded(x[i], halves)


@jit
def round_to_pairs(
    x: Any,
    width: int,
    numbers: int,
    out: Any,
) -> None:
    """out = float32 rows x [.., width] as pairs."""
    if numbers == 1:
        copy(x.view(np.uint32), 0, out, 0, x.size)
        return
    halves = out.view(np.uint16)
    for first in range(0, out.size, width):
        even, odd = 2 * first, 2 * first + width
        low, high = x[even : even + width], x[odd : odd + width]
        pairs = out[first : first + width]
        for i in range(np.uint64(width)):
            below = rounded(low[i], halves)
            above = rounded(high[i], halves)
            pairs[i] = pair(below, above)


@jit
def transpose_to_rows(x: Any, width: int, out: Any) -> None:
    """out [64, width] = x [width, 64], float32."""
    source = x.view(np.uint32)
    target = out.view(np.uint32)
    for r in range(0, width, 16):
        for c in range(0, BLOCK, 16):
            a, b = r * BLOCK + c, c * width + r
            transpose_16(source, a, BLOCK, target, b, width)
