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

_LOOK_UP = ("avx512f", "avx512bw")
_BFLOAT16_DOT = (*_LOOK_UP, "avx512bf16")

# Decided before anything compiles: LLVM aborts the process on an instruction that its target lacks.
# A CPU name in Numba's configuration means that the code is compiled for some other processor.
_features = get_host_cpu_features()


def _has(names: Iterable[str]) -> bool:
    return config.CPU_NAME is None and all(_features.get(name, False) for name in names)


AVX512 = _has(_LOOK_UP)
AVX512_BF16 = _has(_BFLOAT16_DOT)

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


def _call(b: IRBuilder, name: str, *operands: Value, result: Any = None) -> Value:
    """Calls an LLVM intrinsic; its result has the type of its first operand unless given."""
    kinds = [operand.type for operand in operands]
    signature = ir.FunctionType(result or kinds[0], kinds)
    function = cgutils.get_or_insert_function(b.module, signature, name)
    return b.call(function, operands)


def _permute(b: IRBuilder, table: Value, codes: Value) -> Value:
    """Returns table[codes], lane by lane. Bits of a code above the table's size are ignored."""
    kind = "sf" if table.type == _F32x16 else "hi"
    return _call(b, f"llvm.x86.avx512.permvar.{kind}.512", table, codes)


def _multiply_add(b: IRBuilder, x: Value, y: Value, z: Value) -> Value:
    """Returns x * y + z, rounded once."""
    return _call(b, "llvm.fma.v16f32", x, y, z)


def _add_dot(b: IRBuilder, sums: Value, x: Value, y: Value) -> Value:
    """Returns sums[i] + x[2i] y[2i] + x[2i + 1] y[2i + 1]: bfloat16 numbers, float32 sums."""
    return _call(b, "llvm.x86.avx512bf16.dpbf16ps.512", sums, x, y)


def _sums_of_lanes(b: IRBuilder, vectors: list[Value]) -> Value:
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
        vectors = [b.fadd(_shuffle(b, p, q, low), _shuffle(b, p, q, high)) for p, q in pairs]
        width = half
    return _shuffle(b, vectors[0], vectors[0], list(range(count)))


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

    def load_scalar(self, which: int, index: Value) -> Value:
        array = self.context.make_array(self.kinds[which])
        data = array(self.context, self.builder, self.args[which]).data
        return self.builder.load(self.builder.gep(data, [index]))

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


def _bfloat16_table(b: IRBuilder, levels: Value) -> Value:
    """Returns the 16 levels in bfloat16, twice: a code's lane may hold a bit of the next code."""
    return _call(b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", levels, levels, result=_I16x32)


def _decoded(b: IRBuilder, table: Value, pairs: Value) -> tuple[Value, Value]:
    """Returns the weights of 32 high nibbles and of 32 low ones, two bfloat16 numbers per lane."""
    codes = b.zext(pairs, _I16x32)
    high = _permute(b, table, _shift_right(b, codes, 4))
    low = _permute(b, table, codes)
    return b.bitcast(high, _I32x16), b.bitcast(low, _I32x16)


def _add_products(
    context: Any,
    b: IRBuilder,
    signature: Any,
    args: Any,
) -> Any:
    arrays = _Arrays(context, b, signature, args)
    R, M = (kind.literal_value for kind in signature.args[:2])
    _, _, _, byte, row_bytes, last, _, first, _, scale, row_scales, _, blocks, _, target = args

    def constant(value: int) -> Value:
        return ir.Constant(byte.type, value)

    # Beyond the last row, that row is read again.
    bytes_of_row, scales_of_row = [], []
    for r in range(R):
        is_beyond = b.icmp_signed("<", last, constant(r))
        row = b.select(is_beyond, last, constant(r))
        bytes_of_row.append(b.add(byte, b.mul(row, row_bytes)))
        scales_of_row.append(b.add(scale, b.mul(constant(r), row_scales)))

    zero = _splat(_F32x16, 0.0)
    sums = [[cgutils.alloca_once_value(b, zero) for _ in range(M)] for _ in range(R)]
    levels = arrays.load(_F32x16, 11)
    unscaled = _bfloat16_table(b, levels)

    with cgutils.for_range(b, blocks) as loop:
        k = loop.index
        x = []
        for m in range(M):
            column = b.add(b.mul(k, constant(64 * M)), constant(64 * m))
            column = b.add(first, column)
            even, odd = (arrays.load(_I16x32, 6, _add(b, column, i)) for i in (0, 32))
            x.append((b.bitcast(even, _I32x16), b.bitcast(odd, _I32x16)))

        for r in range(R):
            at = b.add(bytes_of_row[r], b.mul(k, constant(32)))
            pairs = arrays.load(_I8x32, 2, at)
            scale = b.add(scales_of_row[r], k)
            absmax = _broadcast(b, arrays.load_scalar(8, scale))

            if M == 1:
                # Scaling one sum is cheaper than scaling 16 levels.
                high, low = _decoded(b, unscaled, pairs)
                even, odd = x[0]
                product = _add_dot(b, _add_dot(b, zero, high, even), low, odd)
                scaled = _multiply_add(b, product, absmax, b.load(sums[r][0]))
                b.store(scaled, sums[r][0])
                continue

            table = _bfloat16_table(b, b.fmul(levels, absmax))
            high, low = _decoded(b, table, pairs)
            for m, (even, odd) in enumerate(x):
                product = _add_dot(b, b.load(sums[r][m]), high, even)
                b.store(_add_dot(b, product, low, odd), sums[r][m])

    total = _sums_of_lanes(b, [b.load(held) for row in sums for held in row])
    total = b.fadd(total, arrays.load(total.type, 13, target))
    arrays.store(total, 13, target)
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


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def add_products(
    typing: Any,
    R: Any,
    M: Any,
    packed: Any,
    byte: Any,
    row_bytes: Any,
    last: Any,
    x: Any,
    first: Any,
    scales: Any,
    scale: Any,
    row_scales: Any,
    levels: Any,
    blocks: Any,
    sums: Any,
    target: Any,
) -> Any:
    """sums[target + r M + m] += W[r] . x[m] over blocks of 64, for R rows of W and M rows of x.

    R M is at most 16: each sum has a register. Row r of W starts at packed[byte + r row_bytes] and
    scales[scale + r row_scales]; rows above `last` repeat it. The weights are rounded to bfloat16,
    the products are summed in float32. x holds bfloat16 bits, [blocks, M, 2, 32] from x[first]: of
    each block of 64 the elements with an even index, then those with an odd one.
    """
    kinds = R, M, packed, byte, row_bytes, last, x, first, scales, scale, row_scales, levels
    return types.void(*kinds, blocks, sums, target), _add_products
