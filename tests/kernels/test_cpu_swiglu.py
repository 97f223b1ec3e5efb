"""SwiGLU on the CPU: PyTorch's bits in bfloat16, and its exactness in float32."""

import pytest
import torch
from helpers import gaussian, same_bits
from torch import Tensor

from minilora.kernels.cpu import swiglu as cpu
from minilora.kernels.reference import swiglu as reference

DTYPES = (torch.float32, torch.bfloat16)


def inputs(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """dy, g and u."""
    dy, u = gaussian(*shape, seed=1), gaussian(*shape, seed=2)
    return dy.to(dtype), (4 * gaussian(*shape)).to(dtype), u.to(dtype)


def all_results(kernels: object, dy: Tensor, g: Tensor, u: Tensor) -> list[Tensor]:
    """y, dg and du."""
    return [kernels.swiglu(g, u), *kernels.swiglu_backward(dy, g, u)]  # type: ignore[attr-defined]


def test_every_bfloat16_gate_gives_the_bits_of_pytorch() -> None:
    """Infinite ones and NaN as well."""
    g = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    for seed in range(4):
        dy, u = (gaussian(1 << 16, seed=2 * seed + i).bfloat16() for i in (1, 2))
        if seed == 0:
            dy = u = torch.ones_like(g)
        results = (all_results(kernels, dy, g, u) for kernels in (cpu, reference))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_float32_is_as_exact_as_pytorch() -> None:
    dy, g, u = inputs(300, 701, dtype=torch.float32)
    exact = all_results(reference, dy.double(), g.double(), u.double())
    for ours, plain, e in zip(
        all_results(cpu, dy, g, u), all_results(reference, dy, g, u), exact, strict=True
    ):
        # Both exps are within 1 ulp: over 210,300 elements the errors are as large within some per
        # cent. Each of some 10 roundings is at most 2^-24 of a value.
        assert (ours - e).norm() <= 1.05 * (plain - e).norm()
        assert ((ours - e).abs() <= 10 * 2**-24 * (1 + e.abs()) * (1 + (dy * u).abs())).all()


def test_the_edges_of_float32() -> None:
    g = torch.tensor([0.0, -0.0, 1e30, -1e30, 89.0, -89.0, 104.0, -104.0, 1e-40, -1e-40])
    g = torch.cat([g, torch.tensor([torch.inf, -torch.inf, torch.nan])])
    one = torch.ones_like(g)
    results = (all_results(kernels, one, g, one) for kernels in (cpu, reference))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-22, atol=1e-44, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_threads_change_nothing(dtype: torch.dtype) -> None:
    dy, g, u = inputs(60, 701, dtype=dtype)
    expected = all_results(cpu, dy, g, u)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = all_results(cpu, dy.T.contiguous(), g.T, u.T.contiguous())
    finally:
        torch.set_num_threads(before)
    assert all(map(same_bits, [t.T for t in found], expected))


def test_other_dtypes_and_shapes_are_left_to_the_reference() -> None:
    given = inputs(5, 7, dtype=torch.float64)
    assert all(map(same_bits, all_results(cpu, *given), all_results(reference, *given)))
    _, g, u = inputs(5, 7, dtype=torch.float32)
    assert same_bits(cpu.swiglu(g, u[:1]), reference.swiglu(g, u[:1]))
    with pytest.raises(RuntimeError, match="size"):
        cpu.swiglu(g, u[:2])
