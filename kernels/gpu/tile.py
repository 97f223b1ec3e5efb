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
from .runtime import LowRank, launch, tables, term_arguments, tl, triton


@triton.jit
def _decode_tile(
    rows, first, packed, absmax, absmax2, offset, levels, map8, O, I,
    BLOCK: tl.constexpr, DOUBLE: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """W[rows, first : first + WIDTH] in DTYPE: [len(rows), WIDTH], zero below the last row of W."""
    BLOCKS: tl.constexpr = WIDTH // BLOCK if WIDTH > BLOCK else 1
    ROWS: tl.constexpr = rows.shape[0]
    inside = (rows < O)[:, None]
    start = rows.to(tl.int64)[:, None] * I + first

    words = packed.to(tl.pointer_type(tl.int32)) + start // 8 + tl.arange(0, WIDTH // 8)[None, :]
    word = tl.load(words, mask=inside, other=0)
    b = start // BLOCK + tl.arange(0, BLOCKS)[None, :]
    scale = load_scale(b, inside, absmax, absmax2, offset, map8, DOUBLE)

    word = tl.reshape(word, (ROWS, BLOCKS, WIDTH // 8 // BLOCKS))
    W = tl.reshape(decode(word, scale[:, :, None], levels), (ROWS, WIDTH))

    # After the reshape: triton 3.6 fails to compile the product of a transposed reshape.
    return W.to(DTYPE)


@triton.jit
def _low_rank(
    left, right, scale, rows, columns, M, N, r, right_row, right_column, BR: tl.constexpr,
):  # fmt: skip
    """scale * left[rows] @ right[columns]^T in float32: left [M, r], right [N, r]."""
    acc = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for j in range(0, r, BR):
        at = j + tl.arange(0, BR)
        inside = (at < r)[None, :]

        where = left + rows.to(tl.int64)[:, None] * r + at[None, :]
        a = tl.load(where, mask=(rows < M)[:, None] & inside, other=0.0)

        where = right + columns.to(tl.int64)[:, None] * right_row + at[None, :] * right_column
        b = tl.load(where, mask=(columns < N)[:, None] & inside, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc)
    return acc * scale


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
def _start(
    left, right, scale, M, N, r, right_row, right_column,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The rows and columns of this program's tile, and the low-rank term, to which it adds."""
    m, n = _tile_of(M, N, BM, BN)
    rows, columns = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    if BR:
        acc = _low_rank(left, right, scale, rows, columns, M, N, r, right_row, right_column, BR)
    return n * BN, rows, columns, acc


@triton.jit
def _forward(
    x, packed, absmax, absmax2, offset, levels, map8, bias, left, right, scale, y,
    M, O, I, r, right_row, right_column, stride,
    BLOCK: tl.constexpr, DOUBLE: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr,
    BI: tl.constexpr, BR: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y[tile] = scale * left right^T + x W^T + bias, one tile [BM, BO] per program."""
    dtype: tl.constexpr = x.dtype.element_ty
    _, rows, columns, acc = _start(
        left, right, scale, M, O, r, right_row, right_column, BM, BO, BR
    )  # fmt: skip

    at = x + rows.to(tl.int64)[:, None] * stride + tl.arange(0, BI)[None, :]
    for k in range(0, I, BI):
        W = _decode_tile(
            columns, k, packed, absmax, absmax2, offset, levels, map8, O, I,
            BLOCK, DOUBLE, BI, dtype,
        )  # fmt: skip
        acc = tl.dot(tl.load(at + k, mask=(rows < M)[:, None], other=0.0), tl.trans(W), acc)

    if BIAS:
        acc += tl.load(bias + columns, mask=columns < O, other=0.0).to(tl.float32)[None, :]
    mask = (rows < M)[:, None] & (columns < O)[None, :]
    tl.store(y + rows.to(tl.int64)[:, None] * O + columns[None, :], acc.to(dtype), mask=mask)


@triton.jit
def _backward(
    dy, packed, absmax, absmax2, offset, levels, map8, left, right, scale, dx,
    M, O, I, r, right_row, right_column, stride,
    BLOCK: tl.constexpr, DOUBLE: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr,
    BI: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx[tile] = scale * left right^T + dy W, one tile [BM, BI] per program."""
    dtype: tl.constexpr = dy.dtype.element_ty
    first, rows, columns, acc = _start(
        left, right, scale, M, I, r, right_row, right_column, BM, BI, BR
    )  # fmt: skip

    for k in range(0, O, BO):
        o = k + tl.arange(0, BO)
        at = dy + rows.to(tl.int64)[:, None] * stride + o[None, :]
        W = _decode_tile(
            o, first, packed, absmax, absmax2, offset, levels, map8, O, I,
            BLOCK, DOUBLE, BI, dtype,
        )  # fmt: skip
        acc = tl.dot(tl.load(at, mask=(rows < M)[:, None] & (o < O)[None, :], other=0.0), W, acc)

    where = dx + rows.to(tl.int64)[:, None] * I + columns[None, :]
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
    left, right, scale, *sizes = term_arguments(low)
    launch(
        _forward, grid, x, *w.tensors, looked_up.levels, looked_up.map8, bias, left, right, scale,
        y, M, O, I, *sizes, x.stride(0),
        BIAS=bias is not None, **_settings(w, low, choice),
    )  # fmt: skip
    return y


def tile_backward(
    dy: Tensor, w: PackedWeight, low: LowRank | None, choice: dict[str, Any]
) -> Tensor:
    """Returns dy W + scale * left right^T, [M, I], in tiles of the sides of `choice`."""
    M, (O, I) = dy.shape[0], w.shape
    dx = torch.empty(M, I, dtype=dy.dtype, device=dy.device)

    grid = (triton.cdiv(M, choice["BM"]) * triton.cdiv(I, choice["BI"]),)
    looked_up = tables(dy.device, w.quant_type)
    left, right, scale, *sizes = term_arguments(low)
    launch(
        _backward, grid, dy, *w.tensors, looked_up.levels, looked_up.map8, left, right, scale,
        dx, M, O, I, *sizes, dy.stride(0),
        **_settings(w, low, choice),
    )  # fmt: skip
    return dx


def _settings(w: PackedWeight, low: LowRank | None, choice: dict[str, Any]) -> dict[str, Any]:
    # A tensor core takes 16 columns at least.
    BR = min(64, max(16, triton.next_power_of_2(low.left.shape[1]))) if low else 0

    settings = {
        "BLOCK": w.block_size,
        "DOUBLE": w.double_quantized,
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
