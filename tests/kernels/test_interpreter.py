"""Triton's interpreter as repaired by interpreter.py, against PyTorch.

The interpreted tests of the kernels are worth what this is worth.
"""

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton's interpreter is what is tested")
if os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip(
        "kernels run on the GPU in this process, not in the interpreter", allow_module_level=True
    )

import triton.language as tl  # noqa: E402
from interpreter import narrow, repair, widen  # noqa: E402
from ptx import run_ptx  # noqa: E402
from ptx_arithmetic import prmt  # noqa: E402

repair()

# All 65,536 bfloat16 numbers.
EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
NUMBERS = EVERY[~EVERY.isnan()]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, except that any NaN equals any NaN."""
    equal = a.view(torch.int16) == b.view(torch.int16)
    return a.dtype == b.dtype and bool((equal | (a.isnan() & b.isnan())).all())


@triton.jit
def elementwise(x, y, a, b, n, OP: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    p, q = tl.load(x + i, mask=i < n, other=0.0), tl.load(y + i, mask=i < n, other=0.0)
    if OP == "add":
        r = p + q
    elif OP == "sub":
        r = p - q
    elif OP == "mul":
        r = p * q
    elif OP == "max":
        r = tl.maximum(p, q)
    elif OP == "less":
        r = tl.where(p < q, p, q)
    elif OP == "abs":
        r = tl.abs(p)
    elif OP == "neg":
        r = -p
    else:
        r = p
    tl.store(a + i, r, mask=i < n)
    tl.store(b + i, r.to(tl.float32), mask=i < n)


OPERATIONS: dict[str, Any] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "max": torch.maximum,
    "less": lambda p, q: torch.where(p < q, p, q),
    "abs": lambda p, q: p.abs(),
    "neg": lambda p, q: -p,
    "same": lambda p, q: p,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_arithmetic_on_every_bfloat16_number_rounds_as_pytorch_does(name: str) -> None:
    shuffled = EVERY[torch.randperm(EVERY.numel(), generator=torch.Generator().manual_seed(0))]
    for y in (shuffled, EVERY.flip(0), torch.full_like(EVERY, 1.0078125)):
        found, wide = torch.empty_like(EVERY), torch.empty(EVERY.numel())
        elementwise[(4,)](EVERY, y, found, wide, EVERY.numel(), OP=name, SIZE=2**14)
        expected = OPERATIONS[name](EVERY, y)
        if name in ("max", "neg"):
            # Versions differ in what a NaN does to a maximum, and in whether -0.0 is 0.0.
            number = ~(EVERY.isnan() | y.isnan())
            assert torch.equal(found[number], expected[number])
        else:
            assert same(found, expected)
        assert torch.equal(wide.nan_to_num(), found.float().nan_to_num())


def test_casts_to_bfloat16_round_to_nearest_even() -> None:
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    # Below, on and above the middle between two of them.
    for lower in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (upper | lower).to(torch.int32).view(torch.float32)
        bits = torch.from_numpy(narrow(x.numpy()).view(np.int16))
        assert same(bits.view(torch.bfloat16), x.bfloat16())
    wide = widen(EVERY.view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(wide, EVERY.float().numpy(), equal_nan=True)


@triton.jit
def cast(x, out, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@pytest.mark.parametrize("to", [torch.float16, torch.float64, torch.int32], ids=str)
def test_other_casts_from_and_to_bfloat16(to: torch.dtype) -> None:
    x = NUMBERS[NUMBERS.float().abs() < 2**15]
    x = x[: x.numel() // 4096 * 4096]
    there = torch.empty_like(x, dtype=to)
    cast[(x.numel() // 4096,)](x, there, SIZE=4096)
    assert torch.equal(there, x.to(to))
    back = torch.empty_like(x)
    cast[(x.numel() // 4096,)](there, back, SIZE=4096)
    assert same(back, there.to(torch.bfloat16))


@triton.jit
def product(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    c = tl.dot(tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :]))
    tl.store(out + m[:, None] * N + n[None, :], c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_product_sums_in_float32(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(16, 64, generator=g).to(dtype)
    b = torch.randn(64, 32, generator=g).to(dtype)
    out = torch.empty(16, 32)
    product[(1,)](a, b, out, M=16, N=32, K=64)
    exact = a.double() @ b.double()
    magnitude = a.double().abs() @ b.double().abs()
    assert ((out - exact).abs() <= 64 * 2**-24 * magnitude).all()


def test_a_product_of_a_size_that_tensor_cores_lack_is_refused() -> None:
    a = torch.zeros(16, 8, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="the inner one at least 16"):
        product[(1,)](a, a.T.contiguous(), torch.empty(16, 16), M=16, N=16, K=8)


@triton.jit
def reductions(x, total, largest, N: tl.constexpr, K: tl.constexpr):
    n = tl.arange(0, N)
    v = tl.load(x + n[:, None] * K + tl.arange(0, K)[None, :])
    tl.store(total + n, tl.sum(v, axis=1))
    tl.store(largest + n, tl.max(v, axis=1))


def test_reductions_of_bfloat16_are_computed_wide() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    total, largest = torch.empty(64, dtype=torch.bfloat16), torch.empty(64, dtype=torch.bfloat16)
    reductions[(1,)](x, total, largest, N=64, K=32)
    assert torch.equal(largest, x.amax(1))

    # One rounding to bfloat16, and 32 float32 sums.
    exact = x.double().sum(1)
    bound = 2**-8 * exact.abs() + 32 * 2**-24 * x.double().abs().sum(1)
    assert ((total.double() - exact).abs() <= bound).all()


@triton.jit
def count(out, n):
    total = 0
    for k in range(0, n, 3):
        total += k
    tl.store(out, total)


def test_a_loop_to_a_number_known_at_run_time() -> None:
    out = torch.empty(1, dtype=torch.int32)
    count[(1,)](out, 17)
    assert out.item() == sum(range(0, 17, 3))


def test_prmt_picks_bytes_and_repeats_signs() -> None:
    a, b = 0x83828180, 0x07060504
    assert hex(prmt(a, b, 0x3210)) == hex(a) and hex(prmt(a, b, 0x7654)) == hex(b)
    assert hex(prmt(a, b, 0x0426)) == "0x80048206"

    # The signs of bytes 0, 7 and 4, then byte 0.
    assert hex(prmt(a, b, 0x8FC0)) == "0xff000080"


def test_ptx_runs_statement_by_statement() -> None:
    text = "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 t, t, 0xF; or.b32 $0, t, 0x10; }"
    assert run_ptx(text, 1, [np.array([0x35, 0xFF], np.uint32)])[0].tolist() == [0x13, 0x1F]
    with pytest.raises(NotImplementedError, match=r"ex2\.approx\.f32"):
        run_ptx("{ ex2.approx.f32 $0, $1; }", 1, [np.array([0], np.uint32)])
