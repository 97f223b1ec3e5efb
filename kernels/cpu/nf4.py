"""NF4 on the CPU, with Numba: the functions of reference/nf4.py, bit for bit the same.

Quantizing compares each value with the 15 thresholds. Dequantizing scales and rounds the 16 levels once a block and then
only looks them up: with AVX-512 sixteen levels fit one register and a permute instruction looks up 32 weights at once
(`_permute_*`, twice as fast as bitsandbytes); other processors run the loop beside it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, config, types
from numba.extending import intrinsic
from torch import Tensor

from ..reference import nf4 as reference
from .runtime import array, empty, jit, run

GROUP = reference.GROUP
CODE = np.array(reference.NF4, dtype=np.float32)
_THRESHOLDS = array(reference.midpoints(reference.CODE)).copy()
MAP8 = array(reference.MAP8).copy()
_THRESHOLDS8 = array(reference.midpoints(reference.MAP8)).copy()
_TINY = np.float32(reference.TINY)
NO_FLOATS = np.zeros(0, dtype=np.float32)
_GRAIN = 8192  # blocks of 64 weights that are worth waking a thread for: about 0.1 ms of work

# Chosen before anything compiles: LLVM aborts the process on an instruction that its target lacks.
AVX512 = config.CPU_NAME is None and all(
    get_host_cpu_features().get(f, False) for f in ("avx512f", "avx512bw")
)


@jit
def _encode(row: Any, size: int, thresholds: Any, packed: Any, first: int) -> Any:
    """Packs row[:size] at packed[first:] and returns its absmax. `row` is scratch: it is normalised in place."""
    absmax = np.float32(0)
    for i in range(size):
        absmax = max(absmax, abs(row[i]))
    reciprocal = np.float32(1) / max(absmax, _TINY)
    codes = np.zeros(row.size, np.uint8)
    for i in range(size):
        y = row[i] * reciprocal
        code = np.uint8(0)
        for j in range(15):
            code += np.uint8(y > thresholds[j])
        codes[i] = code
    if size % 2:
        codes[size] = 7  # the unused nibble holds a zero
    for i in range((size + 1) // 2):
        packed[first + i] = codes[2 * i] << 4 | codes[2 * i + 1]
    return absmax


@jit
def _quantize_float32(
    x: Any, thresholds: Any, packed: Any, absmax: Any, block: int, start: int, stop: int
) -> None:
    row = np.empty(block, np.float32)
    for b in range(start, stop):
        size = min(block, x.size - b * block)
        for i in range(size):
            row[i] = x[b * block + i]
        absmax[b] = _encode(row, size, thresholds, packed, b * block // 2)


@jit
def _quantize_bfloat16(
    x: Any, thresholds: Any, packed: Any, absmax: Any, block: int, start: int, stop: int
) -> None:
    row = np.empty(block, np.float32)
    bits = row.view(np.uint32)
    for b in range(start, stop):
        size = min(block, x.size - b * block)
        for i in range(size):
            bits[i] = np.uint32(x[b * block + i]) << np.uint32(16)
        absmax[b] = _encode(row, size, thresholds, packed, b * block // 2)


def quantize(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Returns (packed uint8 [ceil(n/2)], absmax float32 [b])."""
    x = x.detach().contiguous().view(-1)
    kernel = _quantize_bfloat16 if x.dtype == torch.bfloat16 else _quantize_float32
    if x.dtype not in (torch.float32, torch.bfloat16):
        x = x.float()
    blocks = -(-x.numel() // block_size)
    packed = torch.empty((x.numel() + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(blocks, dtype=torch.float32)
    arrays = array(x), _THRESHOLDS, array(packed), array(absmax)
    run(kernel, *arrays, block_size, rows=(0, blocks), grain=-(-_GRAIN * 64 // block_size))
    return packed, absmax


@jit
def _double_quantize(
    absmax: Any, offset: np.float32, codes: Any, absmax2: Any, start: int, stop: int
) -> None:
    for g in range(start, stop):
        first, last = g * GROUP, min(absmax.size, (g + 1) * GROUP)
        largest = np.float32(0)
        for b in range(first, last):
            largest = max(largest, abs(absmax[b] - offset))
        absmax2[g] = largest
        reciprocal = np.float32(1) / max(largest, _TINY)
        for b in range(first, last):
            y = (absmax[b] - offset) * reciprocal
            code = 0  # the number of thresholds below y, by bisection
            for step in (128, 64, 32, 16, 8, 4, 2, 1):
                if y > _THRESHOLDS8[code + step - 1]:
                    code += step
            codes[b] = code if largest > 0 else 0


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (codes uint8 [b], absmax2 float32 [g], offset float32 scalar)."""
    offset = absmax.double().mean().float()
    groups = -(-absmax.numel() // GROUP)
    codes = torch.empty(absmax.numel(), dtype=torch.uint8)
    absmax2 = torch.empty(groups, dtype=torch.float32)
    shift = np.float32(offset.item())
    run(
        _double_quantize,
        array(absmax),
        shift,
        array(codes),
        array(absmax2),
        rows=(0, groups),
        grain=16,
    )
    return codes, absmax2, offset


@jit
def _scale(b: int, absmax: Any, absmax2: Any, offset: np.float32) -> Any:
    """The absmax of block b; float32 as it is stored, or uint8 codes of the double quantization."""
    return (
        MAP8[int(absmax[b])] * absmax2[b // GROUP] + offset
        if absmax2.size
        else np.float32(absmax[b])
    )


@jit
def _double_dequantize(
    codes: Any, absmax2: Any, offset: np.float32, out: Any, start: int, stop: int
) -> None:
    for b in range(start, stop):
        out[b] = _scale(b, codes, absmax2, offset)


def double_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """Returns absmax, float32 [b]."""
    out = torch.empty(codes.numel(), dtype=torch.float32)
    shift = np.float32(offset.item())
    run(
        _double_dequantize,
        array(codes),
        array(absmax2),
        shift,
        array(out),
        rows=(0, codes.numel()),
        grain=1 << 16,
    )
    return out


# ---- dequantize: one block of 64 with AVX-512 permutes, and the loop that does the same anywhere

_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()


def _splat(element: ir.Type, lanes: int, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, lanes), [value] * lanes)


def _pick(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
    """Lanes of the concatenation (a, b), chosen at compile time."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _address(
    context: Any,
    builder: ir.IRBuilder,
    signature: Any,
    args: Any,
    which: int,
    index: ir.Value,
    to: ir.Type,
) -> ir.Value:
    """Pointer to element `index` of the array argument `which`, as a pointer to `to`."""
    data = context.make_array(signature.args[which])(context, builder, args[which]).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def _scaled_code(builder: ir.IRBuilder, code: ir.Value, scale: ir.Value) -> ir.Value:
    """code[0:16] * scale, float32 [16]."""
    scales = builder.insert_element(
        ir.Constant(ir.VectorType(_F32, 16), ir.Undefined), scale, ir.Constant(_I32, 0)
    )
    return builder.fmul(code, _pick(builder, scales, scales, [0] * 16))


_INTERLEAVE = [lane for i in range(16) for lane in (i, 16 + i)]  # a0 b0 a1 b1 ...


@intrinsic  # type: ignore[untyped-decorator]
def _permute_float32(
    typing: Any, packed: Any, byte: Any, code: Any, scale: Any, out: Any, first: Any
) -> Any:
    """out[first : first + 64] = (code * scale)[nibbles of packed[byte : byte + 32]]: two permutes (vpermps) each 32 weights."""
    signature = types.void(packed, byte, code, scale, out, first)

    def build(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        zero = ir.Constant(args[1].type, 0)
        code16 = b.load(
            _address(context, b, signature, args, 2, zero, ir.VectorType(_F32, 16)), align=4
        )
        table = _scaled_code(b, code16, args[3])
        kind = ir.FunctionType(table.type, [table.type, ir.VectorType(_I32, 16)])
        permute = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512.permvar.sf.512")
        for half in (0, 1):
            at = b.add(args[1], ir.Constant(args[1].type, 16 * half))
            two = b.load(
                _address(context, b, signature, args, 0, at, ir.VectorType(_I8, 16)), align=1
            )
            two = b.zext(two, ir.VectorType(_I32, 16))
            low = b.call(
                permute, [table, two]
            )  # the permute reads the low four bits of a lane and no others
            high = b.call(permute, [table, b.lshr(two, _splat(_I32, 16, 4))])
            to = b.add(args[5], ir.Constant(args[5].type, 32 * half))
            target = _address(context, b, signature, args, 4, to, ir.VectorType(_F32, 32))
            b.store(_pick(b, high, low, _INTERLEAVE), target, align=4)
        return context.get_dummy_value()

    return signature, build


@intrinsic  # type: ignore[untyped-decorator]
def _permute_bfloat16(
    typing: Any, packed: Any, byte: Any, code: Any, scale: Any, out: Any, first: Any
) -> Any:
    """The same in bfloat16: the 16 levels are rounded once, then two permutes of 32 lanes (vpermw)."""
    signature = types.void(packed, byte, code, scale, out, first)

    def build(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        zero = ir.Constant(args[1].type, 0)
        code16 = b.load(
            _address(context, b, signature, args, 2, zero, ir.VectorType(_F32, 16)), align=4
        )
        bits = b.bitcast(_scaled_code(b, code16, args[3]), ir.VectorType(_I32, 16))
        odd = b.and_(b.lshr(bits, _splat(_I32, 16, 16)), _splat(_I32, 16, 1))
        rounded = b.add(b.add(bits, _splat(_I32, 16, 0x7FFF)), odd)  # to nearest, ties to even
        table = b.trunc(b.lshr(rounded, _splat(_I32, 16, 16)), ir.VectorType(_I16, 16))
        table = _pick(b, table, table, list(range(32)))
        kind = ir.FunctionType(table.type, [table.type, table.type])
        permute = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512.permvar.hi.512")
        two = b.load(
            _address(context, b, signature, args, 0, args[1], ir.VectorType(_I8, 32)), align=1
        )
        high, low = b.lshr(two, _splat(_I8, 32, 4)), b.and_(two, _splat(_I8, 32, 15))
        for half in (0, 1):
            lanes = [lane for i in range(16 * half, 16 * half + 16) for lane in (i, 32 + i)]
            chosen = b.zext(_pick(b, high, low, lanes), table.type)
            to = b.add(args[5], ir.Constant(args[5].type, 32 * half))
            target = _address(context, b, signature, args, 4, to, table.type)
            b.store(b.call(permute, [table, chosen]), target, align=2)
        return context.get_dummy_value()

    return signature, build


@jit
def _look_up(packed: Any, source: int, table: Any, out: Any, target: int, size: int) -> None:
    for i in range(0, size - 1, 2):
        two = packed[(source + i) // 2]
        out[target + i] = table[two >> 4]
        out[target + i + 1] = table[two & 15]
    if size % 2:
        out[target + size - 1] = table[packed[(source + size) // 2] >> 4]


# A tile is blocks [first, last) of every row in [start, stop), written without gaps to `out`, whose row 0 is row `top`.
# `layout` is (weights in all, block size, blocks a row). The flat order is the tile of one block a row.


@jit
def _dequantize_float32(
    packed: Any,
    absmax: Any,
    absmax2: Any,
    offset: np.float32,
    out: Any,
    layout: Any,
    tile: Any,
    start: int,
    stop: int,
) -> None:
    n, block, blocks = layout
    first, last, top = tile
    table = np.empty(16, np.float32)
    for row in range(start, stop):
        for column in range(first, last):
            b = row * blocks + column
            scale = _scale(b, absmax, absmax2, offset)
            source, target = b * block, ((row - top) * (last - first) + column - first) * block
            size, done = min(block, n - source), 0
            if AVX512:
                while done + 64 <= size:
                    _permute_float32(packed, (source + done) // 2, CODE, scale, out, target + done)
                    done += 64
            if done < size:
                for j in range(16):
                    table[j] = CODE[j] * scale
                _look_up(packed, source + done, table, out, target + done, size - done)


@jit
def _dequantize_bfloat16(
    packed: Any,
    absmax: Any,
    absmax2: Any,
    offset: np.float32,
    out: Any,
    layout: Any,
    tile: Any,
    start: int,
    stop: int,
) -> None:
    n, block, blocks = layout
    first, last, top = tile
    table = np.empty(16, np.uint16)
    wide = np.empty(1, np.float32)
    for row in range(start, stop):
        for column in range(first, last):
            b = row * blocks + column
            scale = _scale(b, absmax, absmax2, offset)
            source, target = b * block, ((row - top) * (last - first) + column - first) * block
            size, done = min(block, n - source), 0
            if AVX512:
                while done + 64 <= size:
                    _permute_bfloat16(packed, (source + done) // 2, CODE, scale, out, target + done)
                    done += 64
            if done < size:
                for j in range(16):
                    wide[0] = CODE[j] * scale
                    bits = wide.view(np.uint32)[0]
                    table[j] = (
                        bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
                    ) >> np.uint32(16)
                _look_up(packed, source + done, table, out, target + done, size - done)


def dequantize_tile(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
    layout: tuple[int, int, int],
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> None:
    """Writes a tile, rows x columns in blocks, to the contiguous float32 or bfloat16 tensor `out`."""
    kernel = _dequantize_bfloat16 if out.dtype == torch.bfloat16 else _dequantize_float32
    scale2 = NO_FLOATS if absmax2 is None else array(absmax2)
    shift = np.float32(0 if offset is None else offset.item())
    tile = (*columns, rows[0])
    blocks = columns[1] - columns[0]
    arrays = array(packed), array(absmax), scale2, shift, array(out)
    run(kernel, *arrays, layout, tile, rows=rows, grain=-(-_GRAIN * 64 // (layout[1] * blocks)))


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int,
) -> Tensor:
    """Returns code[q] * absmax, computed in float32 and rounded once to `dtype`, in `shape`."""
    fast = dtype in (torch.float32, torch.bfloat16)
    out = empty(tuple(shape), dtype if fast else torch.float32)
    dequantize_tile(
        packed,
        absmax,
        absmax2,
        offset,
        out,
        (out.numel(), block_size, 1),
        (0, absmax.numel()),
        (0, 1),
    )
    return out if fast else out.to(dtype)
