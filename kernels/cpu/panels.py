"""Panels: 32 columns of a matrix [K, N], as the pairs of words.py that products.py multiplies by.

A panel of W^T is 32 rows of W, a panel of W 32 of its columns: decoded from the packed weight. Two
are made at a time, one after the other in memory, since a block has 64 columns.
"""

from typing import Any, NamedTuple

from .avx512 import look_up_64
from .moves import pair_rows, transpose_16
from .nf4 import absmax_of_block
from .products import COLUMNS
from .runtime import jit
from .words import BLOCK, zeros

# Rows that are transposed at once.
_ROWS = 16


class Weight(NamedTuple):
    """W [rows, columns], packed, as arrays. Its absmax is in `absmax`, or in `codes` and `absmax2`.

    No block crosses a row; a block has a multiple of 64 weights.
    """

    rows: Any
    columns: Any
    block_size: Any
    packed: Any
    absmax: Any
    codes: Any
    absmax2: Any
    offset: Any
    levels: Any


@jit
def _decode(
    w: Any,
    row: int,
    column: int,
    out: Any,
    target: int,
) -> None:
    """out[target : target + 64] = the bits of W[row, column : column + 64]."""
    first = row * w.columns + column
    block = first // w.block_size
    if w.absmax2.size:
        scale = absmax_of_block(block, w.codes, w.absmax2, w.offset)
    else:
        scale = w.absmax[block]
    look_up_64(w.packed, first // 2, w.levels, scale, out, target)


@jit
def decode_rows(
    w: Any,
    dtype: Any,
    first: int,
    last: int,
    panels: Any,
) -> None:
    """Panels of W^T, of rows [first, last) in one block of 64, multiples of 32; the others stay."""
    decoded = zeros(_ROWS * BLOCK)
    bits = decoded.view(dtype)
    numbers = 4 // bits.itemsize
    words, size = BLOCK // numbers, w.columns // numbers * COLUMNS

    for top in range(first, last, _ROWS):
        panel = top % BLOCK // COLUMNS * size + top % COLUMNS
        for column in range(0, w.columns, BLOCK):
            for i in range(_ROWS):
                _decode(w, top + i, column, bits, i * BLOCK)
            target = panel + column // numbers * COLUMNS
            for k in range(0, words, 16):
                transpose_16(decoded, k, words, panels, target + k * COLUMNS, COLUMNS)


@jit
def decode_columns(w: Any, dtype: Any, first: int, panels: Any) -> None:
    """Panels of W, of columns [first, first + 64)."""
    bits = zeros(BLOCK).view(dtype)
    numbers = 4 // bits.itemsize
    size = w.rows // numbers * COLUMNS
    for row in range(0, w.rows, numbers):
        for i in range(numbers):
            _decode(w, row + i, first, bits, i * BLOCK)
        target = row // numbers * COLUMNS
        pair_rows(bits, 0, BLOCK, panels, target)
        pair_rows(bits, COLUMNS, BLOCK + COLUMNS, panels, target + size)


@jit
def copy_rows(B: Any, steps: int, first: int, panel: Any) -> None:
    """A panel of B^T: rows [first, first + 32) of B, whose rows have `steps` words."""
    for i in range(COLUMNS):
        row = (first + i) * steps
        for k in range(steps):
            panel[k * COLUMNS + i] = B[row + k]


@jit
def copy_columns(
    A: Any,
    columns: int,
    steps: int,
    first: int,
    panel: Any,
) -> None:
    """A panel of A [.., columns]: columns [first, first + 32), in bits."""
    numbers = 4 // A.itemsize
    for k in range(steps):
        low = k * numbers * columns + first
        pair_rows(A, low, low + columns, panel, k * COLUMNS)
