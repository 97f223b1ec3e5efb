"""Products of a few rows of x with a 4-bit weight: generation, token by token.

    y = x W^T + s (x A^T) B^T        x [M, I]   W [O, I]   A [r, I]   B [O, r]   M <= 32

With so few rows, reading W is most of the work, and a dense copy of it would be written and read
again. Here a weight is multiplied in the register in which it was decoded, so only packed bytes
cross the memory bus: 8.65 MB for 4096 x 4096, where bfloat16 has 33.5 MB.

With AVX512-BF16 the products of bfloat16 are made by `vdpbf16ps`, which sums in float32: each
level is rounded to bfloat16, scaled as in a dense weight or, for a single row, before the scaling.
Elsewhere, and for float32, a plain loop decodes a row of W to float32.

One call does a whole layer, with its adapter: in a small model that takes less time than starting
three kernels.
"""

import ctypes
from typing import Any

import numba
import numpy as np
import torch
from numba import carray
from torch import Tensor

from ..reference.nf4 import GROUP, PackedWeight
from . import nf4, team
from .avx512 import AVX512_BF16, add_products, even_odd_64
from .runtime import jit
from .team import pointer

# The most rows of x that are faster here than with a dense copy of W.
_MOST_ROWS = 32
_MOST_ROWS_PORTABLE = 4

# Rows of W whose sums and tables are held in scratch memory; `_BEYOND` more rows have sums only.
_TILE = 64
_BEYOND = 8

# Blocks of 64 columns in one pass over a tile, if x has one row: 24 KB of x stay in an L1 cache
# of 32 KB, beside the rows of W that pass through it.
_PASS = 192

# The fewest weights that are worth a thread of their own.
_GRAIN = 1 << 15

_INTEGERS = ("O", "kernel", "I", "M", "r", "block_size")
_ADDRESSES = ("packed", "absmax", "absmax2", "offset", "levels", "x", "A", "B", "y")


class _Call(ctypes.Structure):
    """A call, as the threads read it: sizes, addresses (0: there is no such tensor), scaling."""

    _fields_ = (
        *[(name, ctypes.c_int64) for name in (*_INTEGERS, *_ADDRESSES)],
        ("scale", ctypes.c_float),
    )


_CALL = np.dtype(_Call)


def is_faster(rows: int, w: PackedWeight, dtype: torch.dtype) -> bool:
    """Whether `few_rows` is the fastest way to multiply this many rows of x by W."""
    if w.shape[1] % w.block_size:
        return False
    if _uses_bfloat16(w, dtype):
        return rows <= _MOST_ROWS
    return rows <= _MOST_ROWS_PORTABLE and dtype in (torch.float32, torch.bfloat16)


def _uses_bfloat16(w: PackedWeight, dtype: torch.dtype) -> bool:
    return AVX512_BF16 and dtype == torch.bfloat16 and w.block_size % 64 == 0


def few_rows(
    x: Tensor,
    w: PackedWeight,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 0.0,
) -> Tensor:
    """Returns x W^T + scale (x A^T) B^T, [.., O], in x's dtype. No block of W may cross a row."""
    in_bfloat16 = _uses_bfloat16(w, x.dtype)
    if not in_bfloat16 and x.dtype != torch.float32:
        return few_rows(x.float(), w, A, B, scale).to(x.dtype)

    O, I = w.shape
    if x.shape[-1] != I:
        raise ValueError(f"x {tuple(x.shape)} does not fit a weight {(O, I)}: it is [.., in]")
    y = x.new_empty(*x.shape[:-1], O)
    x = x.contiguous()
    r, address_A, address_B = 0, 0, 0
    if A is not None and B is not None:
        r = A.shape[0]
        if A.shape != (r, I) or B.shape != (O, r):
            shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
            raise ValueError(f"{shapes} do not fit a weight {(O, I)}: they are [r, in], [out, r]")
        # Kept in variables: they live as long as the call.
        A, B = _contiguous_float32(A), _contiguous_float32(B)
        address_A, address_B = A.data_ptr(), B.data_ptr()

    call = _Call(
        O,
        0,
        I,
        x.numel() // I,
        r,
        w.block_size,
        *nf4.addresses(w),
        x.data_ptr(),
        address_A,
        address_B,
        y.data_ptr(),
        scale,
    )
    kernel = _bfloat16_rows if in_bfloat16 else _float32_rows
    team.run(kernel, call, O, O * I // _GRAIN)
    return y


def _contiguous_float32(factor: Tensor) -> Tensor:
    if not factor.is_cpu:
        raise ValueError(f"x is on the CPU, the adapter on {factor.device}: move one")
    if factor.dtype != torch.float32:
        factor = factor.float()
    return factor.contiguous()


@jit
def _floats(address: int, size: int) -> Any:
    return carray(pointer(address), size, np.float32)


@jit
def _halves(address: int, size: int) -> Any:
    """Numbers in bfloat16, as their bits."""
    return carray(pointer(address), size, np.uint16)


@jit
def _bytes(address: int, size: int) -> Any:
    return carray(pointer(address), size, np.uint8)


_ANY_ORDER = {"reassoc", "contract"}


@numba.njit(nogil=True, error_model="numpy", fastmath=_ANY_ORDER)  # type: ignore[untyped-decorator]
def _dot(
    x: Any,
    i: int,
    y: Any,
    j: int,
    size: int,
) -> Any:
    """x[i : i + size] . y[j : j + size], summed in any order."""
    total = np.float32(0)
    for k in range(np.uint64(size)):
        total += x[np.uint64(i) + k] * y[np.uint64(j) + k]
    return total


@jit
def _fill_table(
    call: Any,
    top: int,
    end: int,
    out: Any,
) -> Any:
    """out [groups, 256] = the absmax of each 8-bit code, in the groups of rows [top, end) of W.

    Returns the number of the first group.
    """
    group_size = GROUP * call.block_size
    first = top * call.I // group_size
    last = (end * call.I - 1) // group_size
    absmax2 = _floats(call.absmax2, last + 1)
    offset = _floats(call.offset, 1)[0]
    for g in range(first, last + 1):
        row, scale = out[g - first], absmax2[g]
        for code in range(np.uint64(256)):
            row[code] = nf4.MAP8[code] * scale + offset
    return first


@jit
def _widen(x: Any, first: int, out: Any) -> None:
    """out = x[first:] as float32, from bfloat16 bits."""
    bits = out.view(np.uint32)
    for i in range(np.uint64(out.size)):
        bits[i] = np.uint32(x[np.uint64(first) + i]) << np.uint32(16)


@jit
def _down(call: Any, x: Any, z: Any, m: int) -> None:
    """z[m] = scale x A^T for one row x, float32."""
    A = _floats(call.A, call.r * call.I)
    for j in range(call.r):
        product = _dot(A, j * call.I, x, 0, call.I)
        z[m * call.r + j] = call.scale * product


@jit
def _even_odd(
    x: Any,
    M: int,
    size: int,
    out: Any,
    start: int,
) -> None:
    """out [blocks, size, 2, 32] from x [M, I]: each block's even elements, then its odd ones.

    Rows of `out` that x does not have are zero.
    """
    blocks = x.size // M // 64
    for k in range(blocks):
        for m in range(size):
            target = start + (k * size + m) * 64
            if m < M:
                even_odd_64(x, (m * blocks + k) * 64, out, target)
            else:
                out[target : target + 64] = 0


@jit
def _size(rows: int, M: int) -> int:
    """The smallest number of rows that a loop is compiled for, for M of all rows of x."""
    # One row alone is multiplied by unscaled levels: not the last of several.
    size = 1 if rows == 1 else 2
    while size < M:
        size *= 2
    return size


def _bfloat16_rows(address: int, start: int, stop: int) -> None:
    """y[:, start:stop] of a call with bfloat16 x and y, for up to 16 rows of x at a time."""
    call = carray(pointer(address), 1, _CALL)[0]
    O, I, r = call.O, call.I, call.r
    n = O * I // call.block_size
    absmax = _floats(call.absmax, n)
    codes = _bytes(call.absmax, n)
    x = _halves(call.x, call.M * I)
    y = _halves(call.y, call.M * O)

    groups = _TILE * I // call.block_size // GROUP + 2
    table = np.empty((groups, 256), np.float32)
    sums = np.empty((_TILE + _BEYOND) * 16, np.float32)
    bits = sums.view(np.uint32)
    row = np.empty(I, np.float32)
    z = np.empty(16 * r, np.float32)
    even_odd = np.empty(16 * I + 32, np.uint16)
    # A load across two cache lines takes twice as long.
    aligned = (-even_odd.ctypes.data) % 64 // 2

    for top_x in range(0, call.M, 16):
        M = min(16, call.M - top_x)
        size = _size(call.M, M)
        rows = x[top_x * I : (top_x + M) * I]
        _even_odd(rows, M, size, even_odd, aligned)
        for m in range(M if r else 0):
            _widen(rows, m * I, row)
            _down(call, row, z, m)

        for top in range(start, stop, _TILE):
            end = min(stop, top + _TILE)
            if call.absmax2 == 0:
                _tile(call, absmax, table, 0, even_odd, aligned, sums, size, top, end)
            else:
                group = _fill_table(call, top, end, table)
                _tile(call, codes, table, group, even_odd, aligned, sums, size, top, end)

            if r:
                _add_update(call, z, M, sums, size, top, end)
            for m in range(M):
                row_of_y = y[(top_x + m) * O :]
                _round(bits[m:], size, row_of_y[top:end])


@jit
def _add_update(
    call: Any,
    z: Any,
    M: int,
    sums: Any,
    size: int,
    top: int,
    end: int,
) -> None:
    """sums [end - top, size] += z B^T, for rows [top, end) of B."""
    r = call.r
    B = _floats(call.B, call.O * r)
    for o in range(top, end):
        for m in range(M):
            update = _dot(B, o * r, z, m * r, r)
            sums[(o - top) * size + m] += update


@jit
def _round(bits: Any, step: int, out: Any) -> None:
    """out = every step-th number of `bits`, float32, as bfloat16 bits."""
    for i in range(np.uint64(out.size)):
        out[i] = nf4.rounded_to_bfloat16(bits[i * np.uint64(step)])


@jit
def _tile(
    call: Any,
    absmax: Any,
    table: Any,
    group: int,
    x: Any,
    start: int,
    sums: Any,
    size: int,
    top: int,
    end: int,
) -> None:
    """sums [end - top, size] = the products of rows [top, end) of W with `size` rows of x.

    As many rows of W at a time as leave a register for each of their sums.
    """
    packed = _bytes(call.packed, call.O * call.I // 2)
    levels = _floats(call.levels, 16)
    blocks = call.I // 64
    shift = 0
    while 64 << shift < call.block_size:
        shift += 1
    sums[:] = 0
    step = _PASS // size

    for k in range(0, blocks, step):
        n = min(step, blocks - k)
        at_x = start + k * size * 64

        o = top
        while o < end:
            arrays = packed, absmax, table, levels, x, sums
            block, last, target = o * blocks + k, end - 1 - o, (o - top) * size
            sizes = block, blocks, last, shift, group, at_x, n, target
            if size == 1:
                add_products(8, 1, arrays, sizes)
                o += 8
            elif size == 2:
                add_products(8, 2, arrays, sizes)
                o += 8
            elif size == 4:
                add_products(4, 4, arrays, sizes)
                o += 4
            elif size == 8:
                add_products(2, 8, arrays, sizes)
                o += 2
            else:
                add_products(1, 16, arrays, sizes)
                o += 1


def _float32_rows(address: int, start: int, stop: int) -> None:
    """y[:, start:stop] of a call with float32 x and y, on any processor."""
    call = carray(pointer(address), 1, _CALL)[0]
    O, I, M, r = call.O, call.I, call.M, call.r
    B = _floats(call.B, O * r)
    x = _floats(call.x, M * I)
    y = _floats(call.y, M * O)

    W = np.empty(I, np.float32)
    z = np.empty(M * r, np.float32)
    for m in range(M if r else 0):
        _down(call, x[m * I : (m + 1) * I], z, m)

    for o in range(start, stop):
        _decode(call, o, W)
        for m in range(M):
            total = _dot(W, 0, x, m * I, I)
            if r:
                total += _dot(B, o * r, z, m * r, r)
            y[m * O + o] = total


@jit
def _decode(call: Any, o: int, out: Any) -> None:
    """out = row o of W."""
    blocks = call.I // call.block_size
    n = call.O * call.I
    packed = _bytes(call.packed, n // 2)
    absmax = _floats(call.absmax, call.O * blocks)
    levels = _floats(call.levels, 16)
    weight = (n, call.block_size, blocks)
    row = (0, blocks, o)
    bits = out.view(np.uint32)

    if call.absmax2 == 0:
        none, zero = absmax[:0], np.float32(0)
        nf4.decode(packed, absmax, none, zero, levels, bits, weight, row, o, o + 1)
    else:
        codes = _bytes(call.absmax, call.O * blocks)
        absmax2 = _floats(call.absmax2, -(-codes.size // GROUP))
        offset = _floats(call.offset, 1)[0]
        nf4.decode(packed, codes, absmax2, offset, levels, bits, weight, row, o, o + 1)
