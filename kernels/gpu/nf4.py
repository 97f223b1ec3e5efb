"""4-bit weights on a GPU, with Triton: the functions of reference/nf4.py, bit for bit the same.

Dequantizing is the hot one: a training step dequantizes every weight three times. Its unit is a
32-bit word, eight codes: one load of the word, eight loads from a table of 64 bytes in global
memory (two sectors, so the L1 cache answers them), eight products, and in bfloat16 one store of 128
bits. The absmax is computed from its double quantization in the same launch.
"""

import functools
import itertools

import numpy as np
import torch
from torch import Tensor

from ..reference import codebooks
from ..reference import nf4 as reference
from ..reference.nf4 import PackedWeight, Parts
from .runtime import (
    FLOATS,
    PORTABLE,
    check,
    check_block_size,
    check_weight,
    launch,
    map8,
    tables,
    tl,
    triton,
)

GROUP = tl.constexpr(reference.GROUP)

# As an integer, because triton 3.6 makes a literal as small as this a float64.
_TINY_BITS = tl.constexpr(int(np.float32(reference.TINY).view(np.int32)))

# Weights that one program quantizes.
_TILE = 4096

# A program dequantizes _TIMES * _WORDS words: one per thread (AMD's warps have 64), several times,
# with all loads under way at once.
_WARPS = 4
_WORDS = _WARPS * (64 if PORTABLE else 32)
_TIMES = 8


@functools.cache
def _thresholds(quant_type: str) -> tuple[float, ...]:
    """The 15 thresholds as constants that are compiled into the kernel."""
    return tuple(codebooks.thresholds(quant_type).tolist())


@functools.cache
def _steps(quant_type: str) -> tuple[int, ...]:
    """The code of the lowest level, and what each threshold adds to it: 16 constants."""
    codes = codebooks.ascending_codes(quant_type).tolist()
    return codes[0], *(b - a for a, b in itertools.pairwise(codes))


@triton.jit
def _reciprocal(absmax):
    """1 / max(absmax, 1e-38), rounded to nearest: `/` alone is off by 2 ulp on a GPU."""
    tiny = tl.full(absmax.shape, _TINY_BITS, tl.int32).to(tl.float32, bitcast=True)
    return tl.div_rn(1.0, tl.maximum(absmax, tiny))


@triton.jit
def _quantize(
    x_ptr, packed_ptr, absmax_ptr, n,
    THRESHOLDS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A program quantizes BLOCKS blocks. Each threshold below y adds its step to the code."""
    b = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [BLOCKS, BLOCK]
    w = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)

    largest = tl.max(tl.abs(w), axis=1)
    tl.store(absmax_ptr + b, largest, mask=b * BLOCK < n)
    y = w * _reciprocal(largest)[:, None]

    q = tl.full((BLOCKS, BLOCK), STEPS[0], tl.int32)
    for j in tl.static_range(15):
        q += (y > THRESHOLDS[j]).to(tl.int32) * STEPS[j + 1]

    first, second = tl.split(tl.reshape(q, (BLOCKS, BLOCK // 2, 2)))
    byte = b[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(packed_ptr + byte, (first << 4 | second).to(tl.uint8), mask=2 * byte < n)


def quantize(x: Tensor, block_size: int, quant_type: str = "nf4") -> tuple[Tensor, Tensor]:
    """Returns (packed uint8 [ceil(n/2)], absmax float32 [b])."""
    check("x", x, FLOATS, x.device)
    check_block_size(block_size)
    x = x.detach().contiguous().view(-1)
    x = x.float() if x.dtype == torch.float64 else x

    n = x.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=x.device)

    blocks = max(1, _TILE // block_size)
    grid = (-(-absmax.numel() // blocks),)
    launch(
        _quantize, grid, x, packed, absmax, n,
        THRESHOLDS=_thresholds(quant_type), STEPS=_steps(quant_type),
        BLOCK=block_size, BLOCKS=blocks, num_warps=8,
    )  # fmt: skip
    return packed, absmax


@triton.jit
def _double_quantize(
    absmax_ptr, offset_ptr, map8_ptr, codes_ptr, absmax2_ptr, n, GROUP: tl.constexpr
):
    """A program quantizes one group. The code is the number of thresholds below y, by bisection."""
    g = tl.program_id(0)
    b = g * GROUP + tl.arange(0, GROUP)
    a = tl.load(absmax_ptr + b, mask=b < n, other=0.0) - tl.load(offset_ptr)
    a = tl.where(b < n, a, 0.0)

    largest = tl.max(tl.abs(a), axis=0)
    tl.store(absmax2_ptr + g, largest)
    y = a * _reciprocal(largest)

    code = tl.zeros((GROUP,), tl.int32)
    for k in tl.static_range(8):
        below = map8_ptr + code + ((128 >> k) - 1)
        code += tl.where(y > (tl.load(below) + tl.load(below + 1)) * 0.5, 128 >> k, 0)
    code = tl.where(largest == 0, 0, code)
    tl.store(codes_ptr + b, code.to(tl.uint8), mask=b < n)


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (codes uint8 [b], absmax2 float32 [g], offset float32 scalar)."""
    check("absmax", absmax, (torch.float32,), absmax.device)
    absmax = absmax.contiguous()
    offset = absmax.double().mean().float()

    groups = -(-absmax.numel() // reference.GROUP)
    codes = torch.empty(absmax.shape, dtype=torch.uint8, device=absmax.device)
    absmax2 = torch.empty(groups, dtype=torch.float32, device=absmax.device)

    arguments = absmax, offset, map8(absmax.device), codes, absmax2, absmax.numel()
    launch(_double_quantize, (groups,), *arguments, GROUP=reference.GROUP, num_warps=4)
    return codes, absmax2, offset


@triton.jit
def load_scale(b, mask, weight, map8_ptr):
    """The absmax of blocks b, float32: stored, or map8[code] * absmax2 + offset, two roundings."""
    stored, scale = load_stored(b, mask, weight)
    return scale_of(stored, scale, weight, map8_ptr)


@triton.jit
def load_stored(b, mask, weight):
    """What is stored of the absmax of blocks b: codes and scales, or the absmax twice."""
    stored = tl.load(weight.absmax + b, mask=mask, other=0)
    if weight.absmax2 is not None:
        scale = tl.load(weight.absmax2 + b // GROUP, mask=mask, other=0.0)
    else:
        scale = stored
    return stored, scale


@triton.jit
def scale_of(stored, scale, weight, map8_ptr):
    """The absmax of what `load_stored` returned."""
    if weight.absmax2 is not None:
        value = tl.load(map8_ptr + stored.to(tl.int32))
        return value * scale + tl.load(weight.offset)
    else:  # noqa: RET505 - Triton drops the branch that is not taken, but not what follows a return
        return stored


@triton.jit
def decode(word, scale, levels_ptr):
    """The eight weights of each word, float32: word [.., C], scale broadcast to it -> [.., C, 8].

    Little endian: byte k of a word holds weights 2k, in its high nibble, and 2k + 1.
    """
    w0 = tl.load(levels_ptr + (word >> 4 & 15)) * scale
    w1 = tl.load(levels_ptr + (word & 15)) * scale
    w2 = tl.load(levels_ptr + (word >> 12 & 15)) * scale
    w3 = tl.load(levels_ptr + (word >> 8 & 15)) * scale
    w4 = tl.load(levels_ptr + (word >> 20 & 15)) * scale
    w5 = tl.load(levels_ptr + (word >> 16 & 15)) * scale
    w6 = tl.load(levels_ptr + (word >> 28 & 15)) * scale
    w7 = tl.load(levels_ptr + (word >> 24 & 15)) * scale

    # Joining appends an index: the last is the lowest bit of the weight's number.
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.join(even, odd)


@triton.jit
def _dequantize(
    out_ptr, weight, tables, n, row, gap,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, GAP: tl.constexpr,
    WORDS: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    """A program dequantizes WORDS * TIMES words.

    WHOLE: n is a multiple of 8 and `packed` aligned, so words are loaded as such.
    GAP: after every `row` words, `gap` words of the output are left out.
    """
    first = tl.program_id(0).to(tl.int64) * (WORDS * TIMES)
    for t in tl.static_range(TIMES):
        o = first + t * WORDS + tl.arange(0, WORDS)
        inside = 8 * o < n
        if WHOLE:
            word = tl.load(weight.packed.to(tl.pointer_type(tl.int32)) + o, mask=inside, other=0)
        else:
            word = tl.zeros((WORDS,), tl.int32)
            for k in tl.static_range(4):
                byte = 4 * o + k
                code = tl.load(weight.packed + byte, mask=2 * byte < n, other=0)
                word |= code.to(tl.int32) << 8 * k

        scale = load_scale(o // (BLOCK // 8), inside, weight, tables.map8)
        w = decode(word, scale, tables.levels).to(out_ptr.dtype.element_ty)

        i = 8 * o[:, None] + tl.arange(0, 8)[None, :]
        mask = inside[:, None] if WHOLE else i < n
        if GAP:
            i += 8 * gap * (o.to(tl.int32) // row).to(tl.int64)[:, None]
        tl.store(out_ptr + i, tl.reshape(w, (WORDS, 8)), mask=mask)


def dequantize_into(out: Tensor, w: PackedWeight) -> None:
    """Writes the weight to `out`, float32, float16 or bfloat16.

    `out` is contiguous and of any shape, or a matrix with gaps between its rows.
    """
    n = out.numel()
    if n == 0:
        return

    gaps = not out.is_contiguous()
    row = gap = 0
    if gaps:
        width, stride = out.shape[1], out.stride(0)
        if width % 8 or stride % 8 or n > 2**34:
            raise ValueError(
                f"rows of {width}, {stride} apart: with gaps, both must be multiples of 8 "
                "and the weight at most 2^34 elements"
            )
        row, gap = width // 8, (stride - width) // 8

    whole = n % 8 == 0 and w.packed.data_ptr() % 4 == 0
    grid = (-(-n // (8 * _WORDS * _TIMES)),)
    launch(
        _dequantize, grid, out, w.tensors, tables(w.device, w.quant_type), n, row, gap,
        BLOCK=w.block_size, WHOLE=whole, GAP=gaps,
        WORDS=_WORDS, TIMES=_TIMES, num_warps=_WARPS,
    )  # fmt: skip


def dequantize(w: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Returns level[q] * absmax in `w.shape`, computed in float32 and rounded once to `dtype`."""
    if dtype not in FLOATS:
        raise TypeError(f"dtype={dtype}: the kernel writes float32, float16, bfloat16 or float64")
    check_weight(w)

    written = torch.float32 if dtype == torch.float64 else dtype
    out = torch.empty(tuple(w.shape), dtype=written, device=w.device)
    dequantize_into(out, w)
    return out.to(dtype)


@triton.jit
def _double_dequantize(out_ptr, weight, map8_ptr, n, BLOCKS: tl.constexpr):
    """A program computes BLOCKS absmax of a weight, of which it needs no codes."""
    b = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    tl.store(out_ptr + b, load_scale(b, b < n, weight, map8_ptr), mask=b < n)


def double_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """Returns absmax, float32 [b]."""
    check("codes", codes, (torch.uint8,), codes.device)
    check("absmax2", absmax2, (torch.float32,), codes.device)
    check("offset", offset, (torch.float32,), codes.device)

    out = torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
    weight = Parts(None, codes.contiguous(), absmax2.contiguous(), offset)
    arguments = out, weight, map8(codes.device), out.numel()
    grid = (-(-out.numel() // 1024),)
    launch(_double_dequantize, grid, *arguments, BLOCKS=1024, num_warps=4)
    return out
