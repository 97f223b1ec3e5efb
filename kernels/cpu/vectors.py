"""Vectors of 512 bits in the LLVM IR of a Numba intrinsic: values, memory, single instructions.

Numba has no vectors. An intrinsic is a function whose IR is built by hand, with these functions;
`add_dot` and `permute` are AVX-512 instructions, everything else is IR for any processor.
"""

from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from llvmlite.ir import IRBuilder, Value, VectorType
from numba.core import cgutils

I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
F32 = ir.FloatType()
I8x16 = VectorType(I8, 16)
I8x32 = VectorType(I8, 32)
I16x16 = VectorType(I16, 16)
I16x32 = VectorType(I16, 32)
I32x16 = VectorType(I32, 16)
F32x16 = VectorType(F32, 16)


# Arguments of LLVM's prefetch.
_KEEP, _DATA = 3, 1


def splat(vector: VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def add_constant(b: IRBuilder, index: Value, constant: int) -> Value:
    return b.add(index, ir.Constant(index.type, constant))


def at_row(
    b: IRBuilder,
    first: Value,
    stride: Value,
    row: int,
    column: int,
) -> Value:
    """Returns the index first + row stride + column."""
    rows = b.mul(ir.Constant(first.type, row), stride)
    return add_constant(b, b.add(first, rows), column)


def shift_right(b: IRBuilder, vector: Value, bits: int) -> Value:
    """Returns every lane of an integer vector, shifted and filled with zeros."""
    return b.lshr(vector, splat(vector.type, bits))


def shuffle(
    b: IRBuilder,
    first: Value,
    second: Value,
    lanes: list[int],
) -> Value:
    """Returns lanes of the concatenation (first, second), chosen at compile time."""
    mask = VectorType(I32, len(lanes))
    return b.shuffle_vector(first, second, ir.Constant(mask, lanes))


def interleave(
    b: IRBuilder,
    first: Value,
    second: Value,
    positions: Iterable[int],
) -> Value:
    """Returns first[i], second[i] for each position i in turn."""
    width = first.type.count
    lanes: list[int] = []

    for i in positions:
        lanes += [i, width + i]
    return shuffle(b, first, second, lanes)


def broadcast(b: IRBuilder, scalar: Value) -> Value:
    """Returns a float32 in all 16 lanes."""
    nothing = ir.Constant(F32x16, ir.Undefined)
    lane = ir.Constant(I32, 0)
    one = b.insert_element(nothing, scalar, lane)
    return shuffle(b, one, one, [0] * 16)


def call_llvm(b: IRBuilder, name: str, *operands: Value, result: Any = None) -> Value:
    """Calls an LLVM intrinsic; its result has the type of its first operand unless given."""
    kinds = [operand.type for operand in operands]
    signature = ir.FunctionType(result or kinds[0], kinds)
    function = cgutils.get_or_insert_function(b.module, signature, name)
    return b.call(function, operands)


def permute(b: IRBuilder, table: Value, codes: Value) -> Value:
    """Returns table[codes], lane by lane. Bits of a code above the table's size are ignored."""
    kind = "sf" if table.type == F32x16 else "hi"
    return call_llvm(b, f"llvm.x86.avx512.permvar.{kind}.512", table, codes)


def multiply_add(b: IRBuilder, x: Value, y: Value, z: Value) -> Value:
    """Returns x * y + z, rounded once."""
    return call_llvm(b, "llvm.fma.v16f32", x, y, z)


def add_dot(b: IRBuilder, sums: Value, x: Value, y: Value) -> Value:
    """Returns sums[i] + x[2i] y[2i] + x[2i + 1] y[2i + 1]: bfloat16 numbers, float32 sums."""
    return call_llvm(b, "llvm.x86.avx512bf16.dpbf16ps.512", sums, x, y)


def sums_of_lanes(b: IRBuilder, vectors: list[Value]) -> Value:
    """Returns the sum of the lanes of each of up to 16 vectors of float32, as one vector.

    The halves of two vectors are added and take one vector together, and so on: three instructions
    per vector, where each vector alone would take ten.
    """
    count, width = len(vectors), 16
    while width > 1:
        if len(vectors) % 2:
            vectors = [*vectors, vectors[-1]]

        half = width // 2
        groups = range(0, 32, width)
        low = [first + i for first in groups for i in range(half)]
        high = [lane + half for lane in low]

        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [b.fadd(shuffle(b, p, q, low), shuffle(b, p, q, high)) for p, q in pairs]
        width = half
    return shuffle(b, vectors[0], vectors[0], list(range(count)))


class Arrays:
    """Vectors in memory: loads from and stores to the array arguments of an intrinsic.

    An array is given by the position of the argument.
    """

    def __init__(
        self,
        context: Any,
        builder: IRBuilder,
        signature: Any,
        args: Any,
    ) -> None:
        self.context = context
        self.builder = builder
        self.kinds = signature.args
        self.args = args

    def pointer(self, which: int, index: Value | None = None) -> Value:
        """Returns the address of an element."""
        array = self.context.make_array(self.kinds[which])
        data = array(self.context, self.builder, self.args[which]).data
        return data if index is None else self.builder.gep(data, [index])

    def _pointer(
        self,
        which: int,
        index: Value | None,
        vector: VectorType,
    ) -> Value:
        return self.builder.bitcast(self.pointer(which, index), vector.as_pointer())

    def load(
        self,
        vector: VectorType,
        which: int,
        index: Value | None = None,
    ) -> Value:
        pointer = self._pointer(which, index, vector)
        return self.builder.load(pointer, align=_bytes_per_lane(vector))

    def prefetch(
        self,
        which: int,
        index: Value,
        to_write: bool = False,
    ) -> None:
        """Asks for a cache line that will soon be read, or written. It may lie behind the array."""
        b = self.builder
        address = b.bitcast(self._pointer(which, index, I8x16), I8.as_pointer())
        settings = [ir.Constant(I32, value) for value in (int(to_write), _KEEP, _DATA)]
        call_llvm(b, "llvm.prefetch.p0", address, *settings, result=ir.VoidType())

    def load_scalar(self, which: int, index: Value) -> Value:
        return self.builder.load(self.pointer(which, index))

    def store(
        self,
        value: Value,
        which: int,
        index: Value | None = None,
    ) -> None:
        pointer = self._pointer(which, index, value.type)
        align = _bytes_per_lane(value.type)
        self.builder.store(value, pointer, align=align)


def _bytes_per_lane(vector: VectorType) -> int:
    return 4 if vector.element == F32 else vector.element.width // 8


def rounded_to_bfloat16(b: IRBuilder, values: Value) -> Value:
    """Returns the bits of 16 float32 values in bfloat16: to nearest, ties to even."""
    bits = b.bitcast(values, I32x16)
    odd = b.and_(shift_right(b, bits, 16), splat(I32x16, 1))
    rounded = b.add(bits, splat(I32x16, 0x7FFF))
    rounded = b.add(rounded, odd)
    return b.trunc(shift_right(b, rounded, 16), I16x16)


def rounded_halves(b: IRBuilder, low: Value, high: Value) -> Value:
    """Returns 32 float32 numbers as bfloat16: to nearest, ties to even. AVX512-BF16."""
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    return call_llvm(b, name, high, low, result=I16x32)
