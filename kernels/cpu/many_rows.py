"""Products of many rows with a 4-bit weight: training, and the prompt of a generation.

    y  =  x W^T + s z B^T        x [M, I]    W [O, I]    z [M, r]    B [O, r]
    dx = dy W   + s u A         dy [M, O]                u [M, r]    A [r, I]

Both are Y = L R + s T F with L [M, K] and R [K, N]. A thread computes columns of Y. It decodes 32
columns of R into a panel, which stays in its cache, and multiplies all rows of L by it, eight at a
time; their sums are in float32 and rounded once, with the low-rank term in them. No dense W is
written to memory or read from it, and Y is written once.

BLAS multiplies on processors without AVX-512, and where the sizes do not fit (`is_fast`).
"""

import ctypes
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ..reference.nf4 import GROUP, PackedWeight
from . import nf4, team
from .avx512 import AVX512, AVX512_BF16
from .moves import prefetch_to_write
from .panels import Weight, copy_columns, copy_rows, decode_columns, decode_rows
from .products import COLUMNS, ROWS, add_tile, store_sum_of_products
from .runtime import jit
from .team import elements, pointer
from .words import BLOCK, clear, zeros

# The fewest products that are worth a thread of their own.
_GRAIN = 1 << 19

# Words of L whose products are summed before their sum is added to the others.
_CHUNK = 512

_SIZES = ("units", "kernel", "forward", "M", "K", "N", "r", "block_size")
_ADDRESSES = ("packed", "absmax", "absmax2", "offset", "levels", "L", "T", "F", "Y")


class _Call(ctypes.Structure):
    """A call, as the threads read it: sizes, addresses (0: there is no such tensor), s."""

    _fields_ = (
        *[(name, ctypes.c_int64) for name in (*_SIZES, *_ADDRESSES)],
        ("scale", ctypes.c_float),
    )


_CALL = np.dtype(_Call)

# Columns of Y that a team counts as one row: it divides rows in multiples of 16.
_UNIT = COLUMNS // 16


@jit
def _weight(call: Any) -> Any:
    O, I = (call.N, call.K) if call.forward else (call.K, call.N)
    blocks = O * I // call.block_size
    groups = 0 if call.absmax2 == 0 else -(-blocks // GROUP)
    offset = np.float32(0)
    if groups:
        offset = elements(call.offset, np.float32, 0, 1)[0]

    return Weight(
        O,
        I,
        call.block_size,
        elements(call.packed, np.uint8, 0, O * I // 2),
        elements(call.absmax, np.float32, 0, 0 if groups else blocks),
        elements(call.absmax, np.uint8, 0, blocks),
        elements(call.absmax2, np.float32, 0, groups),
        offset,
        elements(call.levels, np.float32, 0, 16),
    )


@jit
def _multiply(call: Any, dtype: Any, start: int, stop: int) -> None:
    """Columns [start, stop) of Y."""
    w = _weight(call)
    F = elements(call.F, dtype, 0, call.r * call.N)
    numbers = 4 // F.itemsize
    steps, r_steps = call.K // numbers, call.r // numbers
    panels = zeros(2 * steps * COLUMNS)
    thin = zeros(r_steps * COLUMNS)

    for left in range(start // BLOCK * BLOCK, stop, BLOCK):
        first, last = max(start, left), min(stop, left + BLOCK)
        if call.forward:
            decode_rows(w, dtype, first, last, panels)
        else:
            decode_columns(w, dtype, left, panels)

        for column in range(first, last, COLUMNS):
            if call.forward:
                copy_rows(F.view(np.uint32), r_steps, column, thin)
            else:
                copy_columns(F, call.N, r_steps, column, thin)
            at = column % BLOCK // COLUMNS * steps * COLUMNS
            panel = panels[at : at + steps * COLUMNS]
            _multiply_panel(call, dtype, numbers, panel, thin, column)


@jit
def _multiply_panel(
    call: Any,
    dtype: Any,
    numbers: int,
    panel: Any,
    thin: Any,
    column: int,
) -> None:
    """Columns [column, column + 32) of Y."""
    M, N = call.M, call.N
    Y = elements(call.Y, dtype, 0, M * N)
    steps, r_steps = call.K // numbers, call.r // numbers
    L = elements(call.L, np.uint32, 0, M * steps)
    T = elements(call.T, np.uint32, 0, M * r_steps)
    sums = zeros(ROWS * COLUMNS).view(np.float32)
    arrays = (T, thin, L, panel, sums, Y)

    for top in range(0, M, ROWS):
        # The last rows may be computed twice.
        m = min(top, M - ROWS)
        for i in range(ROWS):
            prefetch_to_write(Y, (m + i) * N + column)
        k = 0
        if steps > _CHUNK:
            clear(sums)
        while steps - k > _CHUNK:
            add_tile(numbers, L, m * steps + k, steps, panel, k * COLUMNS, _CHUNK, sums)
            k += _CHUNK
        of_T, of_L = (m * r_steps, r_steps), (m * steps + k, steps, k * COLUMNS, steps - k)
        sizes = (*of_T, *of_L, m * N + column, N)
        store_sum_of_products(call.scale, arrays, sizes)


def _multiply_bfloat16(address: int, start: int, stop: int) -> None:
    call = carray(pointer(address), 1, _CALL)[0]
    _multiply(call, np.uint16, start * _UNIT, stop * _UNIT)


def _multiply_float32(address: int, start: int, stop: int) -> None:
    call = carray(pointer(address), 1, _CALL)[0]
    _multiply(call, np.uint32, start * _UNIT, stop * _UNIT)


def _shapes(
    L: Tensor,
    w: PackedWeight,
    r: int,
    forward: bool,
) -> tuple[tuple[int, ...], ...]:
    """The shapes that L, T, F and Y must have."""
    O, I = w.shape
    *batch, _ = L.shape
    K, N = (I, O) if forward else (O, I)
    F = (N, r) if forward else (r, N)
    return (*batch, K), (*batch, r), F, (*batch, N)


def is_fast(
    L: Tensor,
    w: PackedWeight,
    T: Tensor | None = None,
    F: Tensor | None = None,
    *,
    forward: bool,
) -> bool:
    """Whether `product` takes these, on this processor; PyTorch refuses what is wrong."""
    O, I = w.shape
    r = 0 if T is None else T.shape[-1]
    shapes = _shapes(L, w, r, forward)
    for t, shape in zip((L, T, F), shapes[:3], strict=True):
        if t is not None and (t.shape != shape or t.dtype != L.dtype or not t.is_cpu):
            return False
    if O % COLUMNS or I % w.block_size or w.block_size % BLOCK or r % 2:
        return False
    if L.numel() < ROWS * L.shape[-1]:
        return False
    if L.dtype == torch.bfloat16:
        return AVX512_BF16
    return AVX512 and L.dtype == torch.float32


def product(
    L: Tensor,
    w: PackedWeight,
    T: Tensor | None = None,
    F: Tensor | None = None,
    scale: float = 0.0,
    *,
    forward: bool,
) -> Tensor:
    """Returns L W^T + scale T F^T, [.., O]; or of a backward L W + scale T F, [.., I].

    Rounded once, to the dtype of L.
    """
    r, T_address, F_address = 0, 0, 0
    if T is not None and F is not None:
        # Kept in variables: they live as long as the call.
        T, F = T.contiguous(), F.contiguous()
        r, T_address, F_address = T.shape[-1], T.data_ptr(), F.data_ptr()

    shape, *_, shape_of_Y = _shapes(L, w, r, forward)
    L = L.contiguous()
    Y = L.new_empty(shape_of_Y)
    K, N = shape[-1], shape_of_Y[-1]
    M, units = L.numel() // K, N // _UNIT

    addresses = L.data_ptr(), T_address, F_address, Y.data_ptr()
    sizes = units, 0, forward, M, K, N, r, w.block_size
    call = _Call(*sizes, *nf4.addresses(w), *addresses, scale)
    kernel = _multiply_float32 if L.dtype == torch.float32 else _multiply_bfloat16
    team.run(kernel, call, units, M * N * K // _GRAIN)
    return Y
