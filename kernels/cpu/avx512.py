"""AVX-512 instructions for the loops of nf4.py and matmul.py, as Numba intrinsics.

Sixteen levels fit one 512-bit register, and a permute instruction looks up 16 weights in float32
or 32 in bfloat16 at once, which is twice as fast as bitsandbytes. An intrinsic builds the LLVM IR
for it. Each use of one has a portable loop beside it, for processors without AVX-512.
"""

from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from llvmlite.ir import IRBuilder, Value
from numba.core import cgutils, config, types
from numba.extending import intrinsic

from ..reference.nf4 import GROUP
from .vectors import (
    F32,
    Arrays,
    F32x16,
    I8x16,
    I8x32,
    I16x32,
    I32x16,
    add_constant,
    add_dot,
    broadcast,
    call_llvm,
    interleave,
    multiply_add,
    permute,
    rounded_to_bfloat16,
    shift_right,
    shuffle,
    splat,
    sums_of_lanes,
)

_LOOK_UP = ("avx512f", "avx512bw")
_BFLOAT16_DOT = (*_LOOK_UP, "avx512bf16")

# Decided before anything compiles: LLVM aborts the process on an instruction that its target lacks.
# A CPU name in Numba's configuration means that the code is compiled for some other processor.
_features = get_host_cpu_features()


def _has(names: Iterable[str]) -> bool:
    return config.CPU_NAME is None and all(_features.get(name, False) for name in names)


AVX512 = _has(_LOOK_UP)
AVX512_BF16 = _has(_BFLOAT16_DOT)


def _look_up_float32(
    context: Any,
    b: IRBuilder,
    signature: Any,
    args: Any,
) -> Any:
    arrays = Arrays(context, b, signature, args)
    _, byte, _, scale, _, first = args
    levels = arrays.load(F32x16, 2)
    table = b.fmul(levels, broadcast(b, scale))

    for half in (0, 1):
        source = add_constant(b, byte, 16 * half)
        target = add_constant(b, first, 32 * half)
        pairs = arrays.load(I8x16, 0, source)
        pairs = b.zext(pairs, I32x16)

        low = permute(b, table, pairs)
        high = permute(b, table, shift_right(b, pairs, 4))
        weights = interleave(b, high, low, range(16))
        arrays.store(weights, 4, target)

    return context.get_dummy_value()


def _look_up_bfloat16(
    context: Any,
    b: IRBuilder,
    signature: Any,
    args: Any,
) -> Any:
    arrays = Arrays(context, b, signature, args)
    _, byte, _, scale, _, first = args
    levels = arrays.load(F32x16, 2)
    scaled = b.fmul(levels, broadcast(b, scale))

    # The 16 levels are rounded once; the table repeats them to fill its 32 lanes.
    table = rounded_to_bfloat16(b, scaled)
    table = shuffle(b, table, table, list(range(32)))

    pairs = arrays.load(I8x32, 0, byte)
    high = shift_right(b, pairs, 4)
    low = b.and_(pairs, splat(I8x32, 15))

    for half in (0, 1):
        start = 16 * half
        target = add_constant(b, first, 32 * half)
        codes = interleave(b, high, low, range(start, start + 16))
        codes = b.zext(codes, I16x32)
        arrays.store(permute(b, table, codes), 4, target)

    return context.get_dummy_value()


def _bfloat16_table(b: IRBuilder, levels: Value) -> Value:
    """Returns the 16 levels in bfloat16, twice: a code's lane may hold a bit of the next code."""
    return call_llvm(b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", levels, levels, result=I16x32)


def _decoded(b: IRBuilder, table: Value, pairs: Value) -> tuple[Value, Value]:
    """Returns the weights of 32 high nibbles and of 32 low ones, two bfloat16 numbers per lane."""
    codes = b.zext(pairs, I16x32)
    high = permute(b, table, shift_right(b, codes, 4))
    low = permute(b, table, codes)
    return b.bitcast(high, I32x16), b.bitcast(low, I32x16)


def _even_odd(
    context: Any,
    b: IRBuilder,
    signature: Any,
    args: Any,
) -> Any:
    arrays = Arrays(context, b, signature, args)
    _, first, _, target = args
    x = arrays.load(I16x32, 0, first)
    y = arrays.load(I16x32, 0, add_constant(b, first, 32))

    even = shuffle(b, x, y, list(range(0, 64, 2)))
    odd = shuffle(b, x, y, list(range(1, 64, 2)))
    arrays.store(even, 2, target)
    arrays.store(odd, 2, add_constant(b, target, 32))
    return context.get_dummy_value()


# The arrays of `add_products`.
_PACKED, _ABSMAX, _TABLE, _LEVELS, _X, _SUMS = range(6)


def _absmax_of_block(
    b: IRBuilder,
    arrays: Arrays,
    block: Value,
    shift: Value,
    group: Value,
) -> Value:
    """Returns the absmax of a block of 64 weights: as stored, or from the table of its group."""
    i = b.lshr(block, shift)
    stored = arrays.load_scalar(_ABSMAX, i)
    if stored.type == F32:
        return stored

    of_block = b.udiv(i, ir.Constant(i.type, GROUP))
    row = b.sub(of_block, group)
    code = b.zext(stored, i.type)
    entry = b.add(b.mul(row, ir.Constant(i.type, 256)), code)
    return arrays.load_scalar(_TABLE, entry)


def _add_products(
    context: Any,
    b: IRBuilder,
    signature: Any,
    args: Any,
) -> Any:
    R, M = (kind.literal_value for kind in signature.args[:2])
    operands, sizes = (cgutils.unpack_tuple(b, held) for held in args[2:])
    arrays = Arrays(context, b, types.void(*signature.args[2]), operands)
    block, row_blocks, last, shift, group, first, blocks, target = sizes

    def constant(value: int) -> Value:
        return ir.Constant(block.type, value)

    # Beyond the last row, that row is read again.
    starts = []
    for r in range(R):
        is_beyond = b.icmp_signed("<", last, constant(r))
        row = b.select(is_beyond, last, constant(r))
        starts.append(b.add(block, b.mul(row, row_blocks)))

    zero = splat(F32x16, 0.0)
    sums = [[cgutils.alloca_once_value(b, zero) for _ in range(M)] for _ in range(R)]
    levels = arrays.load(F32x16, _LEVELS)
    unscaled = _bfloat16_table(b, levels)

    with cgutils.for_range(b, blocks) as loop:
        k = loop.index
        x = []
        for m in range(M):
            column = b.add(b.mul(k, constant(64 * M)), constant(64 * m))
            column = b.add(first, column)
            even, odd = (arrays.load(I16x32, _X, add_constant(b, column, i)) for i in (0, 32))
            x.append((b.bitcast(even, I32x16), b.bitcast(odd, I32x16)))

        for r in range(R):
            at = b.add(starts[r], k)
            pairs = arrays.load(I8x32, _PACKED, b.mul(at, constant(32)))
            # The rows that come next: with many rows of x a pass along W is too short for the
            # processor to ask for them by itself.
            ahead = b.add(at, b.mul(constant(R), row_blocks))
            arrays.prefetch(_PACKED, b.mul(ahead, constant(32)))
            absmax = broadcast(b, _absmax_of_block(b, arrays, at, shift, group))

            if M == 1:
                # Scaling one sum is cheaper than scaling 16 levels.
                high, low = _decoded(b, unscaled, pairs)
                even, odd = x[0]
                product = add_dot(b, add_dot(b, zero, high, even), low, odd)
                scaled = multiply_add(b, product, absmax, b.load(sums[r][0]))
                b.store(scaled, sums[r][0])
                continue

            table = _bfloat16_table(b, b.fmul(levels, absmax))
            high, low = _decoded(b, table, pairs)
            for m, (even, odd) in enumerate(x):
                product = add_dot(b, b.load(sums[r][m]), high, even)
                b.store(add_dot(b, product, low, odd), sums[r][m])

    total = sums_of_lanes(b, [b.load(held) for row in sums for held in row])
    total = b.fadd(total, arrays.load(total.type, _SUMS, target))
    arrays.store(total, _SUMS, target)
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
def even_odd_64(typing: Any, x: Any, first: Any, out: Any, target: Any) -> Any:
    """out[target : target + 64] = the even elements of x[first : first + 64], then the odd ones.

    The elements have 16 bits.
    """
    return types.void(x, first, out, target), _even_odd


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def add_products(typing: Any, R: Any, M: Any, arrays: Any, sizes: Any) -> Any:
    """sums[target + r M + m] += W[r] . x[m] over blocks of 64, for R rows of W and M rows of x.

    arrays: (packed, absmax, table, levels, x, sums)
    sizes: (block, row_blocks, last, shift, group, first, blocks, target)

    R M is at most 16: each sum has a register. Row r of W starts at block + r row_blocks, in blocks
    of 64; rows above `last` repeat it. The absmax of block i is absmax[i >> shift], or, if that is
    an 8-bit code, its entry in `table` [groups, 256], which starts with group number `group`. The
    weights are rounded to bfloat16, the products are summed in float32. x holds bfloat16 bits,
    [blocks, M, 2, 32] from x[first]: of each block of 64 the elements with an even index, then
    those with an odd one.
    """
    return types.void(R, M, arrays, sizes), _add_products
