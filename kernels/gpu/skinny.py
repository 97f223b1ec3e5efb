r"""The skinny product on a GPU: y = x W^T for at most 64 rows of x, where reading W is the work.

The 64 rows of W that a program has are the tall side of a tensor-core product, y^T = W x^T. Packed
words and x are copied to shared memory (`cp.async`) while those before them are multiplied; a lane
reads its words from there, and `permute.py` turns them into the registers of the operand (from
which compute capability 10 has to move it to tensor memory). No lane has to ask another for a
weight, if W is multiplied in the order in which it is loaded:

* Columns. The tensor core wants KWIDTH neighbouring columns from each of the four threads that
  share a row, then the next KWIDTH from each. A lane has two neighbouring words, 16 columns. But a
  sum has no order: a column of the product may stand for any column of W, if x is loaded in the
  same order. Let a1 to a4 be the columns of the thread that has the first two words, four at a
  time, b1 to b4 those of the next thread and so on. Then a block of 64 columns is

      in memory       a1 a2 a3 a4 | b1 b2 b3 b4 | c1 c2 c3 c4 | d1 d2 d3 d4
      in the product  a1 b1 c1 d1 | a2 b2 c2 d2 | a3 b3 c3 d3 | a4 b4 c4 d4

  `_reorder_columns` is this picture, with KWIDTH = 4; `k_width` says when it is 2.

* Rows. A warp loads 8 neighbouring rows and 8 more, 32 below, and owns 16 neighbouring rows of the
  product:

      rows of W      0 ... 7   8 ... 15  16 ... 23  24 ... 31  32 ... 39  40 ... 47 ...
      of warp           0         1          2          3          0          1     ...

  `_reorder_rows` brings those of a warp together.

Numerics: a level is rounded to x's dtype and a block's absmax multiplies the block's sum in
float32,

    y[o] = sum over blocks  absmax * sum over k  level16[code[o, k]] * x[k]

where `dequantize` rounds level * absmax. Both round a weight once, so their errors are alike, but
they are not bit-identical.

Dimension letters: M rows of x, I in_features, O out_features; MB is M rounded up to a power of two.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.nf4 import PackedWeight
from . import runtime
from .nf4 import load_scale
from .permute import byte_planes, level_pairs, load_planes
from .runtime import (
    PORTABLE,
    LowRank,
    Tables,
    power_of_two,
    tables,
    term_of,
    tl,
    triton,
)

# Rows of W in a program: four warps of 16.
ROWS = tl.constexpr(64)

# About four for each processor of a large GPU.
PROGRAMS = 512


@triton.jit
def _partial(
    x_ptr, weight, tables, partial_ptr, M, O, row_words, row_blocks, span, stride,
    BLOCK: tl.constexpr, MB: tl.constexpr, BLOCKS: tl.constexpr,
    KWIDTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """partial[s, m, o]: the sum over the s-th span of columns, `span` times 64 of them.

    The sizes of a row are arguments, so that Triton sees what divides them.
    """
    tile, s = tl.program_id(0), tl.program_id(1)
    m = tl.arange(0, MB)

    # Rows of W as they are loaded, and in the product's order. Below the last row of W: that row
    # again, and the result is not stored.
    loaded = tile * ROWS + tl.arange(0, ROWS)
    rows = tl.reshape(_reorder_rows(loaded[:, None]), (ROWS,))
    first_word = tl.minimum(loaded, O - 1).to(tl.int64) * row_words

    # An int32 counts the blocks of 2^37 weights. Unsigned, so that dividing is shifting.
    first_block = (tl.minimum(rows, O - 1) * row_blocks).to(tl.uint32)

    # Two words per lane, as the columns' order needs it. Triton would give it four if it saw that
    # the rows are aligned to 16 bytes, and one if it saw no alignment (I = 64 * odd).
    first_word = tl.multiple_of(first_word, 2)
    words = weight.packed.to(tl.pointer_type(tl.int32))
    words += first_word[:, None] + tl.arange(0, 8)[None, :]

    xs = x_ptr + m.to(tl.int64)[None, :] * stride + _columns(KWIDTH)[:, None]

    levels = load_planes(tables.levels, loaded[:, None]) if PTX else tables.levels
    acc = tl.zeros((ROWS, MB), tl.float32)
    for first in range(s * span, tl.minimum((s + 1) * span, row_words // 8), BLOCKS):
        for j in tl.static_range(BLOCKS):
            step = first + j
            word = tl.load(words + 8 * step, eviction_policy="evict_first")
            xt = tl.load(xs + 64 * step, mask=(m < M)[None, :], other=0.0)
            W = _decode(word, levels, x_ptr.dtype.element_ty, KWIDTH, PTX)
            scale = load_scale(first_block + step // (BLOCK // 64), True, weight, tables.map8)
            acc += tl.dot(W, xt) * scale[:, None]

    where = partial_ptr + (s * M + m).to(tl.int64)[None, :] * O + rows[:, None]
    tl.store(where, acc, mask=(m < M)[None, :] & (rows < O)[:, None])


@triton.jit
def _decode(word, levels, DTYPE: tl.constexpr, KWIDTH: tl.constexpr, PTX: tl.constexpr):
    """levels[codes] of a block, in the product's order: word [64, 8] -> [64, 64]."""
    # Pair 2q + p of a word.
    p0, p1, p2, p3 = level_pairs(word, levels, PTX)
    pairs = tl.join(tl.join(p0, p2), tl.join(p1, p3))
    pairs = _reorder_columns(_reorder_rows(tl.reshape(pairs, (ROWS, 32))), KWIDTH)

    low = (pairs & 0xFFFF).to(tl.int16)
    high = (pairs >> 16).to(tl.int16)
    return tl.reshape(tl.join(low, high), (ROWS, 64)).to(DTYPE, bitcast=True)


@triton.jit
def _reorder_rows(values):
    """[64, C] with the rows as loaded -> the same in the product's order.

    Row 32h + 8w + l becomes row 16w + 8h + l.
    """
    C: tl.constexpr = values.shape[1]
    return tl.reshape(tl.permute(tl.reshape(values, (2, 4, 8, C)), (1, 0, 2, 3)), (ROWS, C))


@triton.jit
def _reorder_columns(values, KWIDTH: tl.constexpr):
    """[R, C] with the columns as in memory -> the same in the product's order.

    A quarter of the C = 64 columns, or of their 32 pairs, belongs to each thread.
    """
    R: tl.constexpr = values.shape[0]
    C: tl.constexpr = values.shape[1]
    parts = tl.reshape(values, (R, 4, 16 // KWIDTH, KWIDTH * C // 64))
    return tl.reshape(tl.permute(parts, (0, 2, 1, 3)), (R, C))


@triton.jit
def _columns(KWIDTH: tl.constexpr):
    """The columns of a block in the product's order: `_reorder_columns` of 0 ... 63.

    By arithmetic, because Triton 3.6 forgets in a reshape that KWIDTH of them are neighbours, and
    x is copied in the background only if Triton knows it.
    """
    k = tl.arange(0, 64)
    columns = k // KWIDTH % 4 * 16 + k // (4 * KWIDTH) * KWIDTH + k % KWIDTH
    return tl.max_contiguous(tl.multiple_of(columns, KWIDTH), KWIDTH)


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
    """Returns x W^T + bias + scale * left right^T, [.., O].

    x is [M, I] with any stride of its rows, or contiguous [.., I]; M <= 64; float16 or bfloat16.
    """
    partial = _partial_sums(x, w)
    spans, M, O = partial.shape

    # Of two numbers, it is made half a microsecond sooner than of a slice of x's sizes.
    y = x.new_empty(M, O) if x.ndim == 2 else x.new_empty(*x.shape[:-1], O)
    BR = min(64, power_of_two(low.left.shape[-1])) if low else 1
    # Without `launch`, which takes its settings apart and puts them together again.
    arguments = partial, bias, term_of(low), y, M, O, spans
    settings = {"BO": 128, "BR": BR, "num_warps": 4, "enable_fp_fusion": False}
    runtime.start(_sum, (-(-O // 128), M), arguments, settings)
    return y


def _partial_sums(x: Tensor, w: PackedWeight) -> Tensor:
    """Returns the sums over each span of columns, float32 [spans, M, O]."""
    (O, I), device = w.shape, x.device
    M, stride = (x.shape[0], x.stride(0)) if x.ndim == 2 else (x.numel() // I, I)
    capability = runtime.capability_of(device)
    plan = _plan(M, O, I, w.block_size, w.quant_type, x.dtype, device, capability)
    partial = x.new_empty(plan.programs[1], M, O, dtype=torch.float32)
    arguments = x, w.tensors, plan.tables, partial, *plan.sizes, stride
    runtime.start(_partial, plan.programs, arguments, plan.settings)
    return partial


class Plan(NamedTuple):
    """How the columns of a product are divided, and what its first kernel is launched with."""

    programs: tuple[int, int]
    tables: Tables
    sizes: tuple[int, ...]
    settings: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def _plan(
    M: int,
    O: int,
    I: int,
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
    device: torch.device,
    capability: tuple[int, int] | None,
) -> Plan:
    """Returns the plan of all products of these sizes, made once: it takes as long as one."""
    MB = height(M, capability)

    # Blocks multiplied in an iteration, while those of the next are under way. With 64 rows
    # of x, four would fill the shared memory of an H100's processor with one program.
    steps = I // 64
    blocks = next(n for n in ((2, 3, 1) if MB == 64 else (4, 3, 2, 1)) if steps % n == 0)

    # So many spans that enough programs read at once.
    tiles = -(-O // ROWS.value)
    iterations = steps // blocks
    spans = min(iterations, -(-PROGRAMS // tiles))
    span = -(-iterations // spans) * blocks
    spans = -(-steps // span)

    looked_up = tables(device, quant_type, dtype)
    if not PORTABLE:
        looked_up = looked_up._replace(levels=byte_planes(device, quant_type, dtype))
    settings = {
        "BLOCK": block_size,
        "MB": MB,
        "BLOCKS": blocks,
        "KWIDTH": k_width(capability),
        "PTX": not PORTABLE,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    has_tensor_cores = capability is None or capability >= (8, 0)
    if MB <= 16 and has_tensor_cores and not PORTABLE:
        # Registers of four programs on a processor. Left alone, NVIDIA's assembler aims at more
        # and spills for it. With more rows of x it does not; nor for compute capability 7, where
        # Triton multiplies without tensor cores and needs more registers.
        settings["maxnreg"] = 128
    return Plan((tiles, spans), looked_up, (M, O, I // 8, I // block_size, span), settings)


def height(M: int, capability: tuple[int, int] | None) -> int:
    """Returns MB, the rows of x that the kernel is compiled for: 8, 16, 32 or 64.

    At least 16 for `wgmma`: Triton 3.6 takes `mma.sync` for 8, and it another order.

    Example:
        >>> height(3, (8, 0)), height(3, (9, 0)), height(33, (9, 0))
        (8, 16, 64)
    """
    return max(16 if is_hopper(capability) else 8, power_of_two(M))


def k_width(capability: tuple[int, int] | None) -> int:
    """Returns KWIDTH, Triton's kWidth: the neighbouring columns that a thread holds at a time.

    2 for `wgmma` and 4 for `mma.sync`. With `tcgen05` (compute capability 10), and on AMD GPUs, no
    order saves anything.

    Example:
        >>> k_width((8, 0)), k_width((9, 0))
        (4, 2)
    """
    return 2 if is_hopper(capability) else 4


def is_hopper(capability: tuple[int, int] | None) -> bool:
    """Whether Triton multiplies with `wgmma`, which compute capability 9 alone has."""
    return capability is not None and capability[0] == 9
