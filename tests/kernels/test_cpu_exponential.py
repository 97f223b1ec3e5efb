"""The exponential of the CPU's kernels: against float64, at the edges of float32, vectorised."""

import re

import numba
import numpy as np
import pytest
from llvmlite.binding import get_host_cpu_features

from minilora.kernels.cpu.exponential import exp

# A CPU name in Numba's configuration means that the code is compiled for some other processor.
HAS_FMA = numba.config.CPU_NAME is None and get_host_cpu_features().get("fma", False)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def exp_of_each(x: np.ndarray, y: np.ndarray) -> None:
    for i in range(np.uint64(x.size)):
        y[i] = exp(x[i])


def found(x: np.ndarray) -> np.ndarray:
    y = np.full_like(x, np.nan)
    exp_of_each(x, y)
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


@pytest.mark.skipif(not HAS_FMA, reason="looks for its instructions")
def test_llvm_vectorises_it() -> None:
    found(np.zeros(1, np.float32))
    (assembly,) = exp_of_each.inspect_asm().values()
    assert re.search(r"vfn?madd\d+ps.*[yz]mm", assembly)
