"""AVX-512 instructions for the loops of nf4.py and matmul.py, as Numba intrinsics.

Sixteen levels fit one 512-bit register, and a permute instruction looks up 16 weights in float32
or 32 in bfloat16 at once, which is twice as fast as bitsandbytes. An intrinsic builds the LLVM IR
for it. Each use of one has a portable loop beside it, for processors without AVX-512.
"""

from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from llvmlite.ir import IRBuilder, Value, VectorType
from numba.core import cgutils, config, types
from numba.extending import intrinsic

_NEEDED = ("avx512f", "avx512bw")

# Decided before anything compiles: LLVM aborts the process on an instruction that its target lacks.
# A CPU name in Numba's configuration means that the code is compiled for some other processor.
_features = get_host_cpu_features()
AVX512 = config.CPU_NAME is None and all(_features.get(name, False) for name in _NEEDED)

_I8 = ir.IntType(8)
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_F32 = ir.FloatType()
_I8x16 = VectorType(_I8, 16)
_I8x32 = VectorType(_I8, 32)
_I16x16 = VectorType(_I16, 16)
_I16x32 = VectorType(_I16, 32)
_I32x16 = VectorType(_I32, 16)
_F32x16 = VectorType(_F32, 16)


def _splat(vector: VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _add(b: IRBuilder, index: Value, constant: int) -> Value:
    return b.add(index, ir.Constant(index.type, constant))


def _shift_right(b: IRBuilder, vector: Value, bits: int) -> Value:
    """Returns every lane of an integer vector, shifted and filled with zeros."""
    return b.lshr(vector, _splat(vector.type, bits))


def _shuffle(
    b: IRBuilder,
    first: Value,
    second: Value,
    lanes: list[int],
) -> Value:
    """Returns lanes of the concatenation (first, second), chosen at compile time."""
    mask = VectorType(_I32, len(lanes))
    return b.shuffle_vector(first, second, ir.Constant(mask, lanes))


def _interleave(
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
    return _shuffle(b, first, second, lanes)


def _broadcast(b: IRBuilder, scalar: Value) -> Value:
    """Returns a float32 in all 16 lanes."""
    nothing = ir.Constant(_F32x16, ir.Undefined)
    lane = ir.Constant(_I32, 0)
    one = b.insert_element(nothing, scalar, lane)
    return _shuffle(b, one, one, [0] * 16)


def _call(b: IRBuilder, name: str, *operands: Value) -> Value:
    """Calls an LLVM intrinsic whose result has the type of its first operand."""
    kinds = [operand.type for operand in operands]
    signature = ir.FunctionType(kinds[0], kinds)
    function = cgutils.get_or_insert_function(b.module, signature, name)
    return b.call(function, operands)


def _permute(b: IRBuilder, table: Value, codes: Value) -> Value:
    """Returns table[codes], lane by lane. Bits of a code above the table's size are ignored."""
    kind = "sf" if table.type == _F32x16 else "hi"
    return _call(b, f"llvm.x86.avx512.permvar.{kind}.512", table, codes)


def _multiply_add(b: IRBuilder, x: Value, y: Value, z: Value) -> Value:
    """Returns x * y + z, rounded once."""
    return _call(b, "llvm.fma.v16f32", x, y, z)


class _Arrays:
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

    def _pointer(
        self,
        which: int,
        index: Value | None,
        vector: VectorType,
    ) -> Value:
        array = self.context.make_array(self.kinds[which])
        data = array(self.context, self.builder, self.args[which]).data
        if index is not None:
            data = self.builder.gep(data, [index])
        return self.builder.bitcast(data, vector.as_pointer())

    def load(
        self,
        vector: VectorType,
        which: int,
        index: Value | None = None,
    ) -> Value:
        pointer = self._pointer(which, index, vector)
        return self.builder.load(pointer, align=_bytes_per_lane(vector))

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
    return 4 if vector.element == _F32 else vector.element.width // 8


def _look_up_float32(
    context: Any,
    b: IRBuilder,
    signature: Any,
    args: Any,
) -> Any:
    arrays = _Arrays(context, b, signature, args)
    _, byte, _, scale, _, first = args
    levels = arrays.load(_F32x16, 2)
    table = b.fmul(levels, _broadcast(b, scale))

    for half in (0, 1):
        source = _add(b, byte, 16 * half)
        target = _add(b, first, 32 * half)
        pairs = arrays.load(_I8x16, 0, source)
        pairs = b.zext(pairs, _I32x16)

        low = _permute(b, table, pairs)
        high = _permute(b, table, _shift_right(b, pairs, 4))
        weights = _interleave(b, high, low, range(16))
        arrays.store(weights, 4, target)

    return context.get_dummy_value()


def _rounded_to_bfloat16(b: IRBuilder, values: Value) -> Value:
    """Returns the bits of 16 float32 values in bfloat16: to nearest, ties to even."""
    bits = b.bitcast(values, _I32x16)
    odd = b.and_(_shift_right(b, bits, 16), _splat(_I32x16, 1))
    rounded = b.add(bits, _splat(_I32x16, 0x7FFF))
    rounded = b.add(rounded, odd)
    return b.trunc(_shift_right(b, rounded, 16), _I16x16)


def _look_up_bfloat16(
    context: Any,
    b: IRBuilder,
    signature: Any,
    args: Any,
) -> Any:
    arrays = _Arrays(context, b, signature, args)
    _, byte, _, scale, _, first = args
    levels = arrays.load(_F32x16, 2)
    scaled = b.fmul(levels, _broadcast(b, scale))

    # The 16 levels are rounded once; the table repeats them to fill its 32 lanes.
    table = _rounded_to_bfloat16(b, scaled)
    table = _shuffle(b, table, table, list(range(32)))

    pairs = arrays.load(_I8x32, 0, byte)
    high = _shift_right(b, pairs, 4)
    low = b.and_(pairs, _splat(_I8x32, 15))

    for half in (0, 1):
        start = 16 * half
        target = _add(b, first, 32 * half)
        codes = _interleave(b, high, low, range(start, start + 16))
        codes = b.zext(codes, _I16x32)
        arrays.store(_permute(b, table, codes), 4, target)

    return context.get_dummy_value()


def _add_product(
    context: Any,
    b: IRBuilder,
    signature: Any,
    args: Any,
) -> Any:
    arrays = _Arrays(context, b, signature, args)
    _, byte, _, _, _, first, scale, _ = args
    table = arrays.load(_F32x16, 2)
    product = _splat(_F32x16, 0.0)

    for start in (0, 16):
        pairs = arrays.load(_I8x16, 0, _add(b, byte, start))
        pairs = b.zext(pairs, _I32x16)
        high = _permute(b, table, _shift_right(b, pairs, 4))
        low = _permute(b, table, pairs)

        column = _add(b, first, start)
        even = arrays.load(_F32x16, 3, column)
        product = _multiply_add(b, high, even, product)
        odd = arrays.load(_F32x16, 4, column)
        product = _multiply_add(b, low, odd, product)

    sums = arrays.load(_F32x16, 7)
    sums = _multiply_add(b, product, _broadcast(b, scale), sums)
    arrays.store(sums, 7)
    return context.get_dummy_value()


@intrinsic  # type: ignore[untyped-decorator]
def look_up_64(
    typing: Any,
    packed: Any,
    byte: Any,
    levels: Any,
    scale: Any,
    out: Any,
    first: Any,
) -> Any:
    """out[first : first + 64] = (levels * scale)[nibbles of packed[byte : byte + 32]].

    `out` holds bit patterns: uint32 for float32 weights, uint16 for bfloat16 weights.
    """
    signature = types.void(packed, byte, levels, scale, out, first)
    build = _look_up_float32 if out.dtype == types.uint32 else _look_up_bfloat16
    return signature, build


@intrinsic  # type: ignore[untyped-decorator]
def add_product_64(
    typing: Any,
    packed: Any,
    byte: Any,
    levels: Any,
    even: Any,
    odd: Any,
    first: Any,
    scale: Any,
    sums: Any,
) -> Any:
    """sums[0:16] += scale * (levels[high nibbles] * even + levels[low nibbles] * odd).

    Over the 32 bytes from packed[byte] and the 32 elements from even[first] and odd[first].
    """
    kinds = packed, byte, levels, even, odd, first, scale, sums
    return types.void(*kinds), _add_product
