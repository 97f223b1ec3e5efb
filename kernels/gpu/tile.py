r"""The tile path of the products on a GPU: a tile of W is dequantized on its way into the product.

    y = x W^T + bias + s left right^T    [M, O]        dx = dy W + s left right^T    [M, I]

The weights are exactly what `dequantize` gives, so only the order of summation differs from the
reference.

Dimension letters: M rows of x, I in_features, O out_features, r rank; BM, BO, BI, BR the sides of a
tile.
"""

from typing import Any

import torch
from torch import Tensor

from ..reference.nf4 import PackedWeight
from . import runtime
from .nf4 import decode, load_scale
from .runtime import LowRank, launch, tables, term_of, tl, triton


@triton.jit
def _decode_tile(
    rows, first, weight, tables, O, I,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """W[rows, first : first + WIDTH] in DTYPE: [len(rows), WIDTH], zero below the last row of W."""
    BLOCKS: tl.constexpr = WIDTH // BLOCK if WIDTH > BLOCK else 1
    ROWS: tl.constexpr = rows.shape[0]
    inside = (rows < O)[:, None]
    start = rows.to(tl.int64)[:, None] * I + first

    words = start // 8 + tl.arange(0, WIDTH // 8)[None, :]
    word = tl.load(weight.packed.to(tl.pointer_type(tl.int32)) + words, mask=inside, other=0)
    b = start // BLOCK + tl.arange(0, BLOCKS)[None, :]
    scale = load_scale(b, inside, weight, tables.map8)

    word = tl.reshape(word, (ROWS, BLOCKS, WIDTH // 8 // BLOCKS))
    W = tl.reshape(decode(word, scale[:, :, None], tables.levels), (ROWS, WIDTH))

    # After the reshape: triton 3.6 fails to compile the product of a transposed reshape.
    return W.to(DTYPE)


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
def _start(term, M, N, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """The rows and columns of this program's tile, and the low-rank term, to which it adds."""
    m, n = _tile_of(M, N, BM, BN)
    rows, columns = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    if term is not None:
        acc = _low_rank(term, rows, columns, M, N, BR)
    return n * BN, rows, columns, acc


@triton.jit
def _forward(
    x_ptr, weight, tables, bias_ptr, term, y_ptr, M, O, I, stride,
    BLOCK: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y[tile] = scale * left right^T + x W^T + bias, one tile [BM, BO] per program."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    _, rows, columns, acc = _start(term, M, O, BM, BO, BR)

    at = x_ptr + rows.to(tl.int64)[:, None] * stride + tl.arange(0, BI)[None, :]
    for k in range(0, I, BI):
        W = _decode_tile(columns, k, weight, tables, O, I, BLOCK, BI, dtype)
        acc = tl.dot(tl.load(at + k, mask=(rows < M)[:, None], other=0.0), tl.trans(W), acc)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < O, other=0.0).to(tl.float32)[None, :]
    mask = (rows < M)[:, None] & (columns < O)[None, :]
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * O + columns[None, :], acc.to(dtype), mask=mask)


@triton.jit
def _backward(
    dy_ptr, weight, tables, term, dx_ptr, M, O, I, stride,
    BLOCK: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx[tile] = scale * left right^T + dy W, one tile [BM, BI] per program."""
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    first, rows, columns, acc = _start(term, M, I, BM, BI, BR)

    for k in range(0, O, BO):
        o = k + tl.arange(0, BO)
        at = dy_ptr + rows.to(tl.int64)[:, None] * stride + o[None, :]
        W = _decode_tile(o, first, weight, tables, O, I, BLOCK, BI, dtype)
        acc = tl.dot(tl.load(at, mask=(rows < M)[:, None] & (o < O)[None, :], other=0.0), W, acc)

    where = dx_ptr + rows.to(tl.int64)[:, None] * I + columns[None, :]
    tl.store(where, acc.to(dtype), mask=(rows < M)[:, None])


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

    grid = (triton.cdiv(M, choice["BM"]) * triton.cdiv(O, choice["BO"]),)
    looked_up = tables(x.device, w.quant_type)
    arguments = x, w.tensors, looked_up, bias, term_of(low), y, M, O, I, x.stride(0)
    launch(_forward, grid, *arguments, **_settings(w, low, choice))
    return y


def tile_backward(
    dy: Tensor, w: PackedWeight, low: LowRank | None, choice: dict[str, Any]
) -> Tensor:
    """Returns dy W + scale * left right^T, [M, I], in tiles of the sides of `choice`."""
    M, (O, I) = dy.shape[0], w.shape
    dx = torch.empty(M, I, dtype=dy.dtype, device=dy.device)

    grid = (triton.cdiv(M, choice["BM"]) * triton.cdiv(I, choice["BI"]),)
    looked_up = tables(dy.device, w.quant_type)
    arguments = dy, w.tensors, looked_up, term_of(low), dx, M, O, I, dy.stride(0)
    launch(_backward, grid, *arguments, **_settings(w, low, choice))
    return dx


def _settings(w: PackedWeight, low: LowRank | None, choice: dict[str, Any]) -> dict[str, Any]:
    # A tensor core takes 16 columns at least.
    BR = min(64, max(16, triton.next_power_of_2(low.left.shape[1]))) if low else 0

    settings = {
        "BLOCK": w.block_size,
        "BR": BR,
        "BM": choice["BM"],
        "BO": choice["BO"],
        "BI": choice["BI"],
        "num_warps": choice["warps"],
        "num_stages": choice["stages"],
        "enable_fp_fusion": True,
    }
    if not runtime.PORTABLE:
        # Left to itself, NVIDIA's assembler aims at more programs at once and spills for it.
        settings["maxnreg"] = 255
    return settings
