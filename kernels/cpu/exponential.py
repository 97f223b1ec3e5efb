r"""exp in float32, for the loops of a kernel, which LLVM vectorises.

    exp(x) = 2^k exp(t),   k = round(x / ln 2),   t = x - k ln 2,   |t| <= ln(2) / 2 = 0.347

exp(t) is its Taylor polynomial of degree 7, whose first term left out is t^8 / 8! < 6e-9: a tenth
of the rounding of a float32. k ln 2 is subtracted in two parts, of which the first has so few bits
that its product with k is exact.
"""

import math
from typing import Any

import numpy as np

from .floats import bits_of_float32, float32_of_bits, multiply_add
from .runtime import jit

# Beyond these, exp is infinite or rounds to zero.
_LARGEST = np.float32(89.0)
_SMALLEST = np.float32(-104.0)

# Below this, exp is below the normal numbers of float32.
_SMALLEST_NORMAL = np.float32(-126 * math.log(2))

# Adding 1.5 * 2^23 rounds to an integer, which is then in the lowest bits.
_ROUNDING = np.float32(1.5 * 2**23)

# ln 2 = 355 / 512 + the rest: 9 bits, times the 8 bits of k.
_INVERSE = np.float32(1 / math.log(2))
_HIGH = np.float32(355 / 512)
_LOW = np.float32(math.log(2) - 355 / 512)

# The coefficients of exp(t), from the lowest.
_C = tuple(np.float32(1 / math.factorial(n)) for n in range(8))
_ONE, _ZERO = np.float32(1), np.float32(0)
_INFINITY = np.float32(np.inf)


@jit
def exp(x: Any) -> Any:
    """exp(x) of a float32 number: infinite, denormal, 0 and NaN where exp is.

    Within 1 ulp with fused multiply-add; without, within 1.5.
    """
    shifted, t, p = _reduced(x)

    # 2^k in two factors: it may be no float32 number where exp(x) is.
    exponent = np.int32(bits_of_float32(shifted) - bits_of_float32(_ROUNDING))
    half = np.int32(exponent >> 1)
    factor = _power_of_2(half)
    y = multiply_add(t * factor, p, factor) * _power_of_2(exponent - half)

    y = _INFINITY if x > _LARGEST else y
    return _ZERO if x < _SMALLEST else y


@jit
def exp_of_negative(x: Any) -> Any:
    """exp(x) of a float32 number up to 0, or a few roundings more; NaN where exp is.

    As `exp` for results from 2^-126 on; those below are 0. It takes two thirds of the instructions.
    """
    shifted, t, p = _reduced(x)
    exponent = np.int32(bits_of_float32(shifted) - bits_of_float32(_ROUNDING))
    factor = _power_of_2(exponent)
    y = multiply_add(t * factor, p, factor)
    return _ZERO if x < _SMALLEST_NORMAL else y


@jit
def _reduced(x: Any) -> Any:
    """Returns k in the lowest bits of a number, t, and p with exp(t) = 1 + t p."""
    shifted = multiply_add(x, _INVERSE, _ROUNDING)
    k = shifted - _ROUNDING
    t = multiply_add(-k, _HIGH, x)
    t = multiply_add(-k, _LOW, t)

    # In pairs: fewer instructions wait for another one.
    square = t * t
    p = multiply_add(t, _C[7], _C[6])
    p = multiply_add(square, p, multiply_add(t, _C[5], _C[4]))
    p = multiply_add(square, p, multiply_add(t, _C[3], _C[2]))
    return shifted, t, multiply_add(t, p, _ONE)


@jit
def _power_of_2(k: Any) -> Any:
    """2^k for -127 < k < 128: the exponent's bits."""
    return float32_of_bits((k + 127) << 23)
