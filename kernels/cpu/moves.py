"""Words that change places in memory, as Numba intrinsics."""

from typing import Any

from llvmlite.ir import IRBuilder
from numba.core import cgutils, types
from numba.extending import intrinsic

from .vectors import Arrays, I16x32, I32x16, add_constant, at_row, interleave

_HALVES = (range(16), range(16, 32))


def _transpose(
    context: Any,
    b: IRBuilder,
    signature: Any,
    args: Any,
) -> Any:
    arrays = Arrays(context, b, signature, args)
    _, source, source_row, _, target, target_row = args
    starts = [at_row(b, source, source_row, r, 0) for r in range(16)]
    rows = [arrays.load(I32x16, 0, start) for start in starts]

    # Interleaving row i with row i + 8 rotates the bits of (row, column) by one: after four times,
    # rows and columns have changed places.
    low, high = range(8), range(8, 16)
    for _ in range(4):
        pairs = zip(rows[:8], rows[8:], strict=True)
        rows = []
        for p, q in pairs:
            rows += [interleave(b, p, q, low), interleave(b, p, q, high)]

    for r, row in enumerate(rows):
        start = at_row(b, target, target_row, r, 0)
        arrays.store(row, 3, start)
    return context.get_dummy_value()


@intrinsic  # type: ignore[untyped-decorator]
def transpose_16(
    typing: Any,
    A: Any,
    a: Any,
    a_row: Any,
    B: Any,
    b: Any,
    b_row: Any,
) -> Any:
    """B[b + i b_row + r] = A[a + r a_row + i] for r, i < 16: arrays of 32-bit elements."""
    return types.void(A, a, a_row, B, b, b_row), _transpose


def _pair(
    context: Any,
    b: IRBuilder,
    signature: Any,
    args: Any,
) -> Any:
    arrays = Arrays(context, b, signature, args)
    _, low, high, _, target = args
    if signature.args[0].dtype == types.uint16:
        first, second = (arrays.load(I16x32, 0, start) for start in (low, high))
        words = [b.bitcast(interleave(b, first, second, half), I32x16) for half in _HALVES]
    else:
        places = (low, add_constant(b, low, 16))
        words = [arrays.load(I32x16, 0, place) for place in places]
    arrays.store(words[0], 3, target)
    arrays.store(words[1], 3, add_constant(b, target, 16))
    return context.get_dummy_value()


@intrinsic  # type: ignore[untyped-decorator]
def pair_rows(
    typing: Any,
    x: Any,
    low: Any,
    high: Any,
    out: Any,
    target: Any,
) -> Any:
    """out[target + i] = the word (x[low + i], x[high + i]) for i < 32; of float32, x[low + i]."""
    return types.void(x, low, high, out, target), _pair


def _copy(
    context: Any,
    b: IRBuilder,
    signature: Any,
    args: Any,
) -> Any:
    arrays = Arrays(context, b, signature, args)
    _, first, _, target, count = args
    itemsize = signature.args[0].dtype.bitwidth // 8
    ends = arrays.pointer(2, target), arrays.pointer(0, first)
    cgutils.raw_memcpy(b, *ends, count, itemsize)
    return context.get_dummy_value()


@intrinsic  # type: ignore[untyped-decorator]
def copy(
    typing: Any,
    x: Any,
    first: Any,
    out: Any,
    target: Any,
    count: Any,
) -> Any:
    """out[target : target + count] = x[first : first + count], of one dtype."""
    return types.void(x, first, out, target, count), _copy


def _prefetch(
    context: Any,
    b: IRBuilder,
    signature: Any,
    args: Any,
) -> Any:
    arrays = Arrays(context, b, signature, args)
    arrays.prefetch(0, args[1], to_write=True)
    return context.get_dummy_value()


@intrinsic  # type: ignore[untyped-decorator]
def prefetch_to_write(typing: Any, A: Any, a: Any) -> Any:
    """Asks for the cache line of A[a], which will be written soon."""
    return types.void(A, a), _prefetch
