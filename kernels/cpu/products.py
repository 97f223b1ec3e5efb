r"""Small products of matrices that lie in cache, as a Numba intrinsic: C += A B.

BLAS reads matrices of numbers and rounds its result to their dtype. Between two products of the
attention stands a softmax in float32, on a block that has just been computed: here the factors are
*words* of 32 bits, one float32 number or two bfloat16 numbers, and C is float32.

    words of two:   C[r, i] += sum_k  A[r, 2k] B[2k, i] + A[r, 2k + 1] B[2k + 1, i]
    words of one:   C[r, i] += sum_k  A[r, k] B[k, i]

One call computes 8 rows and 32 columns of C, whose 16 registers are independent sums: enough to
hide that each addition takes several cycles. The product is summed by itself and then added to C.

many_rows.py multiplies by panels of a weight in the same way, and `store_sum_of_products` adds the
low-rank term before it rounds.
"""

from typing import Any

from llvmlite import ir
from llvmlite.ir import IRBuilder, Value
from numba.core import cgutils, types
from numba.extending import intrinsic

from .runtime import jit, jit_inlined
from .vectors import (
    F32,
    Arrays,
    F32x16,
    I32x16,
    add_constant,
    add_dot,
    at_row,
    broadcast,
    multiply_add,
    rounded_halves,
    splat,
)

# Of C, in one call of the intrinsic: rows, and registers of 16 columns.
ROWS = 8
_REGISTERS = 2

COLUMNS = 16 * _REGISTERS


class _Tile:
    """Sums of 8 rows and 32 columns, in registers: variables, which LLVM keeps there."""

    def __init__(self, b: IRBuilder) -> None:
        self.b = b
        self._places = [(r, v) for r in range(ROWS) for v in range(_REGISTERS)]
        self._sums = {place: cgutils.alloca_once(b, F32x16) for place in self._places}
        for place in self._places:
            b.store(splat(F32x16, 0.0), self._sums[place])

    def add_product(
        self,
        numbers: int,
        arrays: Arrays,
        A: int,
        rows_of_A: tuple[Value, Value, Value],
        B: int,
        rows_of_B: tuple[Value, Value, Value],
    ) -> None:
        """sums[r, i] += sum_k A[a + r a_row + k a_step] B[b + k width + i] for k < steps.

        A and B are positions of arguments; rows_of_A is (a, a_row, a_step), rows_of_B (b, width,
        steps).
        """
        b = self.b
        a, a_row, a_step = rows_of_A
        first, width, steps = rows_of_B
        with cgutils.for_range(b, steps) as loop:
            k = loop.index
            row_of_B = b.add(first, b.mul(k, width))
            column_of_A = b.add(a, b.mul(k, a_step))
            right = []
            for v in range(_REGISTERS):
                word = add_constant(b, row_of_B, 16 * v)
                right.append(arrays.load(I32x16, B, word))

            for r in range(ROWS):
                word = at_row(b, column_of_A, a_row, r, 0)
                left = b.bitcast(arrays.load_scalar(A, word), F32)
                left = broadcast(b, left)
                for v in range(_REGISTERS):
                    total = b.load(self._sums[r, v])
                    total = _multiply(b, numbers, left, right[v], total)
                    b.store(total, self._sums[r, v])

    def scale(self, scale: Value) -> None:
        b, factor = self.b, broadcast(self.b, scale)
        for variable in self._sums.values():
            b.store(b.fmul(factor, b.load(variable)), variable)

    def add_memory(
        self,
        arrays: Arrays,
        C: int,
        c: Value,
        width: Value,
    ) -> None:
        """sums[r, i] += C[c + r width + i]."""
        b = self.b
        for r, v in self._places:
            at = at_row(b, c, width, r, 16 * v)
            total = b.fadd(arrays.load(F32x16, C, at), b.load(self._sums[r, v]))
            b.store(total, self._sums[r, v])

    def rows(self) -> list[list[Value]]:
        """The sums: for each row, its registers."""
        b = self.b
        return [[b.load(self._sums[r, v]) for v in range(_REGISTERS)] for r in range(ROWS)]


def _add_product(
    context: Any,
    b: IRBuilder,
    signature: Any,
    args: Any,
) -> Any:
    arrays = Arrays(context, b, signature, args)
    numbers = signature.args[0].literal_value
    _, _, a, a_row, a_step, _, first, width, steps, _, c = args

    tile = _Tile(b)
    tile.add_product(numbers, arrays, 1, (a, a_row, a_step), 5, (first, width, steps))
    tile.add_memory(arrays, 9, c, width)
    for r, row in enumerate(tile.rows()):
        for v, sums in enumerate(row):
            at = at_row(b, c, width, r, 16 * v)
            arrays.store(sums, 9, at)
    return context.get_dummy_value()


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


@jit_inlined
def _add_tile(
    numbers: int,
    A: Any,
    a: int,
    a_row: int,
    a_step: int,
    B: Any,
    b: int,
    width: int,
    steps: int,
    C: Any,
    c: int,
) -> None:
    """As `_add_block`: the number is a constant where LLVM compiles."""
    if numbers == 2:
        _add_block(2, A, a, a_row, a_step, B, b, width, steps, C, c)
    else:
        _add_block(1, A, a, a_row, a_step, B, b, width, steps, C, c)


@jit_inlined
def add_tile(
    numbers: int,
    A: Any,
    a: int,
    a_row: int,
    B: Any,
    b: int,
    steps: int,
    C: Any,
) -> None:
    """C [8, 32] += A B. Row r of A [8, steps] begins at a + r a_row, B [steps, 32] at b."""
    _add_tile(numbers, A, a, a_row, 1, B, b, COLUMNS, steps, C, 0)


# The arrays of `store_sum_of_products`.
_T, _F, _L, _R, _C, _Y = range(6)


def _store_sum(
    context: Any,
    b: IRBuilder,
    signature: Any,
    args: Any,
) -> Any:
    scale, operands, sizes = args
    operands, sizes = (cgutils.unpack_tuple(b, held) for held in (operands, sizes))
    kinds = signature.args[1]
    arrays = Arrays(context, b, types.void(*kinds), operands)
    t, r_steps, l, l_row, p, steps, y, y_row = sizes
    numbers = 4 * 8 // kinds[_Y].dtype.bitwidth
    width, zero, one = (ir.Constant(y.type, value) for value in (COLUMNS, 0, 1))

    tile = _Tile(b)
    tile.add_product(numbers, arrays, _T, (t, r_steps, one), _F, (zero, width, r_steps))
    tile.scale(scale)
    tile.add_product(numbers, arrays, _L, (l, l_row, one), _R, (p, width, steps))
    tile.add_memory(arrays, _C, zero, width)
    for r, (low, high) in enumerate(tile.rows()):
        at = at_row(b, y, y_row, r, 0)
        if numbers == 2:
            arrays.store(rounded_halves(b, low, high), _Y, at)
        else:
            arrays.store(low, _Y, at)
            arrays.store(high, _Y, add_constant(b, at, 16))
    return context.get_dummy_value()


@intrinsic  # type: ignore[untyped-decorator]
def store_sum_of_products(typing: Any, scale: Any, arrays: Any, sizes: Any) -> Any:
    """Y = L R + scale T F + C for 8 rows and 32 columns, rounded to the dtype of Y.

    arrays: (T, F, L, R, C, Y), words but for C [8, 32], float32, and Y, bits
    sizes: (t, r_steps, l, l_row, p, steps, y, y_row): T [8, r_steps] begins at t, row i of L
        [8, steps] at l + i l_row, R [steps, 32] at p, row i of Y at y + i y_row
    """
    return types.void(scale, arrays, sizes), _store_sum


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
        for r in range(0, rows, ROWS):
            a, c = r * a_row, r * columns + i
            _add_tile(numbers, A, a, a_row, a_step, B, i, columns, steps, C, c)
