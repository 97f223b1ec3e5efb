"""NF4 on a GPU, with Triton: the functions of reference/nf4.py, bit for bit the same.

Decoding is the hot one: a training step decodes every weight three times. Its unit is a 32-bit word, eight codes: one load, eight
look-ups in a table of 64 bytes that stays in the L1 cache, eight products, and in bfloat16 one store of 128 bits. The absmax is
decoded from its double quantization in the same launch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..reference import nf4 as reference
from .runtime import (
    FLOATS,
    PORTABLE,
    check,
    check_block_size,
    check_weight,
    launch,
    tables_on,
    tl,
    triton,
)

GROUP = tl.constexpr(reference.GROUP)
_THRESHOLDS = tl.constexpr(tuple(reference.midpoints(reference.CODE).tolist()))
_TINY_BITS = tl.constexpr(
    int(np.float32(reference.TINY).view(np.int32))
)  # a literal so small would become float64
_TILE = 4096  # weights that one program quantizes
_WARPS = 4
_WORDS = _WARPS * (
    64 if PORTABLE else 32
)  # words that one program decodes at a time, one a thread (AMD's warps are 64 wide) ...
_TIMES = 8  # ... so many times, with all loads under way at once


@triton.jit
def _reciprocal(absmax):
    """1 / max(absmax, 1e-38), rounded to nearest: `/` alone is off by 2 ulp on a GPU."""
    tiny = tl.full(absmax.shape, _TINY_BITS, tl.int32).to(tl.float32, bitcast=True)
    return tl.div_rn(1.0, tl.maximum(absmax, tiny))


@triton.jit
def _quantize(x, packed, absmax, n, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """A program quantizes BLOCKS blocks. The code of y is the number of thresholds below it."""
    b = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [BLOCKS, BLOCK]
    w = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(w), axis=1)
    tl.store(absmax + b, largest, mask=b * BLOCK < n)
    y = w * _reciprocal(largest)[:, None]
    q = tl.zeros((BLOCKS, BLOCK), tl.int32)
    for j in tl.static_range(15):
        q += (y > _THRESHOLDS[j]).to(tl.int32)
    first, second = tl.split(tl.reshape(q, (BLOCKS, BLOCK // 2, 2)))
    byte = b[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(packed + byte, (first << 4 | second).to(tl.uint8), mask=2 * byte < n)


def quantize(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Returns (packed uint8 [ceil(n/2)], absmax float32 [b])."""
    check("x", x, FLOATS, x.device)
    check_block_size(block_size)
    x = x.detach().contiguous().view(-1)
    x = x.float() if x.dtype == torch.float64 else x
    n, blocks = x.numel(), max(1, _TILE // block_size)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(absmax.numel(), blocks),)
    launch(_quantize, grid, x, packed, absmax, n, BLOCK=block_size, BLOCKS=blocks, num_warps=8)
    return packed, absmax


@triton.jit
def _double_quantize(absmax, offset, map8, codes, absmax2, n, GROUP: tl.constexpr):
    """A program quantizes one group. The code is the number of thresholds below y, found by bisection of the 255."""
    g = tl.program_id(0)
    b = g * GROUP + tl.arange(0, GROUP)
    a = tl.load(absmax + b, mask=b < n, other=0.0) - tl.load(offset)
    a = tl.where(b < n, a, 0.0)
    largest = tl.max(tl.abs(a), axis=0)
    tl.store(absmax2 + g, largest)
    y = a * _reciprocal(largest)
    code = tl.zeros((GROUP,), tl.int32)
    for k in tl.static_range(8):
        below = map8 + code + ((128 >> k) - 1)
        code += tl.where(y > (tl.load(below) + tl.load(below + 1)) * 0.5, 128 >> k, 0)
    code = tl.where(largest == 0, 0, code)
    tl.store(codes + b, code.to(tl.uint8), mask=b < n)


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (codes uint8 [b], absmax2 float32 [g], offset float32 scalar)."""
    check("absmax", absmax, (torch.float32,), absmax.device)
    absmax = absmax.contiguous()
    offset = absmax.double().mean().float()
    codes = torch.empty(absmax.shape, dtype=torch.uint8, device=absmax.device)
    groups = -(-absmax.numel() // reference.GROUP)
    absmax2 = torch.empty(groups, dtype=torch.float32, device=absmax.device)
    arguments = absmax, offset, tables_on(absmax.device).map8, codes, absmax2, absmax.numel()
    launch(_double_quantize, (groups,), *arguments, GROUP=reference.GROUP, num_warps=4)
    return codes, absmax2, offset


@triton.jit
def load_scale(b, mask, absmax, absmax2, offset, map8, DOUBLE: tl.constexpr):
    """The absmax of blocks b, float32: as it is stored, or map8[code] * absmax2 + offset with two roundings."""
    if DOUBLE:
        code = tl.load(absmax + b, mask=mask, other=0).to(tl.int32)
        return tl.load(map8 + code) * tl.load(absmax2 + b // GROUP, mask=mask, other=0.0) + tl.load(
            offset
        )
    else:  # noqa: RET505 - Triton drops the branch that is not taken, and what follows a return it does not
        return tl.load(absmax + b, mask=mask, other=0.0)


@triton.jit
def decode(word, scale, code):
    """The eight weights of each word in the order of memory, float32: word [.., C], scale broadcast to it -> [.., C, 8].

    Little endian: byte k of a word holds weights 2k, in its high nibble, and 2k + 1.
    """
    w0, w1 = tl.load(code + (word >> 4 & 15)) * scale, tl.load(code + (word & 15)) * scale
    w2, w3 = tl.load(code + (word >> 12 & 15)) * scale, tl.load(code + (word >> 8 & 15)) * scale
    w4, w5 = tl.load(code + (word >> 20 & 15)) * scale, tl.load(code + (word >> 16 & 15)) * scale
    w6, w7 = tl.load(code + (word >> 28 & 15)) * scale, tl.load(code + (word >> 24 & 15)) * scale
    even = tl.join(
        tl.join(w0, w4), tl.join(w2, w6)
    )  # joining appends an index: the last is the lowest bit of the weight's number
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.join(even, odd)


@triton.jit
def _dequantize(
    packed, absmax, absmax2, offset, code, map8, out, n, row, gap,
    BLOCK: tl.constexpr, DOUBLE: tl.constexpr, WHOLE: tl.constexpr, GAP: tl.constexpr, WORDS: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    """A program decodes WORDS * TIMES words. WHOLE: n is a multiple of 8 and `packed` aligned, so words are loaded as such.
    GAP: room for `gap` words is left in `out` after every `row` words."""
    first = tl.program_id(0).to(tl.int64) * (WORDS * TIMES)
    for t in tl.static_range(TIMES):
        o = first + t * WORDS + tl.arange(0, WORDS)
        inside = 8 * o < n
        if WHOLE:
            word = tl.load(packed.to(tl.pointer_type(tl.int32)) + o, mask=inside, other=0)
        else:
            word = tl.zeros((WORDS,), tl.int32)
            for k in tl.static_range(4):
                byte = 4 * o + k
                word |= tl.load(packed + byte, mask=2 * byte < n, other=0).to(tl.int32) << 8 * k
        scale = load_scale(o // (BLOCK // 8), inside, absmax, absmax2, offset, map8, DOUBLE)
        w = tl.reshape(decode(word, scale, code).to(out.dtype.element_ty), (WORDS, 8))
        i = 8 * o[:, None] + tl.arange(0, 8)[None, :]
        mask = inside[:, None] if WHOLE else i < n
        if GAP:
            i += 8 * gap * (o.to(tl.int32) // row).to(tl.int64)[:, None]
        tl.store(out + i, w, mask=mask)


def dequantize_into(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    block_size: int,
) -> None:
    """Writes the weight to `out`, float32, float16 or bfloat16: contiguous of any shape, or a matrix with gaps between its rows."""
    if n := out.numel():
        gaps = not out.is_contiguous()
        row, gap = (out.shape[1] // 8, (out.stride(0) - out.shape[1]) // 8) if gaps else (0, 0)
        if gaps and (out.shape[1] % 8 or out.stride(0) % 8 or n > 2**34):
            raise ValueError(
                f"rows of {out.shape[1]} and {out.stride(0)} apart: with gaps, whole words of 8, at most 2^31 of them"
            )
        tables = tables_on(packed.device)
        arguments = packed, absmax, absmax2, offset, tables.code, tables.map8, out, n, row, gap
        meta = {
            "BLOCK": block_size,
            "DOUBLE": absmax2 is not None,
            "WHOLE": n % 8 == 0 and packed.data_ptr() % 4 == 0,
        }
        grid = (triton.cdiv(n, 8 * _WORDS * _TIMES),)
        launch(
            _dequantize,
            grid,
            *arguments,
            **meta,
            GAP=gaps,
            WORDS=_WORDS,
            TIMES=_TIMES,
            num_warps=_WARPS,
        )


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int,
) -> Tensor:
    """Returns code[q] * absmax, computed in float32 and rounded once to `dtype`, in `shape`."""
    if dtype not in FLOATS:
        raise TypeError(f"dtype={dtype}: the kernel writes float32, float16, bfloat16 or float64")
    check_weight(packed, absmax, absmax2, offset, shape, block_size)
    out = torch.empty(
        tuple(shape), dtype=torch.float32 if dtype == torch.float64 else dtype, device=packed.device
    )
    dequantize_into(out, packed, absmax, absmax2, offset, block_size)
    return out.to(dtype)


@triton.jit
def _double_dequantize(codes, absmax2, offset, map8, out, n, BLOCKS: tl.constexpr):
    b = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    tl.store(out + b, load_scale(b, b < n, codes, absmax2, offset, map8, DOUBLE=True), mask=b < n)


def double_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """Returns absmax, float32 [b]."""
    check("codes", codes, (torch.uint8,), codes.device)
    check("absmax2", absmax2, (torch.float32,), codes.device)
    check("offset", offset, (torch.float32,), codes.device)
    out = torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
    arguments = (
        codes.contiguous(),
        absmax2.contiguous(),
        offset,
        tables_on(codes.device).map8,
        out,
        out.numel(),
    )
    launch(
        _double_dequantize, (triton.cdiv(out.numel(), 1024),), *arguments, BLOCKS=1024, num_warps=4
    )
    return out
