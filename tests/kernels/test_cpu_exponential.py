"""The exponential of the CPU's kernels: against float64, at the edges of float32, vectorised."""

import re
from typing import Any

import numba
import numpy as np
import pytest
from llvmlite.binding import get_host_cpu_features

from minilora.kernels.cpu.exponential import exp, exp_of_negative

# A CPU name in Numba's configuration means that the code is compiled for some other processor.
HAS_FMA = numba.config.CPU_NAME is None and get_host_cpu_features().get("fma", False)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def exp_of_each(x: np.ndarray, y: np.ndarray) -> None:
    for i in range(np.uint64(x.size)):
        y[i] = exp(x[i])


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def exp_of_each_negative(x: np.ndarray, y: np.ndarray) -> None:
    for i in range(np.uint64(x.size)):
        y[i] = exp_of_negative(x[i])


def found(x: np.ndarray, of_each: Any = exp_of_each) -> np.ndarray:
    y = np.full_like(x, np.nan)
    of_each(x, y)
    return y


# Where exp is a normal number, where it is a denormal one, and around 0.
@pytest.mark.parametrize("ends", [(-87.3, 88.7), (-103.9, -87.4), (-1e-3, 1e-3)])
def test_it_is_as_exact_as_it_says(ends: tuple[float, float]) -> None:
    x = np.linspace(*ends, 300_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert (np.abs(found(x) - exact) <= (1.0 if HAS_FMA else 1.5) * ulp).all()


def test_the_edges() -> None:
    largest = np.log(np.finfo(np.float32).max)
    x = [
        0.0,
        -0.0,
        largest - 1e-5,
        largest + 1e-5,
        np.inf,
        -103.97,
        -103.98,
        -1e30,
        -np.inf,
        np.nan,
    ]
    y = found(np.array(x, np.float32))
    np.testing.assert_array_equal(y[:2], 1)
    assert np.isfinite(y[2]) and np.isposinf(y[3:5]).all()
    # Half of the smallest denormal number is the smallest that is not rounded to zero.
    assert y[5] == np.float32(2**-149) and not y[6:9].any()
    assert np.isnan(y[9])


def test_of_negative_numbers_it_is_the_same_until_results_are_denormal() -> None:
    normal = np.linspace(-87.336, 1e-3, 300_001).astype(np.float32)
    exact = np.exp(normal.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    error = np.abs(found(normal, exp_of_each_negative) - exact)
    assert (error <= (1.0 if HAS_FMA else 1.5) * ulp).all()

    small = np.array([-87.34, -104, -1e5, -3e38, -np.inf], np.float32)
    assert not found(small, exp_of_each_negative).any()
    # A NaN with any bits stays one.
    bits = np.array([0x7FC00000, 0xFFFFFFFF, 0x7F800001, 0xFF800123], np.uint32)
    assert np.isnan(found(bits.view(np.float32), exp_of_each_negative)).all()
    assert found(np.zeros(1, np.float32), exp_of_each_negative) == 1


@pytest.mark.skipif(not HAS_FMA, reason="looks for its instructions")
@pytest.mark.parametrize("of_each", [exp_of_each, exp_of_each_negative])
def test_llvm_vectorises_it(of_each: Any) -> None:
    found(np.zeros(1, np.float32), of_each)
    (assembly,) = of_each.inspect_asm().values()
    assert re.search(r"vfn?madd\d+ps.*[yz]mm", assembly)
