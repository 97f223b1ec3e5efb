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
from .avx512 import AVX512, AVX512_BF16, add_products, look_up_64
from .runtime import jit
from .team import pointer

# The most rows of x that are faster here than with a dense copy of W.
_MOST_ROWS = 32
_MOST_ROWS_PORTABLE = 4

# Rows of W whose scales and sums are held in scratch memory; it leaves some for rows beyond them.
_TILE = 64
_BEYOND = 8

# Blocks of 64 columns in one pass over a tile, if x has one row: x stays in the L1 cache.
_PASS = 256

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
    if _uses_bfloat16(w, x.dtype):
        return _product(_bfloat16_rows, x, w, A, B, scale)
    return _product(_float32_rows, x.float(), w, A, B, scale).to(x.dtype)


def _product(
    kernel: Any,
    x: Tensor,
    w: PackedWeight,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
) -> Tensor:
    O, I = w.shape
    y = x.new_empty((*x.shape[:-1], O))
    x = x.contiguous()
    r, address_A, address_B = 0, 0, 0
    if A is not None and B is not None:
        r = len(A)
        if A.shape != (r, I) or B.shape != (O, r):
            shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
            raise ValueError(f"{shapes} do not fit a weight {(O, I)}: they are [r, in], [out, r]")
        for factor in (A, B):
            if not factor.is_cpu:
                raise ValueError(f"x is on the CPU, the adapter on {factor.device}: move one")
        # Kept in variables: they live as long as the call.
        A, B = A.float().contiguous(), B.float().contiguous()
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
    team.run(kernel, call, O, O * I // _GRAIN)
    return y


_ANY_ORDER = {"reassoc", "contract"}


@numba.njit(nogil=True, error_model="numpy", fastmath=_ANY_ORDER)  # type: ignore[untyped-decorator]
def _dot(x: Any, i: int, y: Any, j: int, size: int) -> Any:
    """x[i : i + size] . y[j : j + size], summed in any order."""
    total = np.float32(0)
    for k in range(np.uint64(size)):
        total += x[np.uint64(i) + k] * y[np.uint64(j) + k]
    return total


@jit
def _scales(call: Any, chunk: int, first: int, count: int, out: Any) -> None:
    """out[0:count] = the absmax of the `chunk` weights at `first`, the next ones, and so on."""
    blocks = call.O * call.I // call.block_size
    repeat = call.block_size // chunk

    if call.absmax2 == 0:
        absmax = carray(pointer(call.absmax), blocks, np.float32)
        for i in range(count):
            out[i] = absmax[(first + i) // repeat]
        return

    codes = carray(pointer(call.absmax), blocks, np.uint8)
    absmax2 = carray(pointer(call.absmax2), -(-blocks // GROUP), np.float32)
    offset = carray(pointer(call.offset), 1, np.float32)[0]

    # The 256 values of a group are computed once, and looked up.
    table = np.empty(256, np.float32)
    done = 0
    while done < count:
        group = (first + done) // repeat // GROUP
        for code in range(256):
            table[code] = nf4.MAP8[code] * absmax2[group] + offset

        end = min(count, (group + 1) * GROUP * repeat - first)
        if repeat == 1:
            for i in range(np.uint64(done), np.uint64(end)):
                out[i] = table[codes[np.uint64(first) + i]]
        else:
            for i in range(done, end):
                out[i] = table[codes[(first + i) // repeat]]
        done = end


@jit
def _widen(x: Any, first: int, out: Any) -> None:
    """out = x[first:] as float32, from bfloat16 bits."""
    bits = out.view(np.uint32)
    for i in range(np.uint64(out.size)):
        bits[i] = np.uint32(x[np.uint64(first) + i]) << np.uint32(16)


@jit
def _down(call: Any, x: Any, z: Any, m: int) -> None:
    """z[m] = scale x A^T for one row x, float32."""
    A = carray(pointer(call.A), call.r * call.I, np.float32)
    for j in range(call.r):
        product = _dot(A, j * call.I, x, 0, call.I)
        z[m * call.r + j] = call.scale * product


@jit
def _even_odd(x: Any, M: int, size: int, out: Any, start: int) -> None:
    """out [blocks, size, 2, 32] from x [M, I]: each block's even elements, then its odd ones.

    Rows of `out` that x does not have are zero.
    """
    blocks = x.size // M // 64
    for k in range(blocks):
        for m in range(size):
            target = np.uint64(start + (k * size + m) * 64)
            source = np.uint64((m * blocks + k) * 64)
            for i in range(np.uint64(32)):
                even, odd = np.uint16(0), np.uint16(0)
                if m < M:
                    even, odd = x[source + 2 * i], x[source + 2 * i + 1]
                out[target + i] = even
                out[target + 32 + i] = odd


def _bfloat16_rows(address: int, start: int, stop: int) -> None:
    """y[:, start:stop] of a call with bfloat16 x and y, for up to 16 rows of x at a time."""
    call = carray(pointer(address), 1, _CALL)[0]
    O, I, r = call.O, call.I, call.r
    blocks = I // 64
    packed = carray(pointer(call.packed), O * I // 2, np.uint8)
    levels = carray(pointer(call.levels), 16, np.float32)
    B = carray(pointer(call.B), O * r, np.float32)
    x = carray(pointer(call.x), call.M * I, np.uint16)
    y = carray(pointer(call.y), call.M * O, np.uint16)

    scales = np.empty((_TILE + _BEYOND) * blocks, np.float32)
    sums = np.empty((_TILE + _BEYOND) * 16, np.float32)
    bits = sums.view(np.uint32)
    row = np.empty(I, np.float32)
    z = np.empty(16 * r, np.float32)
    even_odd = np.empty(16 * I + 32, np.uint16)
    # A load across two cache lines takes twice as long.
    aligned = (-even_odd.ctypes.data) % 64 // 2

    for top_x in range(0, call.M, 16):
        M = min(16, call.M - top_x)
        rows = x[top_x * I : (top_x + M) * I]
        size = 1 if call.M == 1 else 4 if M <= 4 else 8 if M <= 8 else 16
        _even_odd(rows, M, size, even_odd, aligned)
        for m in range(M if r else 0):
            _widen(rows, m * I, row)
            _down(call, row, z, m)

        for top in range(start, stop, _TILE):
            end = min(stop, top + _TILE)
            _scales(call, 64, top * blocks, (end - top) * blocks, scales)
            _tile(packed, levels, scales, even_odd, aligned, sums, size, blocks, top, end)

            for o in range(top, end):
                for m in range(M):
                    i = (o - top) * size + m
                    if r:
                        sums[i] += _dot(B, o * r, z, m * r, r)
                    y[(top_x + m) * O + o] = nf4.rounded_to_bfloat16(bits[i])


@jit
def _tile(
    packed: Any,
    levels: Any,
    scales: Any,
    x: Any,
    start: int,
    sums: Any,
    size: int,
    blocks: int,
    top: int,
    end: int,
) -> None:
    """sums [end - top, size] = the products of rows [top, end) of W with `size` rows of x.

    As many rows of W at a time as leave a register for each of their sums.
    """
    sums[:] = 0
    width = 32 * blocks
    step = _PASS // size

    for k in range(0, blocks, step):
        n = min(step, blocks - k)
        at_x = start + k * size * 64

        o = top
        while o < end:
            at, rest = o * width + 32 * k, end - 1 - o
            s, y = (o - top) * blocks + k, (o - top) * size
            if size == 1:
                add_products(
                    8, 1, packed, at, width, rest, x, at_x, scales, s, blocks, levels, n, sums, y
                )
                o += 8
            elif size == 4:
                add_products(
                    4, 4, packed, at, width, rest, x, at_x, scales, s, blocks, levels, n, sums, y
                )
                o += 4
            elif size == 8:
                add_products(
                    2, 8, packed, at, width, rest, x, at_x, scales, s, blocks, levels, n, sums, y
                )
                o += 2
            else:
                add_products(
                    1, 16, packed, at, width, rest, x, at_x, scales, s, blocks, levels, n, sums, y
                )
                o += 1


def _float32_rows(address: int, start: int, stop: int) -> None:
    """y[:, start:stop] of a call with float32 x and y, on any processor."""
    call = carray(pointer(address), 1, _CALL)[0]
    O, I, M, r = call.O, call.I, call.M, call.r
    chunk = min(64, call.block_size)
    packed = carray(pointer(call.packed), O * I // 2, np.uint8)
    levels = carray(pointer(call.levels), 16, np.float32)
    B = carray(pointer(call.B), O * r, np.float32)
    x = carray(pointer(call.x), M * I, np.float32)
    y = carray(pointer(call.y), M * O, np.float32)

    scales = np.empty(I // chunk, np.float32)
    W = np.empty(I, np.float32)
    bits = W.view(np.uint32)
    z = np.empty(M * r, np.float32)
    for m in range(M if r else 0):
        _down(call, x[m * I : (m + 1) * I], z, m)

    for o in range(start, stop):
        _scales(call, chunk, o * scales.size, scales.size, scales)
        for k in range(scales.size):
            source = o * I + k * chunk
            if AVX512 and chunk == 64:
                look_up_64(packed, source // 2, levels, scales[k], bits, k * 64)
            else:
                nf4.look_up(packed, source, levels, scales[k], bits, k * chunk, chunk)

        for m in range(M):
            total = _dot(W, 0, x, m * I, I)
            if r:
                total += _dot(B, o * r, z, m * r, r)
            y[m * O + o] = total
