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
    I16x16,
    I16x32,
    I32x16,
    add_constant,
    add_dot,
    broadcast,
    call_llvm,
    interleave,
    multiply_add,
    shuffle,
    splat,
    sums_of_lanes,
)

# Rows of F, or columns of P in two registers, whose sums fit in the others.
FACTORS = 8
COLUMNS = 32

# Rows of P that share what is loaded of F: for a sum per factor, and for one per column.
DOT_ROWS = 2
UPDATE_ROWS = 4

# How far before its use a row of P is fetched into the cache: two rows at a time, one after the
# other, are too short for the processor to do so.
_ROWS_AHEAD = 4

# Words of T between two branches.
_WORDS = 4


def _vector(array: Any) -> VectorType:
    """The type of 64 bytes of an array."""
    return F32x16 if array.dtype == types.uint32 else I16x32


class _Sums:
    """Vectors of sums, zero at first: variables, which LLVM keeps in registers."""

    def __init__(self, b: IRBuilder, count: int) -> None:
        self.b = b
        zero = splat(F32x16, 0.0)
        self.variables = [cgutils.alloca_once(b, F32x16) for _ in range(count)]
        for variable in self.variables:
            b.store(zero, variable)

    def __getitem__(self, i: int) -> Value:
        return self.b.load(self.variables[i])

    def add_products(self, i: int, x: Value, y: Value) -> None:
        """sums[i] += x y, where x and y are vectors of words."""
        b = self.b
        if x.type == F32x16:
            total = multiply_add(b, x, y, self[i])
        else:
            x, y = b.bitcast(x, I32x16), b.bitcast(y, I32x16)
            total = add_dot(b, self[i], x, y)
        b.store(total, self.variables[i])


@contextmanager
def _steps(b: IRBuilder, stop: Value, step: int) -> Iterator[Value]:
    """A loop over range(0, stop, step)."""
    start, width = (ir.Constant(stop.type, value) for value in (0, step))
    with cgutils.for_range_slice(b, start, stop, width) as (index, _):
        yield index


def _row(b: IRBuilder, start: Value, i: int, last: Value, size: Value) -> Value:
    """Returns where row i of `size` elements starts. Beyond the last row, that one is repeated."""
    number = ir.Constant(last.type, i)
    is_beyond = b.icmp_signed("<", last, number)
    number = b.select(is_beyond, last, number)
    return b.add(start, b.mul(number, size))


def _broadcast(arrays: Arrays, vector: VectorType, which: int, index: Value) -> Value:
    """Returns a word of an array in all places of a vector."""
    b = arrays.builder
    word = arrays.load_scalar(which, index)
    return b.bitcast(broadcast(b, b.bitcast(word, F32)), vector)


def _load_two(arrays: Arrays, vector: VectorType, which: int, start: Value) -> list[Value]:
    """Loads a vector, and another one 16 elements of the array behind it."""
    second = add_constant(arrays.builder, start, 16)
    return [arrays.load(vector, which, at) for at in (start, second)]


def _load_floats(arrays: Arrays, vector: VectorType, start: Value) -> list[Value]:
    """Returns 32 elements of P in float32, as two vectors."""
    if vector == F32x16:
        return _load_two(arrays, F32x16, 0, start)

    b = arrays.builder
    bits = [b.zext(half, I32x16) for half in _load_two(arrays, I16x16, 0, start)]
    bits = [b.shl(half, splat(I32x16, 16)) for half in bits]
    return [b.bitcast(half, F32x16) for half in bits]


def _rounded(b: IRBuilder, low: Value, high: Value) -> Value:
    """Returns 32 float32 numbers as bfloat16: to nearest, ties to even."""
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    return call_llvm(b, name, high, low, result=I16x32)


def _store_floats(
    arrays: Arrays,
    vector: VectorType,
    which: int,
    start: Value,
    low: Value,
    high: Value,
) -> None:
    """Stores 32 float32 numbers, rounded if the array holds bfloat16."""
    b = arrays.builder
    if vector == I16x32:
        arrays.store(_rounded(b, low, high), which, start)
    else:
        arrays.store(low, which, start)
        arrays.store(high, which, add_constant(b, start, 16))


def _dots(context: Any, b: IRBuilder, signature: Any, args: Any) -> Any:
    arrays = Arrays(context, b, signature, args)
    _, p, last, _, f, N, _, t, r = args
    vector = _vector(signature.args[0])
    ahead = b.mul(N, ir.Constant(N.type, _ROWS_AHEAD))
    sums = _Sums(b, DOT_ROWS * FACTORS)

    with _steps(b, N, vector.count) as n:
        rows = [_row(b, b.add(p, n), i, last, N) for i in range(DOT_ROWS)]
        x = [arrays.load(vector, 0, row) for row in rows]
        for row in rows:
            arrays.prefetch(0, b.add(row, ahead))
        at = b.add(f, n)
        for j in range(FACTORS):
            factor = arrays.load(vector, 3, at)
            for i in range(DOT_ROWS):
                sums.add_products(i * FACTORS + j, x[i], factor)
            at = b.add(at, N)

    total = sums_of_lanes(b, [sums[k] for k in range(DOT_ROWS * FACTORS)])
    if vector == I16x32:
        total = _rounded(b, total, total)
    for i in range(DOT_ROWS):
        first = i * FACTORS
        of_row = list(range(first, first + FACTORS))
        of_row = shuffle(b, total, total, of_row)
        arrays.store(of_row, 6, _row(b, t, i, last, r))
    return context.get_dummy_value()


def _add_outer(context: Any, b: IRBuilder, signature: Any, args: Any) -> Any:
    arrays = Arrays(context, b, signature, args)
    _, count, _, p, N, _, target = args
    vector = _vector(signature.args[2])
    sums = _Sums(b, 2 * FACTORS)

    with _steps(b, count, 1) as k:
        if vector == F32x16:
            start = b.add(p, b.mul(k, N))
            x = _load_two(arrays, vector, 2, start)
        else:
            start = b.add(p, b.mul(k, b.add(N, N)))
            even, odd = (arrays.load(vector, 2, row) for row in (start, b.add(start, N)))
            x = [interleave(b, even, odd, range(half, half + 16)) for half in (0, 16)]

        first = b.mul(k, ir.Constant(k.type, FACTORS))
        for j in range(FACTORS):
            t = _broadcast(arrays, vector, 0, add_constant(b, first, j))
            sums.add_products(2 * j, t, x[0])
            sums.add_products(2 * j + 1, t, x[1])

    for i in range(2 * FACTORS):
        at = add_constant(b, target, 16 * i)
        total = b.fadd(arrays.load(F32x16, 5, at), sums[i])
        arrays.store(total, 5, at)
    return context.get_dummy_value()


def _store_scaled(context: Any, b: IRBuilder, signature: Any, args: Any) -> Any:
    arrays = Arrays(context, b, signature, args)
    _, source, scale, _, target = args
    vector = _vector(signature.args[3])
    scale = broadcast(b, scale)
    low, high = (b.fmul(scale, x) for x in _load_two(arrays, F32x16, 0, source))
    _store_floats(arrays, vector, 3, target, low, high)
    return context.get_dummy_value()


def _add_update(context: Any, b: IRBuilder, signature: Any, args: Any) -> Any:
    arrays = Arrays(context, b, signature, args)
    _, p, last, _, t, words, _, N, scale = args
    vector = _vector(signature.args[0])
    scale = broadcast(b, scale)

    with _steps(b, N, COLUMNS) as n:
        sums = _Sums(b, 2 * UPDATE_ROWS)
        with _steps(b, words, _WORDS) as first:
            for w in range(_WORDS):
                k = add_constant(b, first, w)
                row_of_F = b.add(b.mul(k, N), n)
                factors = _load_two(arrays, vector, 6, row_of_F)
                for i in range(UPDATE_ROWS):
                    row_of_T = _row(b, t, i, last, words)
                    x = _broadcast(arrays, vector, 3, b.add(row_of_T, k))
                    sums.add_products(2 * i, x, factors[0])
                    sums.add_products(2 * i + 1, x, factors[1])

        # All are read before one is written: a repeated row is updated once.
        rows = [_row(b, b.add(p, n), i, last, N) for i in range(UPDATE_ROWS)]
        before = [_load_floats(arrays, vector, row) for row in rows]
        for i, row in enumerate(rows):
            low = multiply_add(b, scale, sums[2 * i], before[i][0])
            high = multiply_add(b, scale, sums[2 * i + 1], before[i][1])
            _store_floats(arrays, vector, 0, row, low, high)
    return context.get_dummy_value()


@intrinsic  # type: ignore[untyped-decorator]
def dots(
    typing: Any,
    P: Any,
    p: Any,
    last: Any,
    F: Any,
    f: Any,
    N: Any,
    T: Any,
    t: Any,
    r: Any,
) -> Any:
    """T[t + i r + j] = P[p + i N : p + (i + 1) N] . F[f + j N : f + (j + 1) N]

    for two rows i of P, or one if last = 0, and eight rows j of F.
    """
    return types.void(P, p, last, F, f, N, T, t, r), _dots


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
    return types.void(T, count, P, p, N, sums, target), _add_outer


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
    return types.void(sums, source, scale, F, target), _store_scaled


@intrinsic  # type: ignore[untyped-decorator]
def add_update(
    typing: Any,
    P: Any,
    p: Any,
    last: Any,
    T: Any,
    t: Any,
    words: Any,
    F: Any,
    N: Any,
    scale: Any,
) -> Any:
    """P[p + i N + n] += scale * (T[i] . F[:, n]) for N columns n and rows i <= min(3, last) of P.

    T and F are given as words: rows of T from T[t], and F [words, N], which holds F[k, n], or in
    bfloat16 F[2 k, n] and F[2 k + 1, n].
    """
    return types.void(P, p, last, T, t, words, F, N, scale), _add_update
