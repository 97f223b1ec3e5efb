r"""The thin products of a low-rank term on the CPU: matrices P [M, N], T [M, r] and F [r, N].

    T = P F^T          z = x A^T          u = dy B                  `project`
    F = s T^T P        dA = s u^T x       dB^T = s z^T dy           `contract`

BLAS is made for matrices that are large both ways: with r = 8 it takes 1.5 to 7 times as long as
the arithmetic. Here each load of P meets eight rows of F, or the sums of eight, in registers.

Sums are in float32 and rounded once, and do not depend on the number of threads. BLAS multiplies
where the sizes do not fit (`_is_fast`) and on processors without AVX-512.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from . import team
from .avx512 import AVX512, AVX512_BF16
from .low_rank_vectors import (
    COLUMNS,
    FACTORS,
    ROWS,
    add_outer,
    dots,
    store_scaled,
)
from .runtime import jit
from .team import elements, pointer
from .words import padded, pair

# Rows of P whose products are summed in registers, before their sum is added to that in memory.
_CHUNK = 32

# The fewest products that are worth a thread of their own.
_GRAIN = 1 << 19

_PROJECT, _CONTRACT = range(2)

_INTEGERS = ("pairs", "kernel", "product", "M", "N", "r", "P", "T", "F")


class _Call(ctypes.Structure):
    """A call, as the threads read it: sizes, addresses, scaling."""

    _fields_ = (
        *[(name, ctypes.c_int64) for name in _INTEGERS],
        ("scale", ctypes.c_float),
    )


_CALL = np.dtype(_Call)


@jit
def _project(
    call: Any,
    P: Any,
    T: Any,
    F: Any,
    start: int,
    stop: int,
) -> None:
    """Rows [start, stop) of T = P F^T."""
    N, r = call.N, call.r
    for m in range(start, stop, ROWS):
        p = m * N
        for j in range(0, r, FACTORS):
            f, t = j * N, m * r + j
            dots(P, p, F, f, N, T, t, r)


@jit
def _words(
    T: Any,
    first: int,
    rows: int,
    r: int,
    out: Any,
) -> Any:
    """out = eight columns of T in words, as `add_outer` takes them. Returns the rows of words."""
    per_word = 4 // T.itemsize
    count = rows // per_word

    for k in range(count):
        even = np.uint64(first + k * per_word * r)
        odd = even + np.uint64(r)
        target = np.uint64(k * FACTORS)
        for j in range(np.uint64(FACTORS)):
            if T.itemsize == 2:
                out[target + j] = pair(T[even + j], T[odd + j])
            else:
                out[target + j] = T[even + j]
    return count


@jit
def _contract(
    call: Any,
    P: Any,
    T: Any,
    F: Any,
    start: int,
    stop: int,
) -> None:
    """Columns [start, stop) of F = s T^T P."""
    N, r = call.N, call.r
    words = np.empty(_CHUNK * FACTORS, np.uint32)
    sums = np.empty((stop - start) * FACTORS, np.float32)

    for j in range(0, r, FACTORS):
        sums[:] = 0
        for m in range(0, call.M, _CHUNK):
            rows = min(_CHUNK, call.M - m)
            t = m * r + j
            count = _words(T, t, rows, r, words)
            for n in range(start, stop, COLUMNS):
                p, at = m * N + n, (n - start) * FACTORS
                add_outer(words, count, P, p, N, sums, at)

        for n in range(start, stop, COLUMNS):
            at = (n - start) * FACTORS
            for i in range(FACTORS):
                f = (j + i) * N + n
                store_scaled(sums, at, call.scale, F, f)
                at += COLUMNS


@jit
def _multiply(call: Any, dtype: Any, start: int, stop: int) -> None:
    """The share of a thread: pairs of rows of P, or pairs of columns."""
    M, N, r = call.M, call.N, call.r
    P = elements(call.P, dtype, 0, M * N)
    T = elements(call.T, dtype, 0, M * r)
    F = elements(call.F, dtype, 0, r * N)

    start, stop = 2 * start, 2 * stop
    if call.product == _PROJECT:
        _project(call, P, T, F, start, stop)
    else:
        first, last = padded(start, COLUMNS), padded(stop, COLUMNS)
        _contract(call, P, T, F, first, last)


def _multiply_bfloat16(address: int, start: int, stop: int) -> None:
    call = carray(pointer(address), 1, _CALL)[0]
    _multiply(call, np.uint16, start, stop)


def _multiply_float32(address: int, start: int, stop: int) -> None:
    call = carray(pointer(address), 1, _CALL)[0]
    _multiply(call, np.uint32, start, stop)


def _run(
    product: int,
    P: Tensor,
    T: Tensor,
    F: Tensor,
    scale: float = 1.0,
) -> None:
    (M, N), r = P.shape, F.shape[0]
    pairs = N // 2 if product == _CONTRACT else M // 2
    addresses = P.data_ptr(), T.data_ptr(), F.data_ptr()
    call = _Call(pairs, 0, product, M, N, r, *addresses, scale)
    kernel = _multiply_float32 if P.dtype == torch.float32 else _multiply_bfloat16
    team.run(kernel, call, pairs, M * N * r // _GRAIN)


def _is_fast(P: Tensor, T: Tensor, F: Tensor) -> bool:
    """Whether the kernels take these matrices, on this processor; PyTorch refuses what is wrong."""
    (M, N), r = P.shape, F.shape[0]
    if T.shape != (M, r) or F.shape != (r, N):
        return False
    if M % 2 or N % COLUMNS or r % FACTORS:
        return False
    for t in (P, T, F):
        if t.dtype != P.dtype or not t.is_cpu:
            return False
    if P.dtype == torch.bfloat16:
        return AVX512_BF16
    return AVX512 and P.dtype == torch.float32


def project(x: Tensor, A: Tensor) -> Tensor:
    """Returns z = x A^T, [.., r]; or u = dy B, from dy and B^T."""
    I, r = x.shape[-1], A.shape[0]
    z = x.new_empty((*x.shape[:-1], r))
    P, T = x.reshape(-1, I), z.view(-1, r)
    if not _is_fast(P, T, A):
        return x @ A.T
    P, F = P.contiguous(), A.contiguous()
    _run(_PROJECT, P, T, F)
    return z


def contract(u: Tensor, x: Tensor, scale: float) -> Tensor:
    """Returns dA = scale u^T x, [r, I], from u [M, r] and x [M, I]; or dB^T, from z and dy."""
    r, I = u.shape[1], x.shape[1]
    F = x.new_empty((r, I))
    if not _is_fast(x, u, F):
        return (u.T @ x).mul_(scale)
    P, T = x.contiguous(), u.contiguous()
    _run(_CONTRACT, P, T, F, scale)
    return F
