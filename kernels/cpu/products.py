r"""Small products of matrices that lie in cache, as a Numba intrinsic: C += A B.

BLAS reads matrices of numbers and rounds its result to their dtype. Between two products of the
attention stands a softmax in float32, on a block that has just been computed: here the factors are
*words* of 32 bits, one float32 number or two bfloat16 numbers, and C is float32.

    words of two:   C[r, i] += sum_k  A[r, 2k] B[2k, i] + A[r, 2k + 1] B[2k + 1, i]
    words of one:   C[r, i] += sum_k  A[r, k] B[k, i]

One call computes 8 rows and 32 columns of C, whose 16 registers are independent sums: enough to
hide that each addition takes several cycles.
"""

from typing import Any

from llvmlite import ir
from llvmlite.ir import IRBuilder, Value
from numba.core import cgutils, types
from numba.extending import intrinsic

from .runtime import jit
from .vectors import (
    F32,
    Arrays,
    F32x16,
    I32x16,
    add_constant,
    add_dot,
    broadcast,
    interleave,
    multiply_add,
)

# Of C, in one call of the intrinsic: rows, and registers of 16 columns.
_ROWS = 8
_REGISTERS = 2

COLUMNS = 16 * _REGISTERS


def _add_product(
    context: Any,
    b: IRBuilder,
    signature: Any,
    args: Any,
) -> Any:
    arrays = Arrays(context, b, signature, args)
    numbers = signature.args[0].literal_value
    _, _, a, a_row, a_step, _, first, width, steps, _, c = args

    # sums[r, v]: the registers, and where in C they belong.
    tile = [(r, v) for r in range(_ROWS) for v in range(_REGISTERS)]
    places = {(r, v): _at(b, c, width, r, 16 * v) for r, v in tile}
    sums = {at: cgutils.alloca_once(b, F32x16) for at in tile}
    for at in tile:
        b.store(arrays.load(F32x16, 9, places[at]), sums[at])

    with cgutils.for_range(b, steps) as loop:
        k = loop.index
        row_of_B = b.add(first, b.mul(k, width))
        column_of_A = b.add(a, b.mul(k, a_step))
        right = []
        for v in range(_REGISTERS):
            word = add_constant(b, row_of_B, 16 * v)
            right.append(arrays.load(I32x16, 5, word))

        for r in range(_ROWS):
            word = _at(b, column_of_A, a_row, r, 0)
            left = b.bitcast(arrays.load_scalar(1, word), F32)
            left = broadcast(b, left)
            for v in range(_REGISTERS):
                total = b.load(sums[r, v])
                total = _multiply(b, numbers, left, right[v], total)
                b.store(total, sums[r, v])

    for at in tile:
        arrays.store(b.load(sums[at]), 9, places[at])
    return context.get_dummy_value()


def _at(
    b: IRBuilder,
    first: Value,
    stride: Value,
    row: int,
    column: int,
) -> Value:
    """Returns the index first + row stride + column."""
    rows = b.mul(ir.Constant(first.type, row), stride)
    return add_constant(b, b.add(first, rows), column)


def _multiply(
    b: IRBuilder,
    numbers: int,
    left: Value,
    right: Value,
    total: Value,
) -> Value:
    if numbers == 2:
        return add_dot(b, total, b.bitcast(left, I32x16), right)
    return multiply_add(b, left, b.bitcast(right, F32x16), total)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _add_block(
    typing: Any,
    numbers: Any,
    A: Any,
    a: Any,
    a_row: Any,
    a_step: Any,
    B: Any,
    b: Any,
    width: Any,
    steps: Any,
    C: Any,
    c: Any,
) -> Any:
    """C[c + r width + i] += sum_k A[a + r a_row + k a_step] B[b + k width + i]; r < 8, i < 32."""
    kinds = numbers, A, a, a_row, a_step, B, b, width, steps, C, c
    return types.void(*kinds), _add_product


@jit
def add_product(
    numbers: int,
    A: Any,
    B: Any,
    C: Any,
    rows: int,
    steps: int,
    columns: int,
) -> None:
    """C [rows, columns] += A [rows, steps] B [steps, columns] of words with 1 or 2 numbers each.

    rows is a multiple of 8, columns of 32.
    """
    _add(numbers, A, steps, 1, B, C, rows, steps, columns)


@jit
def add_transposed_product(
    numbers: int,
    A: Any,
    B: Any,
    C: Any,
    rows: int,
    steps: int,
    columns: int,
) -> None:
    """C [rows, columns] += A^T B, as `add_product` with A [steps, rows]."""
    _add(numbers, A, 1, rows, B, C, rows, steps, columns)


@jit
def _add(
    numbers: int,
    A: Any,
    a_row: int,
    a_step: int,
    B: Any,
    C: Any,
    rows: int,
    steps: int,
    columns: int,
) -> None:
    for i in range(0, columns, COLUMNS):
        for r in range(0, rows, _ROWS):
            a, c = r * a_row, r * columns + i
            # The number is a constant where LLVM compiles.
            if numbers == 2:
                _add_block(2, A, a, a_row, a_step, B, i, columns, steps, C, c)
            else:
                _add_block(1, A, a, a_row, a_step, B, i, columns, steps, C, c)


def _transpose(
    context: Any,
    b: IRBuilder,
    signature: Any,
    args: Any,
) -> Any:
    arrays = Arrays(context, b, signature, args)
    _, source, source_row, _, target, target_row = args
    starts = [_at(b, source, source_row, r, 0) for r in range(16)]
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
        start = _at(b, target, target_row, r, 0)
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
