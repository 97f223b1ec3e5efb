"""Numbers as PTX sees them: a register holds bits, and each instruction says what they mean.

A register is a numpy array with one element per thread (or one for all of them): uint16, uint32 or
uint64 bits, or bool for a predicate. A *kind* is the last part of an instruction's name: "s32",
"f32", "bf16x2". `decode` reads the bits as numbers of a kind, `encode` makes bits of numbers.
bfloat16, which numpy does not know, is computed in float32 and rounded when it is encoded.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

DTYPES: dict[str, Any] = {
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "pred": np.bool_,
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

# Of bytes, where DTYPES does not say it.
_SIZES = {"bf16": 2, "bf16x2": 4, "f16x2": 4, "f32x2": 8}

# Two numbers in a register: the kind of each.
PAIRS = {"bf16x2": "bf16", "f16x2": "f16", "f32x2": "f32"}


def size_of(kind: str) -> int:
    """Bytes of a kind."""
    return _SIZES[kind] if kind in _SIZES else int(np.dtype(DTYPES[kind]).itemsize)


def is_kind(word: str) -> bool:
    return word in DTYPES or word in _SIZES


def is_float(kind: str) -> bool:
    return kind.startswith(("f", "bf"))


def widen(bits: Any) -> Array:
    """bfloat16 bit patterns (uint16) to float32: the upper half of its bits."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(x: Any) -> Array:
    """float32 or float64 to bfloat16 bit patterns, rounded to nearest, ties to even."""
    x = np.asarray(x)
    x = _round_to_odd(x) if x.dtype == np.float64 else np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    odd = (bits >> 16) & 1
    rounded = (bits + (np.uint32(0x7FFF) + odd)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def _round_to_odd(x: Array) -> Array:
    """float64 to float32 so that a second rounding, to bfloat16, gives what one would have given.

    A result that is not exact gets an odd last bit, and so lies on no tie.
    """
    near = np.atleast_1d(x).astype(np.float32)
    bits = near.view(np.uint32)
    above = np.isfinite(near) & (np.abs(near.astype(np.float64)) > np.abs(x))
    inexact = np.isfinite(near) & (near.astype(np.float64) != x)
    odd = np.where(inexact, (bits - above) | 1, bits).astype(np.uint32)
    return odd.view(np.float32).reshape(x.shape)


def resize(bits: Array, size: int) -> Array:
    """Bits cut, or extended by zeros, to `size` bytes."""
    if bits.dtype.itemsize == size:
        return bits
    return bits.astype(UNSIGNED[size])


def decode(bits: Array, kind: str) -> Array:
    """The numbers of a kind in the low bits of registers.

    Those of a pair ("f16x2") lie along a new last axis, the low half first.
    """
    if kind == "pred":
        return bits
    bits = resize(bits, size_of(kind))
    if kind == "bf16":
        return widen(bits)
    if kind in PAIRS:
        half = UNSIGNED[size_of(PAIRS[kind])]
        return decode(np.ascontiguousarray(bits)[..., None].view(half), PAIRS[kind])
    return bits.view(DTYPES[kind])


def encode(numbers: Array, kind: str, size: int) -> Array:
    """The bits of numbers of a kind, in registers of `size` bytes; a predicate as it is.

    In a register that is wider, signed integers are extended by their sign.
    """
    if kind == "pred":
        return numbers.astype(np.bool_, copy=False)
    if kind == "bf16":
        return narrow(numbers)
    if kind in PAIRS:
        halves = encode(numbers, PAIRS[kind], size_of(PAIRS[kind]))
        return np.ascontiguousarray(halves).view(UNSIGNED[size_of(kind)])[..., 0]

    typed = numbers.astype(DTYPES[kind], copy=False)
    if typed.dtype.itemsize != size:
        typed = typed.astype(f"{typed.dtype.kind}{size}")
    return typed.view(UNSIGNED[size])


def immediate(text: str, kind: str) -> Array:
    """The bits of a number as it is written in the text: 12, -1, 0x7F, 0f3F800000, 0d...

    One element, which stands for all threads.
    """
    if kind == "pred":
        return np.array([int(text, 0) != 0])

    size = size_of(kind)
    if text[:2] in ("0f", "0F", "0d", "0D"):
        given = np.array([int(text[2:], 16)], np.uint32 if text[1] in "fF" else np.uint64)
        return resize(given, size)
    if is_float(kind) and "." in text:
        return encode(np.array([float(text)]), kind, size)

    number = int(text.rstrip("U"), 0)
    return np.array([number % 2 ** (8 * size)], UNSIGNED[size])
