r"""The tile path of the products on a GPU: a tile of W is dequantized on its way into the product.

    y = x W^T + bias + s left right^T    [M, O]        dx = dy W + s left right^T    [M, I]

The weights are exactly what `dequantize` gives, so only the order of summation differs from the
reference.

What the compiler makes of the loops (NVIDIA):

* Packed words and x are copied to shared memory in the background, some tiles ahead (`stages`).
  Triton does so with every load that a product depends on, one load behind the other; so a table in
  memory would take the buffers from the words. On NVIDIA there is none: see `block_table.py`.
* With double quantization an absmax is a code of one byte, which cannot be copied like that, then a
  look-up. So codes are loaded into registers two tiles ahead, and looked up one tile ahead, while a
  tile is multiplied.
* A thread decodes 32 weights at a time, in registers, and writes them to shared memory: W is the
  second factor of y = x W^T, which wgmma takes from nowhere else, and which every warp needs whole
  or in part. (The skinny path, y^T = W x^T, does without.)

Dimension letters: M rows of x, I in_features, O out_features, r rank; BM, BO, BI, BR the sides of a
tile.
"""

from typing import Any

import torch
from torch import Tensor

from ..reference.nf4 import PackedWeight
from . import runtime
from .block_table import decode_with_table, table_ptx
from .nf4 import decode, load_stored, scale_of
from .runtime import LowRank, launch, power_of_two, tables, term_of, tl, triton


@triton.jit
def _forward(
    x_ptr, weight, tables, bias_ptr, term, y_ptr, M, O, I, stride,
    BLOCK: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr,
    PTX: tl.constexpr, OPAQUE: tl.constexpr,
):  # fmt: skip
    """y[tile] = scale * left right^T + x W^T + bias, one tile [BM, BO] per program."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    m, o, _, acc = _start(term, M, O, BM, BO, BR)

    xs = x_ptr + m.to(tl.int64)[:, None] * stride + tl.arange(0, BI)[None, :]
    codes, scales = _load_stored(o, 0, weight, O, I, BLOCK, BI)
    absmax = scale_of(codes, scales, weight, tables.map8)
    codes, scales = _load_stored(o, tl.minimum(BI, I - BI), weight, O, I, BLOCK, BI)
    for k in range(0, I, BI):
        x = tl.load(xs + k, mask=(m < M)[:, None], other=0.0)
        word = _load_words(o, k, weight, O, I, BI)
        if weight.absmax2 is None:
            # Stored as float32, it is copied in the background as words and x are.
            absmax, scales = _load_stored(o, k, weight, O, I, BLOCK, BI)
        W = _decode_tile(word, absmax, tables, dtype, PTX, OPAQUE)
        acc = tl.dot(x, tl.trans(W), acc)

        # The next tile's. What the one after it needs is on its way (or the last one's again).
        absmax = scale_of(codes, scales, weight, tables.map8)
        codes, scales = _load_stored(o, tl.minimum(k + 2 * BI, I - BI), weight, O, I, BLOCK, BI)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    ys = y_ptr + m.to(tl.int64)[:, None] * O + o[None, :]
    tl.store(ys, acc.to(dtype), mask=(m < M)[:, None] & (o < O)[None, :])


@triton.jit
def _backward(
    dy_ptr, weight, tables, term, dx_ptr, M, O, I, stride,
    BLOCK: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr,
    PTX: tl.constexpr, OPAQUE: tl.constexpr,
):  # fmt: skip
    """dx[tile] = scale * left right^T + dy W, one tile [BM, BI] per program."""
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    m, i, first, acc = _start(term, M, I, BM, BI, BR)

    o = tl.arange(0, BO)
    codes, scales = _load_stored(o, first, weight, O, I, BLOCK, BI)
    absmax = scale_of(codes, scales, weight, tables.map8)
    codes, scales = _load_stored(o + BO, first, weight, O, I, BLOCK, BI)
    for k in range(0, O, BO):
        o = k + tl.arange(0, BO)
        dys = dy_ptr + m.to(tl.int64)[:, None] * stride + o[None, :]
        dy = tl.load(dys, mask=(m < M)[:, None] & (o < O)[None, :], other=0.0)
        word = _load_words(o, first, weight, O, I, BI)
        if weight.absmax2 is None:
            absmax, scales = _load_stored(o, first, weight, O, I, BLOCK, BI)
        W = _decode_tile(word, absmax, tables, dtype, PTX, OPAQUE)
        acc = tl.dot(dy, W, acc)

        # As in `_forward`.
        absmax = scale_of(codes, scales, weight, tables.map8)
        codes, scales = _load_stored(o + 2 * BO, first, weight, O, I, BLOCK, BI)

    dxs = dx_ptr + m.to(tl.int64)[:, None] * I + i[None, :]
    tl.store(dxs, acc.to(dtype), mask=(m < M)[:, None])


@triton.jit
def _load_words(o, first, weight, O, I, WIDTH: tl.constexpr):
    """The words of W[o, first : first + WIDTH], int32 [len(o), WIDTH / 8]; 0 below the last row."""
    start = (o.to(tl.int64)[:, None] * I + first) // 8

    # `first` and I are multiples of WIDTH: so a thread may copy 16 bytes at a time.
    words = tl.multiple_of(start, (WIDTH // 8, WIDTH // 8)) + tl.arange(0, WIDTH // 8)[None, :]
    packed = weight.packed.to(tl.pointer_type(tl.int32))
    return tl.load(packed + words, mask=(o < O)[:, None], other=0)


@triton.jit
def _load_stored(o, first, weight, O, I, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """What is stored of the absmax of W[o, first : first + WIDTH], [len(o)] or [len(o), blocks]."""
    b = (o.to(tl.int64) * I + first) // BLOCK
    if WIDTH <= BLOCK:
        # Not a matrix of one column, for which triton 3.6 lays out the whole tile by columns.
        return load_stored(b, o < O, weight)
    else:  # noqa: RET505 - Triton drops the branch that is not taken, but not what follows a return
        blocks = b[:, None] + tl.arange(0, WIDTH // BLOCK)[None, :]
        return load_stored(blocks, (o < O)[:, None], weight)


@triton.jit
def _decode_tile(
    word, absmax, tables, DTYPE: tl.constexpr, PTX: tl.constexpr, OPAQUE: tl.constexpr
):
    """The weights of words [R, C] in DTYPE, rounded once: absmax [R] or [R, blocks] -> [R, 8 C]."""
    ROWS: tl.constexpr = word.shape[0]
    WORDS: tl.constexpr = word.shape[1]
    BLOCKS: tl.constexpr = absmax.shape[1] if len(absmax.shape) == 2 else 1
    if BLOCKS == 1:
        absmax = absmax[:, None]

    if PTX is not None:
        # One absmax for every four words.
        REPEATS: tl.constexpr = WORDS // 4 // BLOCKS
        each = tl.broadcast_to(absmax[:, :, None], (ROWS, BLOCKS, REPEATS))
        return decode_with_table(word, tl.reshape(each, (ROWS, WORDS // 4)), DTYPE, PTX, OPAQUE)
    else:  # noqa: RET505 - as above
        word = tl.reshape(word, (ROWS, BLOCKS, WORDS // BLOCKS))
        W = tl.reshape(decode(word, absmax[:, :, None], tables.levels), (ROWS, 8 * WORDS))

        # After the reshape: triton 3.6 fails to compile the product of a transposed reshape.
        return W.to(DTYPE)


@triton.jit
def _start(term, M, N, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """The rows, columns and first column of a program's tile, and the term to which it adds."""
    tile_m, tile_n = _tile_of(M, N, BM, BN)
    first = tile_n * BN
    m, n = tile_m * BM + tl.arange(0, BM), first + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    if term is not None:
        acc = _low_rank(term, m, n, M, N, BR)
    return m, n, first, acc


@triton.jit
def _tile_of(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Which tile this program computes.

    Eight tiles of rows take turns in a column, so that they find W in the L2 cache.
    """
    across, down = tl.cdiv(N, BN), tl.cdiv(M, BM)
    program = tl.program_id(0)
    group = program // (8 * across)
    height = tl.minimum(down - 8 * group, 8)
    return 8 * group + program % (8 * across) % height, program % (8 * across) // height


@triton.jit
def _low_rank(term, rows, columns, M, N, BR: tl.constexpr):
    """scale * left[rows] @ right[columns]^T in float32: left [M, r], right [N, r]."""
    acc = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for j in range(0, term.r, BR):
        at = j + tl.arange(0, BR)
        inside = (at < term.r)[None, :]

        left = rows.to(tl.int64)[:, None] * term.r + at[None, :]
        a = tl.load(term.left + left, mask=(rows < M)[:, None] & inside, other=0.0)

        right = columns.to(tl.int64)[:, None] * term.right_row + at[None, :] * term.right_column
        b = tl.load(term.right + right, mask=(columns < N)[:, None] & inside, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc)
    return acc * term.scale


def tile_forward(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None,
    low: LowRank | None,
    choice: dict[str, Any],
) -> Tensor:
    """Returns x W^T + bias + scale * left right^T, [M, O], in tiles of the sides of `choice`."""
    M, (O, I) = x.shape[0], w.shape
    y = torch.empty(M, O, dtype=x.dtype, device=x.device)

    grid = (-(-M // choice["BM"]) * -(-O // choice["BO"]),)
    looked_up = tables(x.device, w.quant_type)
    arguments = x, w.tensors, looked_up, bias, term_of(low), y, M, O, I, x.stride(0)
    launch(_forward, grid, *arguments, **_settings(x, w, low, choice))
    return y


def tile_backward(
    dy: Tensor, w: PackedWeight, low: LowRank | None, choice: dict[str, Any]
) -> Tensor:
    """Returns dy W + scale * left right^T, [M, I], in tiles of the sides of `choice`."""
    M, (O, I) = dy.shape[0], w.shape
    dx = torch.empty(M, I, dtype=dy.dtype, device=dy.device)

    grid = (-(-M // choice["BM"]) * -(-I // choice["BI"]),)
    looked_up = tables(dy.device, w.quant_type)
    arguments = dy, w.tensors, looked_up, term_of(low), dx, M, O, I, dy.stride(0)
    launch(_backward, grid, *arguments, **_settings(dy, w, low, choice))
    return dx


def _has_tcgen05(capability: tuple[int, int] | None) -> bool:
    # Nothing is to be hidden from it; and triton 3.6 cannot pipeline what it must not repeat.
    return capability is not None and capability[0] in (10, 11)


def _has_ptx() -> bool:
    # The interpreter runs inline PTX in the tests only, and no more than 32-bit integers.
    return not (runtime.PORTABLE or triton.knobs.runtime.interpret)


def _settings(
    x: Tensor, w: PackedWeight, low: LowRank | None, choice: dict[str, Any]
) -> dict[str, Any]:
    # A tensor core takes 16 columns at least.
    BR = min(64, max(16, power_of_two(low.left.shape[1]))) if low else 0

    settings = {
        "BLOCK": w.block_size,
        "BR": BR,
        "PTX": table_ptx(w.quant_type, x.dtype) if _has_ptx() else None,
        "OPAQUE": not _has_tcgen05(runtime.capability_of(x.device)),
        "BM": choice["BM"],
        "BO": choice["BO"],
        "BI": choice["BI"],
        "num_warps": choice["warps"],
        "num_stages": choice["stages"],
    }
    if not runtime.PORTABLE:
        # Left to itself, NVIDIA's assembler aims at more programs at once and spills for it.
        settings["maxnreg"] = 255
    return settings
