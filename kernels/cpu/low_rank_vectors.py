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


class _Code:
    """What the loops are made of, for one intrinsic with arguments of certain types."""

    def __init__(self, b: IRBuilder, arrays: Arrays, vector: VectorType) -> None:
        self.b = b
        self.arrays = arrays
        self.vector = vector

    @contextmanager
    def steps(self, stop: Value, step: int) -> Iterator[Value]:
        """A loop over range(0, stop, step)."""
        start = ir.Constant(stop.type, 0)
        width = ir.Constant(stop.type, step)
        with cgutils.for_range_slice(self.b, start, stop, width) as loop:
            yield loop[0]

    def multiple(self, index: Value, size: int) -> Value:
        return self.b.mul(index, ir.Constant(index.type, size))

    def rows(
        self,
        count: int,
        start: Value,
        last: Value,
        size: Value,
    ) -> list[Value]:
        """Returns where rows of `size` elements start. Beyond the last one, that is repeated."""
        b = self.b
        found = []
        for i in range(count):
            number = ir.Constant(last.type, i)
            is_beyond = b.icmp_signed("<", last, number)
            number = b.select(is_beyond, last, number)
            found.append(b.add(start, b.mul(number, size)))
        return found

    def word(self, which: int, index: Value) -> Value:
        """Returns a word of an array in all places of a vector."""
        b = self.b
        word = self.arrays.load_scalar(which, index)
        everywhere = broadcast(b, b.bitcast(word, F32))
        return b.bitcast(everywhere, self.vector)

    def load_two(self, vector: VectorType, which: int, start: Value) -> list[Value]:
        """Loads a vector, and the one 16 elements of the array behind it."""
        second = add_constant(self.b, start, 16)
        return [self.arrays.load(vector, which, at) for at in (start, second)]

    def load_floats(self, which: int, start: Value) -> list[Value]:
        """Loads 32 numbers in float32, as two vectors."""
        if self.vector == F32x16:
            return self.load_two(F32x16, which, start)

        b = self.b
        found = []
        for half in self.load_two(I16x16, which, start):
            bits = b.zext(half, I32x16)
            bits = b.shl(bits, splat(I32x16, 16))
            found.append(b.bitcast(bits, F32x16))
        return found

    def rounded(self, low: Value, high: Value) -> Value:
        """Returns 32 float32 numbers as bfloat16: to nearest, ties to even."""
        name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
        return call_llvm(self.b, name, high, low, result=I16x32)

    def store_floats(
        self,
        low: Value,
        high: Value,
        which: int,
        start: Value,
    ) -> None:
        """Stores 32 float32 numbers, rounded if the array holds bfloat16."""
        if self.vector == I16x32:
            self.arrays.store(self.rounded(low, high), which, start)
            return
        second = add_constant(self.b, start, 16)
        self.arrays.store(low, which, start)
        self.arrays.store(high, which, second)


def _builder(loops: Any, which: int) -> Any:
    """Makes the code of an intrinsic whose argument number `which` says the dtype."""

    def build(context: Any, b: IRBuilder, signature: Any, args: Any) -> Any:
        arrays = Arrays(context, b, signature, args)
        vector = _vector(signature.args[which])
        loops(_Code(b, arrays, vector), args)
        return context.get_dummy_value()

    return build


def _dots(code: _Code, args: Any) -> None:
    _, p, last, _, f, N, _, t, r = args
    b, arrays = code.b, code.arrays
    ahead = code.multiple(N, _ROWS_AHEAD)
    count = DOT_ROWS * FACTORS
    sums = _Sums(b, count)

    with code.steps(N, code.vector.count) as n:
        x = []
        for row in code.rows(DOT_ROWS, b.add(p, n), last, N):
            x.append(arrays.load(code.vector, 0, row))
            arrays.prefetch(0, b.add(row, ahead))

        at = b.add(f, n)
        for j in range(FACTORS):
            factor = arrays.load(code.vector, 3, at)
            at = b.add(at, N)
            for i in range(DOT_ROWS):
                sums.add_products(i * FACTORS + j, x[i], factor)

    total = sums_of_lanes(b, [sums[k] for k in range(count)])
    if code.vector == I16x32:
        total = code.rounded(total, total)
    for i, row in enumerate(code.rows(DOT_ROWS, t, last, r)):
        first = i * FACTORS
        places = list(range(first, first + FACTORS))
        arrays.store(shuffle(b, total, total, places), 6, row)


def _add_outer(code: _Code, args: Any) -> None:
    _, count, _, p, N, _, target = args
    b, arrays = code.b, code.arrays
    total = _Sums(b, 2 * FACTORS)

    with code.steps(count, 1) as k:
        if code.vector == F32x16:
            row = b.add(p, b.mul(k, N))
            x = code.load_two(F32x16, 2, row)
        else:
            row = b.add(p, b.mul(code.multiple(k, 2), N))
            even = arrays.load(I16x32, 2, row)
            odd = arrays.load(I16x32, 2, b.add(row, N))
            x = [interleave(b, even, odd, half) for half in _HALVES]

        first = code.multiple(k, FACTORS)
        for j in range(FACTORS):
            t = code.word(0, add_constant(b, first, j))
            total.add_products(2 * j, t, x[0])
            total.add_products(2 * j + 1, t, x[1])

    for i in range(2 * FACTORS):
        at = add_constant(b, target, 16 * i)
        before = arrays.load(F32x16, 5, at)
        arrays.store(b.fadd(before, total[i]), 5, at)


def _store_scaled(code: _Code, args: Any) -> None:
    _, source, scale, _, target = args
    b = code.b
    low, high = code.load_two(F32x16, 0, source)
    scale = broadcast(b, scale)
    code.store_floats(b.fmul(scale, low), b.fmul(scale, high), 3, target)


def _add_update(code: _Code, args: Any) -> None:
    _, p, last, _, t, words, _, N, scale = args
    b = code.b
    scale = broadcast(b, scale)

    with code.steps(N, COLUMNS) as n:
        sums = _Sums(b, 2 * UPDATE_ROWS)
        with code.steps(words, _WORDS) as first:
            for w in range(_WORDS):
                k = add_constant(b, first, w)
                at = b.add(b.mul(k, N), n)
                factors = code.load_two(code.vector, 6, at)
                rows_of_T = code.rows(UPDATE_ROWS, t, last, words)
                for i, row in enumerate(rows_of_T):
                    x = code.word(3, b.add(row, k))
                    sums.add_products(2 * i, x, factors[0])
                    sums.add_products(2 * i + 1, x, factors[1])

        # All are read before one is written: a repeated row is updated once.
        rows = code.rows(UPDATE_ROWS, b.add(p, n), last, N)
        before = [code.load_floats(0, row) for row in rows]
        for i, row in enumerate(rows):
            low, high = before[i]
            low = multiply_add(b, scale, sums[2 * i], low)
            high = multiply_add(b, scale, sums[2 * i + 1], high)
            code.store_floats(low, high, 0, row)


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
    kinds = P, p, last, F, f, N, T, t, r
    return types.void(*kinds), _builder(_dots, which=0)


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
    return types.void(*kinds), _builder(_add_outer, which=2)


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
    return types.void(*kinds), _builder(_store_scaled, which=3)


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
    kinds = P, p, last, T, t, words, F, N, scale
    return types.void(*kinds), _builder(_add_update, which=0)
