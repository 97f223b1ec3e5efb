r"""The products with an NF4 weight on a GPU, with Triton: the functions of reference/matmul.py.

    y = x W^T + bias    [M, O]        dx = dy W    [M, I]        W [O, I] stays packed

Three paths, and `choose.py` says which for how many rows of x:

* **skinny**, M <= 16 (decoding): the time is that of reading W's packed bytes. See `skinny.py`.
* **tile**, some tens to hundreds of rows: a tile of W is decoded on its way into the product. Exactly what `dequantize` gives,
  so only the order of summation differs from the reference.
* **dense**, more rows: W is decoded once into a scratch and cuBLAS multiplies. The scratch is a block of PyTorch's caching
  allocator: reused from call to call, never shared between streams, and allowed in a CUDA graph.

A low-rank term s z B^T is added in the same pass over y where that pays (see lora.py).

Dimension letters: M rows of x, I in_features, O out_features, r rank; BM, BO, BI, BR the sides of a tile.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import runtime
from .choose import choose, takes
from .nf4 import decode, dequantize, dequantize_into, load_scale
from .runtime import (
    FLOATS,
    LowRank,
    Weight,
    check,
    check_weight,
    launch,
    tables_on,
    term_arguments,
    tl,
    triton,
)
from .skinny import skinny

# ---- the tile path


@triton.jit
def _decode_tile(
    rows, first, packed, absmax, absmax2, offset, code, map8, O, I,
    BLOCK: tl.constexpr, DOUBLE: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """W[rows, first : first + WIDTH] in DTYPE: [len(rows), WIDTH], zero below the last row of W."""
    BLOCKS: tl.constexpr = WIDTH // BLOCK if WIDTH > BLOCK else 1
    ROWS: tl.constexpr = rows.shape[0]
    inside = (rows < O)[:, None]
    start = rows.to(tl.int64)[:, None] * I + first
    words = packed.to(tl.pointer_type(tl.int32)) + start // 8 + tl.arange(0, WIDTH // 8)[None, :]
    word = tl.load(words, mask=inside, other=0)
    scale = load_scale(
        start // BLOCK + tl.arange(0, BLOCKS)[None, :],
        inside,
        absmax,
        absmax2,
        offset,
        map8,
        DOUBLE,
    )
    word = tl.reshape(word, (ROWS, BLOCKS, WIDTH // 8 // BLOCKS))
    W = tl.reshape(decode(word, scale[:, :, None], code), (ROWS, WIDTH))
    return W.to(
        DTYPE
    )  # after the reshape: triton 3.6 fails to compile the product of a transposed reshape


@triton.jit
def _low_rank(
    left, right, scale, rows, columns, M, N, r, right_row, right_column, BR: tl.constexpr
):
    """scale * left[rows] @ right[columns]^T in float32: left [M, r], right [N, r]."""
    acc = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for j in range(0, r, BR):
        at = j + tl.arange(0, BR)
        a = tl.load(
            left + rows.to(tl.int64)[:, None] * r + at[None, :],
            mask=(rows < M)[:, None] & (at < r)[None, :],
            other=0.0,
        )
        where = right + columns.to(tl.int64)[:, None] * right_row + at[None, :] * right_column
        b = tl.load(where, mask=(columns < N)[:, None] & (at < r)[None, :], other=0.0)
        acc = tl.dot(a, tl.trans(b), acc)
    return acc * scale


@triton.jit
def _tile_of(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Which tile this program computes: eight tiles of rows take turns in a column, so that they find W in the L2 cache."""
    across, down = tl.cdiv(N, BN), tl.cdiv(M, BM)
    program = tl.program_id(0)
    group = program // (8 * across)
    height = tl.minimum(down - 8 * group, 8)
    return 8 * group + program % (8 * across) % height, program % (8 * across) // height


@triton.jit
def _forward(
    x, packed, absmax, absmax2, offset, code, map8, bias, left, right, scale, y, M, O, I, r, right_row, right_column, stride,
    BLOCK: tl.constexpr, DOUBLE: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """y[tile] = scale * left right^T + x W^T + bias, one tile [BM, BO] a program."""
    m, n = _tile_of(M, O, BM, BO)
    rows, columns = m * BM + tl.arange(0, BM), n * BO + tl.arange(0, BO)
    dtype: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros((BM, BO), tl.float32)
    if BR:
        acc = _low_rank(left, right, scale, rows, columns, M, O, r, right_row, right_column, BR)
    at = x + rows.to(tl.int64)[:, None] * stride + tl.arange(0, BI)[None, :]
    for k in range(0, I, BI):
        W = _decode_tile(
            columns, k, packed, absmax, absmax2, offset, code, map8, O, I, BLOCK, DOUBLE, BI, dtype
        )  # [BO, BI]
        acc = tl.dot(tl.load(at + k, mask=(rows < M)[:, None], other=0.0), tl.trans(W), acc)
    if BIAS:
        acc += tl.load(bias + columns, mask=columns < O, other=0.0).to(tl.float32)[None, :]
    mask = (rows < M)[:, None] & (columns < O)[None, :]
    tl.store(y + rows.to(tl.int64)[:, None] * O + columns[None, :], acc.to(dtype), mask=mask)


@triton.jit
def _backward(
    dy, packed, absmax, absmax2, offset, code, map8, left, right, scale, dx, M, O, I, r, right_row, right_column, stride,
    BLOCK: tl.constexpr, DOUBLE: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx[tile] = scale * left right^T + dy W, one tile [BM, BI] a program."""
    m, n = _tile_of(M, I, BM, BI)
    rows, columns = m * BM + tl.arange(0, BM), n * BI + tl.arange(0, BI)
    dtype: tl.constexpr = dy.dtype.element_ty
    acc = tl.zeros((BM, BI), tl.float32)
    if BR:
        acc = _low_rank(left, right, scale, rows, columns, M, I, r, right_row, right_column, BR)
    for k in range(0, O, BO):
        o = k + tl.arange(0, BO)
        at = dy + rows.to(tl.int64)[:, None] * stride + o[None, :]
        W = _decode_tile(
            o, n * BI, packed, absmax, absmax2, offset, code, map8, O, I, BLOCK, DOUBLE, BI, dtype
        )  # [BO, BI]
        acc = tl.dot(tl.load(at, mask=(rows < M)[:, None] & (o < O)[None, :], other=0.0), W, acc)
    tl.store(
        dx + rows.to(tl.int64)[:, None] * I + columns[None, :],
        acc.to(dtype),
        mask=(rows < M)[:, None],
    )


def _tile_forward(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    low: LowRank | None,
    O: int,
    block_size: int,
    choice: dict[str, Any],
) -> Tensor:
    M, I = x.shape
    y = torch.empty(M, O, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(M, choice["BM"]) * triton.cdiv(O, choice["BO"]),)
    tables = tables_on(x.device)
    left, right, scale, *sizes = term_arguments(low)
    arguments = (
        x,
        *weight,
        tables.code,
        tables.map8,
        bias,
        left,
        right,
        scale,
        y,
        M,
        O,
        I,
        *sizes,
        x.stride(0),
    )
    launch(
        _forward, grid, *arguments, BIAS=bias is not None, **_meta(weight, low, block_size, choice)
    )
    return y


def _tile_backward(
    dy: Tensor, weight: Weight, low: LowRank | None, I: int, block_size: int, choice: dict[str, Any]
) -> Tensor:
    M, O = dy.shape
    dx = torch.empty(M, I, dtype=dy.dtype, device=dy.device)
    grid = (triton.cdiv(M, choice["BM"]) * triton.cdiv(I, choice["BI"]),)
    tables = tables_on(dy.device)
    left, right, scale, *sizes = term_arguments(low)
    arguments = (
        dy,
        *weight,
        tables.code,
        tables.map8,
        left,
        right,
        scale,
        dx,
        M,
        O,
        I,
        *sizes,
        dy.stride(0),
    )
    launch(_backward, grid, *arguments, **_meta(weight, low, block_size, choice))
    return dx


def _meta(
    weight: Weight, low: LowRank | None, block_size: int, choice: dict[str, Any]
) -> dict[str, Any]:
    sides = {side: choice[side] for side in ("BM", "BO", "BI")}
    r = low.left.shape[1] if low else 0
    BR = (
        min(64, max(16, triton.next_power_of_2(r))) if low else 0
    )  # a tensor core takes 16 columns at least
    settings = {
        "num_warps": choice["warps"],
        "num_stages": choice["stages"],
        "enable_fp_fusion": True,
    }
    if not runtime.PORTABLE:
        settings["maxnreg"] = (
            255  # left to itself NVIDIA's assembler aims at more programs at once, and spills for it
        )
    return {"BLOCK": block_size, "DOUBLE": weight[2] is not None, "BR": BR} | sides | settings


# ---- the dense path


def _folds(low: LowRank | None, x: Tensor, N: int) -> bool:
    """Whether the low-rank term is worth folding into the product of x with an [N, .] weight: see `_dense_forward`."""
    return low is not None and x.shape[1] < N and x.shape[1] % 8 == 0 and x.dtype != torch.float64


def _beside(x: Tensor, low: LowRank) -> Tensor:
    """[x | left | zeros], with rows in multiples of 8 elements: cuBLAS is fast where 16 bytes divide a row."""
    M, I = x.shape
    r = low.left.shape[1]
    wide = torch.empty(M, I + -(-r // 8) * 8, dtype=x.dtype, device=x.device)
    wide[:, :I], wide[:, I : I + r], wide[:, I + r :] = x, low.left, 0
    return wide


def _dense_forward(
    x: Tensor, weight: Weight, bias: Tensor | None, low: LowRank | None, O: int, block_size: int
) -> Tensor:
    """Adding the low-rank term afterwards reads and writes y once more, [M, O]. Where y is wider than x it is cheaper to copy x:
    y = [x | z] [W | s B]^T."""
    I = x.shape[1]
    if low is None or not _folds(low, x, O):
        y = F.linear(x, dequantize(*weight, (O, I), x.dtype, block_size), bias)
        return y if low is None else y.addmm_(low.left, low.right.T, alpha=low.scale)
    wide, r = _beside(x, low), low.left.shape[1]
    W = torch.empty(O, wide.shape[1], dtype=x.dtype, device=x.device)
    dequantize_into(W[:, :I], *weight, block_size)
    W[:, I : I + r], W[:, I + r :] = low.scale * low.right, 0
    return F.linear(wide, W, bias)


def _dense_backward(
    dy: Tensor, weight: Weight, low: LowRank | None, I: int, block_size: int
) -> Tensor:
    """The same choice: dx = [dy | u] [W ; s A], where dx is wider than dy."""
    O = dy.shape[1]
    if low is None or not _folds(low, dy, I):
        dx = dy @ dequantize(*weight, (O, I), dy.dtype, block_size)
        return dx if low is None else dx.addmm_(low.left, low.right.T, alpha=low.scale)
    wide, r = _beside(dy, low), low.left.shape[1]
    W = torch.empty(wide.shape[1], I, dtype=dy.dtype, device=dy.device)
    dequantize_into(W[:O], *weight, block_size)
    W[O : O + r], W[O + r :] = low.scale * low.right.T, 0
    return wide @ W


# ---- the functions of reference/matmul.py


def _checked(low: LowRank, x: Tensor, columns: int) -> LowRank:
    """The term with its left factor as [M, r] and contiguous."""
    left = low.left.reshape(-1, low.left.shape[-1]).contiguous()
    for factor, t, size in (("left", left, x.shape[0]), ("right", low.right, columns)):
        check(f"the low-rank term's {factor} factor", t, (x.dtype,), x.device)
        if t.shape != (size, left.shape[1]):
            raise ValueError(
                f"the low-rank term's {factor} factor is {tuple(t.shape)}, not {(size, left.shape[1])}"
            )
    return low._replace(left=left)


def _prepare(
    direction: str,
    x: Tensor,
    weight: Weight,
    low: LowRank | None,
    shape: Sequence[int],
    block_size: int,
    choice: dict[str, Any] | None,
) -> tuple[Tensor, LowRank | None, dict[str, Any]]:
    """Checks everything; returns x as [M, width] with each row's elements side by side, low-rank term, and the path to take."""
    name, width = ("x", shape[-1]) if direction == "forward" else ("dy", shape[0])
    check(name, x, FLOATS, weight[0].device)
    check_weight(*weight, shape, block_size)
    if len(shape) != 2 or x.shape[-1:] != (width,):
        raise ValueError(
            f"{name} {tuple(x.shape)} does not fit a weight {tuple(shape)}: its last size must be {width}"
        )
    rows = x.reshape(-1, width)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    O, I = shape
    if low is not None:
        low = _checked(low, rows, O if direction == "forward" else I)
    half = x.dtype in (torch.float16, torch.bfloat16)  # on tensor cores float32 would lose bits
    fusable = half and rows.numel() > 0 and weight[0].data_ptr() % 4 == 0
    if choice is None:
        return (
            rows,
            low,
            choose(direction, rows.shape[0], O, I, block_size) if fusable else {"path": "dense"},
        )
    if not (takes(choice, rows.shape[0], I, block_size) and (fusable or choice["path"] == "dense")):
        raise ValueError(
            f"{choice} does not take {rows.shape[0]} rows of {x.dtype} and a weight {tuple(shape)} in blocks of {block_size}"
        )
    return rows, low, choice


def forward(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    low: LowRank | None,
    shape: Sequence[int],
    block_size: int,
    choice: dict[str, Any] | None = None,
) -> Tensor:
    """Returns x W^T + bias + s left right^T, [.., O], by the table's choice or by the `choice` given."""
    rows, low, choice = _prepare("forward", x, weight, low, shape, block_size, choice)
    O = shape[0]
    if bias is not None:
        check("bias", bias, (x.dtype,), x.device)
        if bias.shape != (O,):
            raise ValueError(
                f"bias is {tuple(bias.shape)}: a weight {tuple(shape)} takes one of {(O,)}"
            )
        bias = bias.contiguous()
    if choice["path"] == "skinny":
        y = skinny(rows, weight, bias, low, O, block_size)
    elif choice["path"] == "tile":
        y = _tile_forward(rows, weight, bias, low, O, block_size, choice)
    else:
        y = _dense_forward(rows, weight, bias, low, O, block_size)
    return y.view(*x.shape[:-1], O)


def backward(
    dy: Tensor,
    weight: Weight,
    low: LowRank | None,
    shape: Sequence[int],
    block_size: int,
    choice: dict[str, Any] | None = None,
) -> Tensor:
    """Returns dy W + s left right^T, [.., I], by the table's choice or by the `choice` given."""
    rows, low, choice = _prepare("backward", dy, weight, low, shape, block_size, choice)
    I = shape[1]
    if choice["path"] == "tile":
        dx = _tile_backward(rows, weight, low, I, block_size, choice)
    else:
        dx = _dense_backward(rows, weight, low, I, block_size)
    return dx.view(*dy.shape[:-1], I)


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
    block_size: int,
) -> Tensor:
    """Returns x W^T + bias, [.., O], in x's dtype."""
    return forward(x, (packed, absmax, absmax2, offset), bias, None, shape, block_size)


def nf4_linear_backward(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
) -> Tensor:
    """Returns dx = dy W, [.., I], in dy's dtype."""
    return backward(dy, (packed, absmax, absmax2, offset), None, shape, block_size)
