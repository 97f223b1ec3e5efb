"""What the arithmetic instructions of PTX compute: one table, for the emulator and for inline PTX.

`signature("mad.wide.u32")` says which kind of number the result is, which kinds the sources are,
and how it is computed. A name that is not known raises NotImplementedError. The semantics are those
of the PTX ISA, chapters "Integer", "Floating Point", "Comparison", "Logic and Shift" and "Data
Movement and Conversion Instructions".
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ptx_values import DTYPES, Array, is_float, is_kind, size_of

Compute = Callable[..., Any]


class Signature(NamedTuple):
    """The kind of an instruction's result, those of its sources, and the function of them."""

    result: str
    sources: tuple[str, ...]
    compute: Compute


def unknown(name: str) -> NotImplementedError:
    return NotImplementedError(f"PTX {name}: the emulator does not know this instruction")


@functools.cache
def signature(name: str) -> Signature:
    """Returns what an arithmetic instruction computes.

    Raises:
        NotImplementedError: The emulator does not know the instruction or one of its modifiers.
    """
    operation, *modifiers = name.split(".")
    if not modifiers or not is_kind(modifiers[-1]):
        raise unknown(name)
    if operation in SPECIAL:
        try:
            return SPECIAL[operation](name, modifiers)
        except ValueError as error:  # More modifiers than are known.
            raise unknown(name) from error
    if operation not in SAME_KIND:
        raise unknown(name)

    sources, compute = SAME_KIND[operation]
    *before, kind = modifiers
    if before[-1:] == ["f32"] and operation in ("add", "sub", "fma"):
        # The last source is float32, those before it are widened: add.rn.f32.bf16.
        _only(name, before, {"rn", "f32"})
        return Signature("f32", (*(kind,) * (sources - 1), "f32"), _in_float32(compute))
    _only(name, before, {"rn", "lo"})
    return Signature(kind, (kind,) * sources, compute)


def _only(name: str, modifiers: list[str], allowed: set[str]) -> None:
    if not set(modifiers) <= allowed:
        raise unknown(name)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c.

    float64 holds a product of two float32 exactly; the sum is rounded there, then once more.
    """
    return a.astype(np.float64) * b + c


def _in_float32(compute: Compute) -> Compute:
    return lambda *sources: compute(*(source.astype(np.float32) for source in sources))


def multiply_add(a: Array, b: Array, c: Array) -> Array:
    return a * b + c


def divide(a: Array, b: Array) -> Array:
    """Rounded to nearest; integers, which numpy would round down, are rounded towards zero."""
    if a.dtype.kind == "f":
        return a / b
    magnitude = np.abs(a) // np.maximum(np.abs(b), 1)
    return np.where((a < 0) != (b < 0), -magnitude, magnitude)


def prmt(a: Any, b: Any, selector: Any) -> Array:
    """Picks four bytes of b:a.

    Byte i of the result is byte (nibble i of the selector) & 7 of b:a, or its sign bit eight times
    where the nibble has bit 3.
    """
    a, b, selector = (np.asarray(v, np.uint32) for v in (a, b, selector))
    eight = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)

    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        shift = (nibble & np.uint32(7)) * np.uint32(8)
        byte = (eight >> shift.astype(np.uint64) & np.uint64(255)).astype(np.uint32)

        sign = (byte >> np.uint32(7)) * np.uint32(255)
        byte = np.where(nibble & np.uint32(8), sign, byte)
        result |= byte << np.uint32(8 * i)

    return result


def lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """The function of three bits whose values are the bits of `table`: bit 4a + 2b + c."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    number = int(table.flat[0])
    for i in range(8):
        if number >> i & 1:
            one = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            result |= one
    return result


def _shift_left(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    shifted = a << np.minimum(by, bits - 1).astype(a.dtype)
    return np.where(by >= bits, 0, shifted).astype(a.dtype)


def _shift_right(a: Array, by: Array) -> Array:
    """Of a signed number the sign goes on coming in."""
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by >= bits, 0, shifted).astype(a.dtype)


def _extract(a: Array, position: Array, length: Array) -> Array:
    """`length` bits from `position`; of a signed number the highest of them is a sign."""
    bits = 8 * a.dtype.itemsize
    position, length = position & 255, length & 255
    top = np.minimum(position + length, bits)
    above = (bits - top).astype(a.dtype)
    below = (bits - np.maximum(top - np.minimum(position, top), 1)).astype(a.dtype)
    return np.where((length == 0) | (position >= bits), 0, a << above >> below).astype(a.dtype)


def _insert(a: Array, into: Array, position: Array, length: Array) -> Array:
    """The low `length` bits of a, put over those of `into` from `position`."""
    position, length = (position & 255).astype(np.uint64), (length & 255).astype(np.uint64)
    mask = ((np.uint64(1) << length) - np.uint64(1)) << position
    moved = a.astype(np.uint64) << position
    result: Array = ((into & ~mask) | (moved & mask)).astype(into.dtype)
    return result


def _funnel(left: bool, wrap: bool) -> Compute:
    def compute(low: Array, high: Array, by: Array) -> Array:
        both = high.astype(np.uint64) << np.uint64(32) | low
        by = (by & 31 if wrap else np.minimum(by, 32)).astype(np.uint64)
        moved = both << by >> np.uint64(32) if left else both >> by
        return moved.astype(np.uint32)

    return compute


def _popcount(a: Array) -> Array:
    return np.bitwise_count(a).astype(np.uint32)


def _leading_zeros(a: Array) -> Array:
    # float64 holds 32 bits exactly; frexp gives how many there are.
    return (32 - np.frexp(a.astype(np.float64))[1]).astype(np.uint32)


def _reverse(a: Array) -> Array:
    octets = np.ascontiguousarray(a.astype(">u4")).view(np.uint8)
    bits = np.unpackbits(octets.reshape(-1, 4), axis=1)[:, ::-1]
    return np.packbits(bits, axis=1).view(">u4")[:, 0]


def _smallest(name: str, modifiers: list[str]) -> Signature:
    """min and max, of two numbers or of three: without `.NaN`, a NaN gives the other number."""
    _only(name, modifiers[:-1], {"NaN"})
    kind, least = modifiers[-1], name.startswith("min")
    one: Compute = np.minimum if least else np.maximum
    if is_float(kind) and "NaN" not in modifiers:
        one = np.fmin if least else np.fmax
    return Signature(kind, (kind, kind), lambda *numbers: functools.reduce(one, numbers))


def _multiply(name: str, modifiers: list[str]) -> Signature:
    *before, kind = modifiers
    _only(name, before, {"rn", "lo", "hi", "wide"})
    if "wide" in before:
        twice = kind[0] + str(16 * size_of(kind))
        return Signature(twice, (kind, kind), lambda a, b: a.astype(DTYPES[twice]) * b)
    if "hi" in before:
        return Signature(kind, (kind, kind), _upper_half(name, kind))
    return Signature(kind, (kind, kind), np.multiply)


def _upper_half(name: str, kind: str) -> Compute:
    bits = 8 * size_of(kind)
    if bits > 32:
        raise unknown(name)
    wide = DTYPES[kind[0] + str(2 * bits)]
    return lambda a, b: a.astype(wide) * b >> wide(bits)


def _multiply_and_add(name: str, modifiers: list[str]) -> Signature:
    *before, kind = modifiers
    _only(name, before, {"lo", "wide"})
    if "wide" in before:
        twice = kind[0] + str(16 * size_of(kind))
        wide = DTYPES[twice]
        return Signature(twice, (kind, kind, twice), lambda a, b, c: a.astype(wide) * b + c)
    return Signature(kind, (kind,) * 3, multiply_add)


def _division(name: str, modifiers: list[str]) -> Signature:
    *before, kind = modifiers
    if is_float(kind) and before != ["rn"]:
        raise unknown(name)
    return Signature(kind, (kind, kind), divide)


COMPARISONS: dict[str, Compute] = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & ~_unordered(a, b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "nan": lambda a, b: _unordered(a, b),
    "num": lambda a, b: ~_unordered(a, b),
}
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    COMPARISONS[_name + "u"] = lambda a, b, ordered=COMPARISONS[_name]: (
        ordered(a, b) | _unordered(a, b)
    )


def _unordered(a: Array, b: Array) -> Any:
    """Whether one of two numbers is NaN."""
    return np.not_equal(a, a) | np.not_equal(b, b)


def _comparison(name: str, modifiers: list[str]) -> Signature:
    """setp.lt.s32, and setp.lt.and.s32 with a third source."""
    test, *joined, kind = modifiers
    if test not in COMPARISONS or len(joined) > 1:
        raise unknown(name)
    compare = COMPARISONS[test]
    if not joined:
        return Signature("pred", (kind, kind), compare)

    _only(name, joined, {"and", "or", "xor"})
    join = SAME_KIND[joined[0]][1]
    return Signature("pred", (kind, kind, "pred"), lambda a, b, p: join(compare(a, b), p))


def _selection(name: str, modifiers: list[str]) -> Signature:
    (kind,) = modifiers
    return Signature(kind, (kind, kind, "pred"), lambda a, b, p: np.where(p, a, b))


ROUND: dict[str, Compute] = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def _conversion(name: str, modifiers: list[str]) -> Signature:
    *before, to, source = modifiers
    if to in ("bf16x2", "f16x2"):
        # The first source is the high half.
        _only(name, before, {"rn"})
        return Signature(to, (source, source), lambda a, b: np.stack(np.broadcast_arrays(b, a), -1))

    if is_float(source) and not is_float(to):
        if len(before) != 1 or before[0] not in ROUND:
            raise unknown(name)
        return Signature(to, (source,), _to_integer(ROUND[before[0]], DTYPES[to]))
    _only(name, before, {"rn"})
    if is_float(to):
        return Signature(to, (source,), lambda a: a if a.dtype.kind == "f" else _as_float(a, to))
    return Signature(to, (source,), lambda a: a.astype(DTYPES[to]))


def _as_float(a: Array, to: str) -> Array:
    return a.astype(DTYPES.get(to, np.float64))


def _to_integer(rounded: Compute, dtype: Any) -> Compute:
    """NaN becomes 0, and what does not fit the nearest that does."""
    limits = np.iinfo(dtype)

    def compute(a: Array) -> Array:
        whole = rounded(np.where(np.isnan(a), 0, a).astype(np.float64))
        inside = np.clip(whole, limits.min, limits.max)
        # 2^63 is a float64, but 2^63 - 1 is not.
        return np.where(whole >= float(limits.max), limits.max, inside.astype(dtype))

    return compute


def _shift(name: str, modifiers: list[str]) -> Signature:
    (kind,) = modifiers
    compute = _shift_left if name.startswith("shl") else _shift_right
    return Signature(kind, (kind, "u32"), compute)


def _fixed(kind: str, sources: tuple[str, ...], compute: Compute) -> Compute:
    """An instruction with one kind of operands, whichever its name says."""

    def build(name: str, modifiers: list[str]) -> Signature:
        if size_of(modifiers[-1]) != 4 or len(modifiers) > 1:
            raise unknown(name)
        return Signature(kind, sources, compute)

    return build


def _bit_field(name: str, modifiers: list[str]) -> Signature:
    (kind,) = modifiers
    if name.startswith("bfe"):
        return Signature(kind, (kind, "u32", "u32"), _extract)
    if size_of(kind) != 4:
        raise unknown(name)
    return Signature(kind, (kind, kind, "u32", "u32"), _insert)


def _funnel_shift(name: str, modifiers: list[str]) -> Signature:
    direction, mode, kind = modifiers
    if mode not in ("wrap", "clamp") or direction not in ("l", "r"):
        raise unknown(name)
    return Signature(kind, (kind, kind, "u32"), _funnel(direction == "l", mode == "wrap"))


# operation: the number of its sources, all of the kind that its name ends with, and the function.
SAME_KIND: dict[str, tuple[int, Compute]] = {
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "rem": (2, np.fmod),
    "and": (2, np.bitwise_and),
    "or": (2, np.bitwise_or),
    "xor": (2, np.bitwise_xor),
    "not": (1, np.invert),
    "neg": (1, np.negative),
    "abs": (1, np.abs),
    "mov": (1, lambda a: a),
    "fma": (3, fma),
}

SPECIAL: dict[str, Callable[[str, list[str]], Signature]] = {
    "min": _smallest,
    "max": _smallest,
    "mul": _multiply,
    "mad": _multiply_and_add,
    "div": _division,
    "setp": _comparison,
    "selp": _selection,
    "cvt": _conversion,
    "shl": _shift,
    "shr": _shift,
    "shf": _funnel_shift,
    "bfe": _bit_field,
    "bfi": _bit_field,
    "prmt": _fixed("b32", ("b32", "b32", "b32"), prmt),
    "lop3": _fixed("b32", ("b32", "b32", "b32", "b32"), lop3),
    "popc": _fixed("u32", ("b32",), _popcount),
    "clz": _fixed("u32", ("b32",), _leading_zeros),
    "brev": _fixed("b32", ("b32",), _reverse),
}
