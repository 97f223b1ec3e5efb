r"""The skinny product on a GPU: y = x W^T for at most 16 rows of x, where reading W is the work.

The 64 rows of W that a program has are the tall side of a tensor-core product, y^T = W x^T, so that
the decoded weights go from `permute.py` straight into the operand's registers. (The packed words
come through shared memory: their loads are pipelined.) That takes two re-orderings:

* Columns. In every 16 columns a tensor core wants from lane 4g + t the columns 2t, 2t+1, 2t+8, 2t+9
  of its row. A lane has loaded two neighbouring words, 16 columns in a row. But a sum has no order,
  so column k' of the product may stand for any column k of W, if x is loaded in the same order.
  With bits b, p, q, v and t = 0 ... 3, in a block of 64:

      k  = b + 2p + 4q + 8v + 16t    (as it lies in memory)
      k' = b + 2t + 8p + 16q + 32v   (as the product reads it)

* Rows. Lane l of warp w has loaded from rows 8w + l and 32 + 8w + l of W, and the warp owns 16
  neighbouring rows of the product: row 32h + 8w + l of W (`loaded`) is row 16w + 8h + l of the
  product (`rows`), l = 0 ... 7, h = 0, 1.

Numerics: a level is rounded to x's dtype and a block's absmax multiplies the block's sum in
float32,

    y[o] = sum over blocks  absmax * sum over k  level16[code[o, k]] * x[k]

where `dequantize` rounds level * absmax. Both round a weight once, so their errors are alike, but
they are not bit-identical.
"""

import math

import torch
from torch import Tensor

from ..reference.nf4 import PackedWeight
from .nf4 import load_scale
from .permute import level_pairs, ptx
from .runtime import PORTABLE, LowRank, launch, tables, term_of, tl, triton

# Rows of W in a program: four warps of 16.
ROWS = tl.constexpr(64)

# About four for each processor of a large GPU.
PROGRAMS = 512


@triton.jit
def _block(word, x, levels, PTX: tl.constexpr):
    """levels[codes] x^T for one block of 64 columns, in the product's order.

    word [64, 8], x [64, MB] -> [64, MB] float32.
    """
    # Pair 2q + p of a word.
    p0, p1, p2, p3 = level_pairs(word, levels, PTX)

    # h w l, t v, q p
    pairs = tl.reshape(tl.join(tl.join(p0, p2), tl.join(p1, p3)), (2, 4, 8, 4, 2, 2, 2))
    # w h l, v q p t
    pairs = tl.reshape(tl.permute(pairs, (1, 0, 2, 4, 5, 6, 3)), (64, 32))

    low = (pairs & 0xFFFF).to(tl.int16)
    high = (pairs >> 16).to(tl.int16)
    W = tl.reshape(tl.join(low, high), (64, 64)).to(x.dtype, bitcast=True)
    return tl.dot(W, x)


@triton.jit
def _partial(
    x_ptr, weight, tables, partial_ptr, M, O, row_words, row_blocks, span, stride,
    BLOCK: tl.constexpr, MB: tl.constexpr, BLOCKS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """partial[s, m, o]: the sum over the s-th span of columns.

    The sizes of a row are arguments, so that Triton sees what divides them.
    """
    tile, s = tl.program_id(0), tl.program_id(1)
    loaded = tile * ROWS + tl.arange(0, ROWS)

    # Rows and columns of W in the product's order.
    n = tl.arange(0, ROWS)
    rows = tile * ROWS + (n >> 3 & 1) * 32 + (n >> 4) * 8 + (n & 7)
    k = tl.arange(0, 64)
    columns = (k & 1) + (k >> 3 & 1) * 2 + (k >> 4 & 1) * 4 + (k >> 5) * 8 + (k >> 1 & 3) * 16
    m = tl.arange(0, MB)

    # Below the last row of W: that row again, and the result is not stored.
    first_word = tl.minimum(loaded, O - 1).to(tl.int64) * row_words
    words = weight.packed.to(tl.pointer_type(tl.int32))
    words += first_word[:, None] + tl.arange(0, 8)[None, :]
    xs = x_ptr + m.to(tl.int64)[None, :] * stride + columns[:, None]
    first_block = tl.minimum(rows, O - 1).to(tl.int64) * row_blocks

    acc = tl.zeros((ROWS, MB), tl.float32)
    for start in range(s * span, tl.minimum((s + 1) * span, row_words * 8), 64 * BLOCKS):
        for j in tl.static_range(BLOCKS):
            at = tl.multiple_of(start, 64) + 64 * j
            word = tl.load(words + at // 8, eviction_policy="evict_first")
            b = first_block + at // BLOCK
            scale = load_scale(b, True, weight, tables.map8)
            xt = tl.load(xs + at, mask=(m < M)[None, :], other=0.0)
            acc += _block(word, xt, tables.levels, PTX) * scale[:, None]

    where = partial_ptr + (s * M + m).to(tl.int64)[None, :] * O + rows[:, None]
    tl.store(where, acc, mask=(m < M)[None, :] & (rows < O)[:, None])


@triton.jit
def _sum(
    partial_ptr, bias_ptr, term, y_ptr, M, O, spans, BO: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y[m, o] = the partial sums in order, + bias, + scale * left right^T."""
    o, m = tl.program_id(0) * BO + tl.arange(0, BO), tl.program_id(1)

    acc = tl.zeros((BO,), tl.float32)
    for s in range(spans):
        acc += tl.load(partial_ptr + (s * M + m).to(tl.int64) * O + o, mask=o < O, other=0.0)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)

    if term is not None:
        low = tl.zeros((BO,), tl.float32)
        for j in range(0, term.r, BR):
            at = j + tl.arange(0, BR)
            right = o.to(tl.int64)[:, None] * term.right_row + at[None, :] * term.right_column
            b = tl.load(
                term.right + right, mask=(o < O)[:, None] & (at < term.r)[None, :], other=0.0
            )
            a = tl.load(term.left + m * term.r + at, mask=at < term.r, other=0.0)
            low += tl.sum(b.to(tl.float32) * a.to(tl.float32)[None, :], axis=1)
        acc += low * term.scale

    tl.store(y_ptr + m.to(tl.int64) * O + o, acc.to(y_ptr.dtype.element_ty), mask=o < O)


def skinny_forward(x: Tensor, w: PackedWeight, bias: Tensor | None, low: LowRank | None) -> Tensor:
    """Returns x W^T + bias + scale * left right^T, [M, O].

    x is [M, I] with M <= 16, float16 or bfloat16.
    """
    M, O = x.shape[0], w.shape[0]
    partial = _partial_sums(x, w)
    spans = partial.shape[0]

    y = torch.empty(M, O, dtype=x.dtype, device=x.device)
    BR = min(64, triton.next_power_of_2(low.left.shape[1])) if low else 1
    grid = (triton.cdiv(O, 128), M)
    launch(_sum, grid, partial, bias, term_of(low), y, M, O, spans, BO=128, BR=BR, num_warps=4)
    return y


def _partial_sums(x: Tensor, w: PackedWeight) -> Tensor:
    """Returns the sums over each span of columns, float32 [spans, M, O]."""
    M, I = x.shape
    O = w.shape[0]

    # Up to four blocks are loaded before the first is multiplied.
    blocks = math.gcd(I // 64, 4)
    steps = I // (64 * blocks)

    # So many spans that enough programs read at once.
    tiles = triton.cdiv(O, ROWS.value)
    span = triton.cdiv(steps, min(steps, triton.cdiv(PROGRAMS, tiles))) * 64 * blocks
    spans = triton.cdiv(I, span)

    partial = torch.empty(spans, M, O, dtype=torch.float32, device=x.device)
    looked_up = tables(x.device, w.quant_type, x.dtype)
    sizes = M, O, I // 8, I // w.block_size, span, x.stride(0)
    launch(
        _partial, (tiles, spans), x, w.tensors, looked_up, partial, *sizes,
        BLOCK=w.block_size, MB=8 if M <= 8 else 16, BLOCKS=blocks,
        PTX=None if PORTABLE else ptx(w.quant_type, x.dtype), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return partial
