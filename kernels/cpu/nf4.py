"""4-bit weights on the CPU, with Numba: the functions of reference/nf4.py, bit for bit the same.

Quantizing compares each value with the 15 thresholds. Dequantizing scales and rounds the 16 levels
once per block and then looks them up, with AVX-512 (`avx512.py`) or in a plain loop. The loops see
bit patterns: a bfloat16 number is the upper half of a float32 number, so one loop serves both.
"""

import ctypes
import functools
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ..reference import codebooks
from ..reference.nf4 import GROUP, PackedWeight
from ..reference.nf4 import TINY as _TINY
from . import team
from .avx512 import AVX512, look_up_64
from .runtime import array, bits, empty, jit, run
from .team import pointer

MAP8 = array(codebooks.MAP8).copy()
_THRESHOLDS8 = array(codebooks.midpoints(codebooks.MAP8)).copy()
_SMALLEST = np.float32(_TINY)

# Weights that are worth waking a thread for: about 0.1 ms of work. A thread of PyTorch's is awake.
_GRAIN = 8192 * 64
_TEAM_GRAIN = 1 << 15


@functools.cache
def levels_of(quant_type: str) -> Any:
    return array(codebooks.levels(quant_type)).copy()


@functools.cache
def _thresholds(quant_type: str) -> Any:
    return array(codebooks.thresholds(quant_type)).copy()


@functools.cache
def _steps(quant_type: str) -> Any:
    """The code of the lowest level, and what each threshold adds to it, modulo 256; uint8 [16]."""
    codes = array(codebooks.ascending_codes(quant_type))
    return np.diff(codes, prepend=np.uint8(0))


@functools.cache
def _address_of_levels(quant_type: str) -> int:
    return int(levels_of(quant_type).ctypes.data)


def addresses(w: PackedWeight) -> tuple[int, ...]:
    """Returns where packed, absmax, absmax2, offset and levels are; 0: there is no such tensor.

    Raises ValueError for parts on another device, which would crash the process, or with gaps.
    """
    found = []
    for part in (w.packed, w.absmax, w.absmax2, w.offset):
        if part is not None and not (part.is_cpu and part.is_contiguous()):
            where = "strided" if part.is_cpu else f"on {part.device}"
            raise ValueError(f"a part of the weight is {where}: it must be contiguous, on the CPU")
        found.append(0 if part is None else part.data_ptr())
    return *found, _address_of_levels(w.quant_type)


@jit
def _quantize(
    x: Any,
    thresholds: Any,
    steps: Any,
    packed: Any,
    absmax: Any,
    block_size: int,
    start: int,
    stop: int,
) -> None:
    """Quantizes blocks [start, stop) of x, bit patterns of float32 or bfloat16."""
    row = np.empty(block_size, np.float32)
    row_bits = row.view(np.uint32)
    codes = np.empty(block_size, np.uint8)
    shift = np.uint32(32 - 8 * x.itemsize)

    for b in range(start, stop):
        first = b * block_size
        size = min(block_size, x.size - first)
        for i in range(size):
            row_bits[i] = np.uint32(x[first + i]) << shift

        largest = np.float32(0)
        for i in range(size):
            largest = max(largest, abs(row[i]))
        absmax[b] = largest
        reciprocal = np.float32(1) / max(largest, _SMALLEST)

        # Two codes per byte: a zero completes the last one.
        if size % 2:
            row[size] = 0
            size += 1

        for i in range(size):
            y = row[i] * reciprocal
            code = steps[0]
            for j in range(15):
                code += np.uint8(y > thresholds[j]) * steps[j + 1]
            codes[i] = code

        for i in range(size // 2):
            high, low = codes[2 * i], codes[2 * i + 1]
            packed[first // 2 + i] = high << 4 | low


def quantize(x: Tensor, block_size: int, quant_type: str = "nf4") -> tuple[Tensor, Tensor]:
    """Returns (packed uint8 [ceil(n/2)], absmax float32 [b])."""
    x = x.detach().contiguous().view(-1)
    if x.dtype not in (torch.float32, torch.bfloat16):
        x = x.float()

    blocks = -(-x.numel() // block_size)
    nbytes = (x.numel() + 1) // 2
    packed = torch.empty(nbytes, dtype=torch.uint8)
    absmax = torch.empty(blocks, dtype=torch.float32)

    run(
        _quantize,
        bits(x),
        _thresholds(quant_type),
        _steps(quant_type),
        array(packed),
        array(absmax),
        block_size,
        rows=(0, blocks),
        grain=-(-_GRAIN // block_size),
    )
    return packed, absmax


@jit
def _double_quantize(
    absmax: Any,
    offset: np.float32,
    codes: Any,
    absmax2: Any,
    start: int,
    stop: int,
) -> None:
    """Quantizes groups [start, stop) of absmax."""
    for g in range(start, stop):
        first = g * GROUP
        last = min(absmax.size, first + GROUP)

        largest = np.float32(0)
        for b in range(first, last):
            largest = max(largest, abs(absmax[b] - offset))
        absmax2[g] = largest
        reciprocal = np.float32(1) / max(largest, _SMALLEST)

        for b in range(first, last):
            y = (absmax[b] - offset) * reciprocal

            # The number of thresholds below y, by bisection.
            code = 0
            for step in (128, 64, 32, 16, 8, 4, 2, 1):
                if y > _THRESHOLDS8[code + step - 1]:
                    code += step
            codes[b] = code if largest > 0 else 0


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (codes uint8 [b], absmax2 float32 [g], offset float32 scalar)."""
    offset = absmax.double().mean().float()
    groups = -(-absmax.numel() // GROUP)
    codes = torch.empty(absmax.numel(), dtype=torch.uint8)
    absmax2 = torch.empty(groups, dtype=torch.float32)

    run(
        _double_quantize,
        array(absmax),
        np.float32(offset.item()),
        array(codes),
        array(absmax2),
        rows=(0, groups),
        grain=16,
    )
    return codes, absmax2, offset


@jit
def absmax_of_block(
    b: int,
    absmax: Any,
    absmax2: Any,
    offset: np.float32,
) -> Any:
    """Returns the absmax of block b, as stored or from its double quantization."""
    if absmax2.size:
        level = MAP8[int(absmax[b])]
        return level * absmax2[b // GROUP] + offset
    return np.float32(absmax[b])


@jit
def _double_dequantize(
    codes: Any,
    absmax2: Any,
    offset: np.float32,
    out: Any,
    start: int,
    stop: int,
) -> None:
    """Writes the absmax of blocks [start, stop) to out."""
    for b in range(start, stop):
        out[b] = absmax_of_block(b, codes, absmax2, offset)


def double_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """Returns absmax, float32 [b]."""
    absmax = torch.empty(codes.numel(), dtype=torch.float32)

    run(
        _double_dequantize,
        array(codes),
        array(absmax2),
        np.float32(offset.item()),
        array(absmax),
        rows=(0, codes.numel()),
        grain=1 << 16,
    )
    return absmax


@jit
def rounded_to_bfloat16(level: np.uint32) -> Any:
    """Returns the bits of a float32 number in bfloat16: to nearest, ties to even."""
    odd = level >> np.uint32(16) & np.uint32(1)
    rounded = level + np.uint32(0x7FFF) + odd
    return rounded >> np.uint32(16)


@jit
def look_up(
    packed: Any,
    source: int,
    levels: Any,
    scale: Any,
    out: Any,
    target: int,
    size: int,
) -> None:
    """out[target : target + size] = bits of level[code] * scale, codes from weight `source` on."""
    scaled = np.empty(1, np.float32)
    scaled_bits = scaled.view(np.uint32)
    table = np.empty(16, np.uint32)

    for j in range(16):
        scaled[0] = levels[j] * scale
        level = scaled_bits[0]
        if out.itemsize == 2:
            level = rounded_to_bfloat16(level)
        table[j] = level

    for i in range(0, size - 1, 2):
        pair = packed[(source + i) // 2]
        out[target + i] = table[pair >> 4]
        out[target + i + 1] = table[pair & 15]

    if size % 2:
        pair = packed[(source + size) // 2]
        out[target + size - 1] = table[pair >> 4]


@jit
def decode(
    packed: Any,
    absmax: Any,
    absmax2: Any,
    offset: np.float32,
    levels: Any,
    out: Any,
    weight: tuple[int, int, int],
    tile: tuple[int, int, int],
    start: int,
    stop: int,
) -> None:
    """Dequantizes blocks [first, last) of every row in [start, stop) to out, bit patterns.

    weight: (number of weights, block size, blocks per row)
    tile: (first, last, the row that out starts with); out has no gaps
    """
    n, block_size, blocks_per_row = weight
    first, last, top = tile

    for row in range(start, stop):
        for column in range(first, last):
            b = row * blocks_per_row + column
            scale = absmax_of_block(b, absmax, absmax2, offset)
            source = b * block_size
            end = min(source + block_size, n)

            block_of_tile = (row - top) * (last - first) + column - first
            target = block_of_tile * block_size

            if AVX512:
                while source + 64 <= end:
                    look_up_64(packed, source // 2, levels, scale, out, target)
                    source += 64
                    target += 64

            if source < end:
                rest = end - source
                look_up(packed, source, levels, scale, out, target, rest)


_SIZES = ("rows", "kernel", "top", "first", "last", "n", "block_size", "blocks_per_row", "itemsize")
_ADDRESSES = ("packed", "absmax", "absmax2", "offset", "levels", "out")


class _Call(ctypes.Structure):
    """A tile to dequantize, as the threads read it: sizes; addresses, 0 for no tensor."""

    _fields_ = tuple((name, ctypes.c_int64) for name in (*_SIZES, *_ADDRESSES))


_CALL = np.dtype(_Call)


def _dequantize_rows(address: int, start: int, stop: int) -> None:
    """Rows [start, stop) of a tile."""
    call = carray(pointer(address), 1, _CALL)[0]
    start += call.top
    stop += call.top
    blocks = -(-call.n // call.block_size)
    size = call.rows * (call.last - call.first) * call.block_size

    packed = carray(pointer(call.packed), (call.n + 1) // 2, np.uint8)
    levels = carray(pointer(call.levels), 16, np.float32)
    weight = (call.n, call.block_size, call.blocks_per_row)
    tile = (call.first, call.last, call.top)
    out16 = carray(pointer(call.out), size, np.uint16)
    out32 = carray(pointer(call.out), size, np.uint32)

    if call.absmax2 == 0:
        absmax = carray(pointer(call.absmax), blocks, np.float32)
        none = absmax[:0]
        zero = np.float32(0)
        if call.itemsize == 2:
            decode(packed, absmax, none, zero, levels, out16, weight, tile, start, stop)
        else:
            decode(packed, absmax, none, zero, levels, out32, weight, tile, start, stop)
    else:
        codes = carray(pointer(call.absmax), blocks, np.uint8)
        absmax2 = carray(pointer(call.absmax2), -(-blocks // GROUP), np.float32)
        offset = carray(pointer(call.offset), 1, np.float32)[0]
        if call.itemsize == 2:
            decode(packed, codes, absmax2, offset, levels, out16, weight, tile, start, stop)
        else:
            decode(packed, codes, absmax2, offset, levels, out32, weight, tile, start, stop)


def dequantize_tile(
    w: PackedWeight,
    out: Tensor,
    rows: tuple[int, int],
    columns: tuple[int, int],
    blocks_per_row: int,
) -> None:
    """Writes a tile of the weight to `out`, contiguous, float32 or bfloat16.

    The blocks of the weight form a matrix of `blocks_per_row` columns; the tile is rows x columns
    of that matrix, [first, last) each.
    """
    assert out.is_contiguous() and out.is_cpu
    count = rows[1] - rows[0]
    call = _Call(
        count,
        0,
        rows[0],
        *columns,
        w.numel(),
        w.block_size,
        blocks_per_row,
        out.itemsize,
        *addresses(w),
        out.data_ptr(),
    )
    team.run(_dequantize_rows, call, count, out.numel() // _TEAM_GRAIN)


def dequantize(w: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Returns level[q] * absmax in `w.shape`, computed in float32 and rounded once to `dtype`."""
    is_written = dtype in (torch.float32, torch.bfloat16)
    out = empty(tuple(w.shape), dtype if is_written else torch.float32)

    # In the flat order the matrix of blocks has one column.
    blocks = w.absmax.numel()
    dequantize_tile(w, out, (0, blocks), (0, 1), blocks_per_row=1)
    return out.to(dtype)
