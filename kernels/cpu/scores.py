"""One block of scores, of 64 keys and 64 queries, in float32: see attention.py.

A row belongs to a key, a column to a query: what a query needs is a vector over the columns.
"""

from typing import Any

import numpy as np
from numba import carray

from .exponential import exp_of_negative
from .products import add_product
from .runtime import jit
from .team import pointer
from .words import BLOCK, clear

_MINUS_INFINITY = np.float32(-np.inf)

# The maximum of no scores. Not -inf: the exponential of -inf - -inf is NaN, not 0.
LOWEST = np.finfo(np.float32).min


@jit
def _mask(call: Any, b: int) -> Any:
    """Returns one sequence's mask, [J, L]."""
    address = call.mask + b * call.mask_batch
    return carray(pointer(address), call.J * call.L, np.uint8)


@jit
def is_used(
    call: Any,
    b: int,
    j: int,
    i: int,
) -> bool:
    """Whether any of the 64 queries from i on attends to any of the 64 keys from j on."""
    if call.causal:
        return j < i + BLOCK
    if call.mask == 0:
        return True
    mask = _mask(call, b)
    used = np.uint8(0)
    for key in range(j, min(j + BLOCK, call.J)):
        for query in range(i, min(i + BLOCK, call.L)):
            used |= mask[key * call.L + query]
    return bool(used)


@jit
def multiply_block(
    words: int,
    numbers: int,
    keys: Any,
    queries: Any,
    out: Any,
) -> None:
    """out = the products of 64 keys' rows with 64 queries' columns."""
    clear(out)
    add_product(numbers, keys, queries, out, BLOCK, words, BLOCK)


@jit
def scale_and_mask(
    call: Any,
    b: int,
    j: int,
    i: int,
    S: Any,
) -> None:
    """S = scale S, and -inf where a query does not attend to a key."""
    for n in range(np.uint64(S.size)):
        S[n] *= call.scale

    for key in range(j, j + BLOCK):
        first = (key - j) * BLOCK
        row = S[first : first + BLOCK]
        if key >= call.J:
            row[:] = _MINUS_INFINITY
        elif call.causal:
            # Query i attends to the keys up to number i.
            row[: max(0, min(BLOCK, key - i))] = _MINUS_INFINITY
        elif call.mask:
            mask = _mask(call, b)
            for n in range(min(BLOCK, call.L - i)):
                if not mask[key * call.L + i + n]:
                    row[n] = _MINUS_INFINITY


@jit
def exponentials(
    S: Any,
    maximum: Any,
    total: Any,
    scaling: Any,
) -> None:
    """S = exp(S - maximum of the query so far), and adds it to the query's total.

    What was summed before with a smaller maximum is to be multiplied by `scaling`.
    """
    for n in range(np.uint64(BLOCK)):
        scaling[n] = maximum[n]
    for j in range(BLOCK):
        row = S[j * BLOCK : (j + 1) * BLOCK]
        for n in range(np.uint64(BLOCK)):
            maximum[n] = max(maximum[n], row[n])

    for n in range(np.uint64(BLOCK)):
        scaling[n] = exp_of_negative(scaling[n] - maximum[n])
        total[n] *= scaling[n]
    for j in range(BLOCK):
        row = S[j * BLOCK : (j + 1) * BLOCK]
        for n in range(np.uint64(BLOCK)):
            row[n] = exp_of_negative(row[n] - maximum[n])
            total[n] += row[n]


@jit
def scale_columns(x: Any, scaling: Any) -> None:
    """x [.., 64] *= scaling [64]."""
    for first in range(0, x.size, BLOCK):
        row = x[first : first + BLOCK]
        for n in range(np.uint64(BLOCK)):
            row[n] *= scaling[n]


@jit
def add_scaled(scale: Any, x: Any, out: Any) -> None:
    """out[: x.size] += scale x."""
    for n in range(np.uint64(x.size)):
        out[n] += scale * x[n]


@jit
def softmax_backward(
    P: Any,
    dS: Any,
    lse: Any,
    delta: Any,
) -> None:
    """P = exp(S - lse) for the scores in P, and dS = P * (dP - delta) for the dP in dS."""
    for first in range(0, P.size, BLOCK):
        p = P[first : first + BLOCK]
        ds = dS[first : first + BLOCK]
        for n in range(np.uint64(BLOCK)):
            p[n] = exp_of_negative(p[n] - lse[n])
            ds[n] = p[n] * (ds[n] - delta[n])
