r"""Attention for training: out = softmax(scale q k^T + mask) v, one block of scores at a time.

    S = scale q k^T + mask,   P = exp(S - lse),   out = P v,   lse = log(rowsum(exp(S)))

    dv = P^T dout,   dP = dout v^T,   dS = P * (dP - delta),   delta = rowsum(dout * out)
    dq = scale dS k,   dk = scale dS^T q

The scores are never in memory, only a block of them (FlashAttention, arXiv:2205.14135): the softmax
of a row is computed while its blocks pass by, and wherever a block has a larger maximum, what was
summed before is scaled down. The backward computes P again from lse, one number per query. Blocks
in which no query attends to a key are skipped.

PyTorch's kernel does the same, and multiplies its blocks with BLAS. For two blocks of 64 x 64 in
bfloat16 that takes 11 us on one core, and 2.4 with products.py. Here blocks are transposed: a row
of S belongs to a key and a column to a query, so maxima, sums, lse and delta are vectors over
columns.

bfloat16 enters the products as it is, and so do P and dS, rounded; sums, softmax, dP and delta are
float32.

Dimension letters: B batch, H query heads, K key heads, L queries, J keys, D head size.
"""

import ctypes
import functools
import math
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from . import avx512, team
from .floats import widened
from .heads import Strided, read_head, strided, write_head
from .products import COLUMNS, add_product, add_transposed_product
from .runtime import jit, jit_reordered
from .scores import (
    LOWEST,
    add_scaled,
    exponentials,
    is_used,
    multiply_block,
    scale_and_mask,
    scale_columns,
    softmax_backward,
)
from .team import pointer
from .words import (
    BLOCK,
    as_columns,
    as_pairs,
    clear,
    padded,
    round_to_pairs,
    round_to_rows,
    transpose_to_rows,
    zeros,
)

# The fewest scores that are worth a thread of their own.
_GRAIN = 1 << 15

# So many groups of query heads are enough for a thread to sum each by itself.
_GROUPS_PER_THREAD = 4

# A team divides its work in multiples of 16: as which a head counts.
_UNITS = 16

_SIZES = ("B", "H", "K", "L", "J", "D")
_INTEGERS = ("rows", "kernel", *_SIZES, "group", "causal", "mask", "mask_batch", "lse")
_TENSORS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")


class _Call(ctypes.Structure):
    """A call, as the threads read it. Addresses are 0 where there is no such tensor.

    mask is uint8 [B or 1, J, L] and lse float32 [B, H, L]. A thread takes `group` query heads with
    the same keys at a time; dk and dv have a head for each group.
    """

    _fields_ = (
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, Strided) for name in _TENSORS),
        ("scale", ctypes.c_float),
    )


_CALL = np.dtype(_Call)


def supports(dtype: torch.dtype) -> bool:
    """Whether this processor has the instructions for a dtype."""
    has = {torch.bfloat16: avx512.AVX512_BF16, torch.float32: avx512.AVX512}
    return has.get(dtype, False)


def _forward(address: int, start: int, stop: int) -> None:
    call = carray(pointer(address), 1, _CALL)[0]
    for head in range(start // _UNITS, stop // _UNITS):
        _forward_head(call, head // call.H, head % call.H)


@jit
def _forward_head(call: Any, b: int, h: int) -> None:
    numbers = 4 // call.q.itemsize
    width = padded(call.D, COLUMNS)
    words, steps = width // numbers, BLOCK // numbers
    key_head = h // (call.H // call.K)

    q = read_head(call.q, b, h, call.L, call.D)
    q = as_columns(q, words)
    k = read_head(call.k, b, key_head, call.J, call.D)
    v = read_head(call.v, b, key_head, call.J, call.D)
    v = as_pairs(v, width, numbers)
    lse = _lse(call, b, h)

    S = zeros(BLOCK * BLOCK).view(np.float32)
    P = zeros(BLOCK * BLOCK // numbers)
    O = zeros(width * BLOCK).view(np.float32)  # [D, queries]
    rows = zeros(width * BLOCK).view(np.float32)
    maximum = np.empty(BLOCK, np.float32)
    total = np.empty(BLOCK, np.float32)
    scaling = np.empty(BLOCK, np.float32)

    for i in range(0, call.L, BLOCK):
        clear(O)
        total[:] = 0
        maximum[:] = LOWEST
        for j in range(0, call.J, BLOCK):
            if not is_used(call, b, j, i):
                continue
            keys, queries = k[j * words :], q[i * words :]
            multiply_block(words, numbers, keys, queries, S)
            scale_and_mask(call, b, j, i, S)
            exponentials(S, maximum, total, scaling)

            # O = scaling O + v^T P
            round_to_pairs(S, BLOCK, numbers, P)
            scale_columns(O, scaling)
            pairs = v[j // numbers * width :]
            add_transposed_product(numbers, pairs, P, O, width, steps, BLOCK)

        size = min(BLOCK, call.L - i)
        for n in range(BLOCK):
            scaling[n] = 1 / total[n]
            level = maximum[n] + math.log(total[n])
            if call.mask and total[n] == 0:
                # It attends to nothing: out is 0, and so is P in the backward.
                scaling[n], level = 0, np.inf
            if n < size:
                lse[i + n] = level
        scale_columns(O, scaling)
        transpose_to_rows(O, width, rows)
        write_head(call.out, b, h, i, size, rows, call.D)


def _backward(address: int, start: int, stop: int) -> None:
    call = carray(pointer(address), 1, _CALL)[0]
    groups = call.H // call.group
    for group in range(start // _UNITS, stop // _UNITS):
        _backward_group(call, group // groups, group % groups)


@jit
def _backward_group(call: Any, b: int, g: int) -> None:
    """The gradients of one group of query heads, and the sums of their dk and dv."""
    width = padded(call.D, COLUMNS)
    size = padded(call.J, BLOCK) * width
    dk, dv = zeros(size).view(np.float32), zeros(size).view(np.float32)
    for h in range(g * call.group, (g + 1) * call.group):
        _backward_head(call, b, h, dk, dv)

    for j in range(0, call.J, BLOCK):
        rows = min(BLOCK, call.J - j)
        write_head(call.dk, b, g, j, rows, dk[j * width :], call.D)
        write_head(call.dv, b, g, j, rows, dv[j * width :], call.D)


@jit
def _backward_head(
    call: Any,
    b: int,
    h: int,
    dk_sum: Any,
    dv_sum: Any,
) -> None:
    numbers = 4 // call.q.itemsize
    width = padded(call.D, COLUMNS)
    words, steps = width // numbers, BLOCK // numbers
    key_head = h // (call.H // call.K)

    q_rows = read_head(call.q, b, h, call.L, call.D)
    q, q_pairs = as_columns(q_rows, words), as_pairs(q_rows, width, numbers)
    dout_rows = read_head(call.dout, b, h, call.L, call.D)
    dout, dout_pairs = as_columns(dout_rows, words), as_pairs(dout_rows, width, numbers)
    k = read_head(call.k, b, key_head, call.J, call.D)
    k_pairs = as_pairs(k, width, numbers)
    v = read_head(call.v, b, key_head, call.J, call.D)

    lse, delta = _of_queries(call, b, h, dout_rows)
    P = zeros(BLOCK * BLOCK).view(np.float32)
    dS = zeros(BLOCK * BLOCK).view(np.float32)
    left = zeros(BLOCK * steps)
    right = zeros(BLOCK * steps)
    # [blocks, D, 64]
    dq = zeros(padded(call.L, BLOCK) * width).view(np.float32)
    dk = zeros(BLOCK * width).view(np.float32)
    dv = zeros(BLOCK * width).view(np.float32)

    for j in range(0, call.J, BLOCK):
        clear(dk)
        clear(dv)
        for i in range(0, call.L, BLOCK):
            if not is_used(call, b, j, i):
                continue
            keys, queries = j * words, i * words
            multiply_block(words, numbers, k[keys:], q[queries:], P)
            multiply_block(words, numbers, v[keys:], dout[queries:], dS)
            scale_and_mask(call, b, j, i, P)
            softmax_backward(P, dS, lse[i:], delta[i:])

            # dv += P^T dout,  dk += dS^T q,  dq += dS k
            at = i // numbers * width
            round_to_rows(P, numbers, left)
            add_product(numbers, left, dout_pairs[at:], dv, BLOCK, steps, width)
            round_to_rows(dS, numbers, left)
            add_product(numbers, left, q_pairs[at:], dk, BLOCK, steps, width)
            round_to_pairs(dS, BLOCK, numbers, right)
            pairs = k_pairs[j // numbers * width :]
            sums = dq[i * width :]
            add_transposed_product(numbers, pairs, right, sums, width, steps, BLOCK)

        add_scaled(call.scale, dk, dk_sum[j * width :])
        add_scaled(np.float32(1), dv, dv_sum[j * width :])

    dq *= call.scale
    for i in range(0, call.L, BLOCK):
        size = min(BLOCK, call.L - i)
        transpose_to_rows(dq[i * width :], width, dk)
        write_head(call.dq, b, h, i, size, dk, call.D)


@jit
def _of_queries(
    call: Any,
    b: int,
    h: int,
    dout: Any,
) -> Any:
    """Returns lse and delta of a head's queries: the padding has P = 0."""
    queries = padded(call.L, BLOCK)
    width = padded(call.D, COLUMNS)
    lse = np.empty(queries, np.float32)
    delta = np.empty(queries, np.float32)

    saved = _lse(call, b, h)
    for i in range(queries):
        lse[i] = saved[i] if i < call.L else np.inf

    out = read_head(call.out, b, h, call.L, call.D)
    if call.q.itemsize == 2:
        _row_dots(dout.view(np.uint16), out.view(np.uint16), width, delta)
    else:
        _row_dots(dout.view(np.float32), out.view(np.float32), width, delta)
    return lse, delta


@jit
def _lse(call: Any, b: int, h: int) -> Any:
    """Returns the saved lse of one head."""
    size = call.B * call.H * call.L
    first = (b * call.H + h) * call.L
    return carray(pointer(call.lse), size, np.float32)[first:]


@jit
def _row_dots(x: Any, y: Any, width: int, out: Any) -> None:
    """out[i] = x[i] . y[i] for the rows of matrices [.., width]."""
    for i in range(out.size):
        out[i] = _dot(x, y, i * width, width)


@jit_reordered
def _dot(
    x: Any,
    y: Any,
    first: int,
    size: int,
) -> Any:
    """x[first : first + size] . y[first : first + size], summed in any order."""
    total = np.float32(0)
    stop = first + size
    for n in range(np.uint64(first), np.uint64(stop)):
        total += widened(x[n]) * widened(y[n])
    return total


def _empty(
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """[B, heads, positions, D], in memory [B, positions, heads, D] as the layers around want it."""
    B, heads, positions, D = shape
    out = torch.empty((B, positions, heads, D), dtype=dtype)
    return out.transpose(1, 2)


def _run(
    kernel: Any,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    lse: Tensor,
    group: int,
    **tensors: Tensor,
) -> None:
    B, H, L, D = tensors["q"].shape
    _, K, J, _ = tensors["k"].shape
    sizes = dict(zip(_SIZES, (B, H, K, L, J, D), strict=True))

    groups = B * H // group
    call = _Call(rows=groups * _UNITS, group=group, causal=causal, scale=scale, **sizes)
    call.lse = lse.data_ptr()
    # What the call points to lives in variables, as long as the call.
    if mask is not None:
        mask = mask[:, 0].mT.contiguous()
        call.mask = mask.data_ptr()
        call.mask_batch = J * L if len(mask) > 1 else 0
    for name, t in tensors.items():
        tensors[name] = t if t.stride(3) == 1 else t.contiguous()
        setattr(call, name, strided(tensors[name]))

    work = B * H * L * J // _GRAIN
    team.run(kernel, call, call.rows, min(groups, work))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns out [B, H, L, D], and lse [B, H, L] in float32, of tensors that `supports` covers.

    k and v are [B, K, J, D]; query head h reads key head h // (H / K). mask is bool [B or 1, 1, L,
    J], or None. If causal, query i attends to the keys 0 ... i, and mask is None.
    """
    out = _empty(q.shape, q.dtype)
    lse = torch.empty(q.shape[:3])
    tensors = {"q": q, "k": k, "v": v, "out": out}
    _run(_forward, mask, causal, scale, lse, 1, **tensors)
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv from the arguments and results of `attention`."""
    H = q.shape[1]
    B, K, J, D = k.shape
    # Query heads with the same keys are summed by one thread, if there is work for all of them;
    # else afterwards. The sums are in the same order.
    group = H // K if _GROUPS_PER_THREAD * torch.get_num_threads() <= B * K else 1
    groups = H // group
    dtype = k.dtype if groups == K else torch.float32
    dk = _empty((B, groups, J, D), dtype)
    dv = _empty((B, groups, J, D), dtype)
    dq = _empty(q.shape, q.dtype)

    given = {"q": q, "k": k, "v": v, "out": out, "dout": dout}
    gradients = {"dq": dq, "dk": dk, "dv": dv}
    _run(_backward, mask, causal, scale, lse, group, **given, **gradients)
    return dq, _sum_of_groups(dk, K).to(k.dtype), _sum_of_groups(dv, K).to(k.dtype)


def _sum_of_groups(t: Tensor, K: int) -> Tensor:
    """[B, groups, J, D] -> [B, K, J, D]."""
    B, _, J, D = t.shape
    heads = t.view(B, K, -1, J, D).unbind(2)
    return functools.reduce(torch.add, heads)
