"""The inner loops of low_rank.py in AVX-512 instructions, as Numba intrinsics.

A register holds 16 words of 32 bits: float32 numbers, or pairs of bfloat16 numbers. One instruction
multiplies two registers and adds to 16 float32 sums the products, two of each pair.

P, T and F are flat arrays of the numbers' bits, uint32 or uint16, and words are uint32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from llvmlite.ir import IRBuilder, Value, VectorType
from numba.core import cgutils, types
from numba.extending import intrinsic

from .vectors import (
    F32,
    Arrays,
    F32x16,
    I16x32,
    I32x16,
    add_constant,
    add_dot,
    broadcast,
    interleave,
    multiply_add,
    rounded_halves,
    shuffle,
    splat,
    sums_of_lanes,
)

# Rows of F, or columns of P in two registers, whose sums fit in the others.
FACTORS = 8
COLUMNS = 32

# Rows of P that share what is loaded of F.
ROWS = 2

# How far before its use a row of P is fetched into the cache: two rows at a time, one after the
# other, are too short for the processor to do so.
_ROWS_AHEAD = 4

# Where the halves of 32 columns are.
_HALVES = (range(16), range(16, 32))


def _vector(array: Any) -> VectorType:
    """The type of 64 bytes of an array."""
    return F32x16 if array.dtype == types.uint32 else I16x32


class _Sums:
    """Vectors of sums, zero at first: variables, which LLVM keeps in registers."""

    def __init__(self, b: IRBuilder, count: int) -> None:
        self.b = b
        self.variables = []
        for _ in range(count):
            variable = cgutils.alloca_once(b, F32x16)
            b.store(splat(F32x16, 0.0), variable)
            self.variables.append(variable)

    def __getitem__(self, i: int) -> Value:
        return self.b.load(self.variables[i])

    def add_products(self, i: int, x: Value, y: Value) -> None:
        """sums[i] += x y, where x and y are vectors of words."""
        b = self.b
        if x.type == F32x16:
            total = multiply_add(b, x, y, self[i])
        else:
            x = b.bitcast(x, I32x16)
            y = b.bitcast(y, I32x16)
            total = add_dot(b, self[i], x, y)
        b.store(total, self.variables[i])


@contextmanager
def _steps(b: IRBuilder, stop: Value, step: int) -> Iterator[Value]:
    """A loop over range(0, stop, step)."""
    start = ir.Constant(stop.type, 0)
    width = ir.Constant(stop.type, step)
    with cgutils.for_range_slice(b, start, stop, width) as loop:
        yield loop[0]


def _times(b: IRBuilder, index: Value, constant: int) -> Value:
    return b.mul(index, ir.Constant(index.type, constant))


def _load_two(arrays: Arrays, which: int, start: Value) -> list[Value]:
    """Loads 32 float32 numbers as two vectors."""
    second = add_constant(arrays.builder, start, 16)
    return [arrays.load(F32x16, which, at) for at in (start, second)]


def _dots(context: Any, b: IRBuilder, signature: Any, args: Any) -> Any:
    arrays = Arrays(context, b, signature, args)
    vector = _vector(signature.args[0])
    _, p, _, f, N, _, t, r = args
    count = ROWS * FACTORS
    sums = _Sums(b, count)

    with _steps(b, N, vector.count) as n:
        row, x = b.add(p, n), []
        for _ in range(ROWS):
            x.append(arrays.load(vector, 0, row))
            ahead = b.add(row, _times(b, N, _ROWS_AHEAD))
            arrays.prefetch(0, ahead)
            row = b.add(row, N)

        row = b.add(f, n)
        for j in range(FACTORS):
            factor = arrays.load(vector, 2, row)
            row = b.add(row, N)
            for i in range(ROWS):
                sums.add_products(i * FACTORS + j, x[i], factor)

    total = sums_of_lanes(b, [sums[k] for k in range(count)])
    if vector == I16x32:
        total = rounded_halves(b, total, total)
    for i in range(ROWS):
        first = i * FACTORS
        places = list(range(first, first + FACTORS))
        of_row = shuffle(b, total, total, places)
        arrays.store(of_row, 5, b.add(t, _times(b, r, i)))
    return context.get_dummy_value()


def _add_outer(context: Any, b: IRBuilder, signature: Any, args: Any) -> Any:
    arrays = Arrays(context, b, signature, args)
    vector = _vector(signature.args[2])
    _, count, _, p, N, _, target = args
    sums = _Sums(b, 2 * FACTORS)

    with _steps(b, count, 1) as k:
        if vector == F32x16:
            row = b.add(p, b.mul(k, N))
            x = _load_two(arrays, 2, row)
        else:
            row = b.add(p, b.mul(_times(b, k, 2), N))
            even = arrays.load(I16x32, 2, row)
            odd = arrays.load(I16x32, 2, b.add(row, N))
            x = [interleave(b, even, odd, half) for half in _HALVES]

        first = _times(b, k, FACTORS)
        for j in range(FACTORS):
            word = arrays.load_scalar(0, add_constant(b, first, j))
            word = broadcast(b, b.bitcast(word, F32))
            word = b.bitcast(word, vector)
            sums.add_products(2 * j, word, x[0])
            sums.add_products(2 * j + 1, word, x[1])

    for i in range(2 * FACTORS):
        at = add_constant(b, target, 16 * i)
        before = arrays.load(F32x16, 5, at)
        arrays.store(b.fadd(before, sums[i]), 5, at)
    return context.get_dummy_value()


def _store_scaled(context: Any, b: IRBuilder, signature: Any, args: Any) -> Any:
    arrays = Arrays(context, b, signature, args)
    _, source, scale, _, target = args
    scale = broadcast(b, scale)
    low, high = (b.fmul(scale, x) for x in _load_two(arrays, 0, source))

    if _vector(signature.args[3]) == I16x32:
        arrays.store(rounded_halves(b, low, high), 3, target)
    else:
        second = add_constant(b, target, 16)
        arrays.store(low, 3, target)
        arrays.store(high, 3, second)
    return context.get_dummy_value()


@intrinsic  # type: ignore[untyped-decorator]
def dots(
    typing: Any,
    P: Any,
    p: Any,
    F: Any,
    f: Any,
    N: Any,
    T: Any,
    t: Any,
    r: Any,
) -> Any:
    """T[t + i r + j] = P[p + i N : p + (i + 1) N] . F[f + j N : f + (j + 1) N]

    for two rows i of P and eight rows j of F.
    """
    kinds = P, p, F, f, N, T, t, r
    return types.void(*kinds), _dots


@intrinsic  # type: ignore[untyped-decorator]
def add_outer(
    typing: Any,
    T: Any,
    count: Any,
    P: Any,
    p: Any,
    N: Any,
    sums: Any,
    target: Any,
) -> Any:
    """sums[target + 32 j + n] += the sum over rows m of T[m, j] P[p + m N + n]

    for 32 columns n of P and eight columns j of T, which is given as words [count, 8]: T[k, j], or
    in bfloat16 T[2 k, j] and T[2 k + 1, j].
    """
    kinds = T, count, P, p, N, sums, target
    return types.void(*kinds), _add_outer


@intrinsic  # type: ignore[untyped-decorator]
def store_scaled(
    typing: Any,
    sums: Any,
    source: Any,
    scale: Any,
    F: Any,
    target: Any,
) -> Any:
    """F[target : target + 32] = scale * sums[source : source + 32], rounded to the dtype of F."""
    kinds = sums, source, scale, F, target
    return types.void(*kinds), _store_scaled
