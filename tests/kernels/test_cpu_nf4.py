"""kernels/cpu/nf4.py: the loops for any processor against the reference, and tiles of a weight.

tests/core/test_nf4.py compares the whole functions with the reference and with bitsandbytes.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from cancelling import cancelling_weight
from helpers import gaussian, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite.binding import get_host_cpu_features
from weights import packed_weight

from minilora.kernels.cpu import avx512, matmul, nf4
from minilora.kernels.cpu.few_rows import few_rows
from minilora.kernels.reference import nf4 as reference
from minilora.kernels.reference.nf4 import PackedWeight

TOOLS = Path(__file__).resolve().parents[1] / "tools"

# A CPU name in Numba's configuration means that the code is compiled for some other processor.
HAS_FMA = numba.config.CPU_NAME is None and get_host_cpu_features().get("fma", False)


# Oracle: the loops without AVX-512 against the reference.


def check_portable_loops() -> None:
    assert not avx512.AVX512, "the portable loops were not chosen"
    for block_size in (32, 64, 256):
        for shape in ((65, 512), (33, 7), (1, 1)):
            for double in (False, True):
                x = gaussian(*shape)
                w = packed_weight(x, block_size, double)
                assert same_bits(nf4.quantize(x, block_size), reference.quantize(x, block_size))
                check_dequantize(w)
                if shape[1] % block_size == 0:
                    check_products(w)

            absmax = reference.quantize(x, block_size)[1]
            assert same_bits(nf4.double_quantize(absmax), reference.double_quantize(absmax))

            # Every weight of level 1 is then a tie between two bfloat16 numbers.
            plain = packed_weight(x, block_size)
            check_dequantize(plain._replace(absmax=torch.full_like(absmax, 1 + 2**-8)))


def check_dequantize(w: PackedWeight) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert same_bits(nf4.dequantize(w, dtype), reference.dequantize(w, dtype)), (w, dtype)


def check_products(w: PackedWeight) -> None:
    O, I = w.shape
    wide = reference.dequantize(w, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        # One rounding of W, one of each sum (in float32), one of the result.
        relative = 1.5 * torch.finfo(dtype).eps + I * 2**-24
        for rows in (1, 5):
            x, dy = gaussian(rows, I).to(dtype), gaussian(rows, O).to(dtype)
            y, dx = matmul.nf4_linear(x, w, None), matmul.nf4_linear_backward(dy, w)
            for found, left, right in ((y, x, wide.T), (dx, dy, wide)):
                error = (found.double() - left.double() @ right).abs()
                bound = relative * (left.double().abs() @ right.abs())
                assert (error <= bound).all(), (w.block_size, dtype, rows)


def test_the_portable_loops_equal_the_reference(tmp_path: Path) -> None:
    """In a process of its own, where Numba compiles for a processor without AVX-512."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "import test_cpu_nf4; test_cpu_nf4.check_portable_loops()"],
        env=os.environ | environment | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


# Oracle: product and sum both round, so these weights are 0, as `cancelling_weight` says.


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("code", [5, 50, 90])
def test_an_absmax_is_rounded_twice(code: int, quant_type: str) -> None:
    w = cancelling_weight((64, 128), 64, quant_type, code)
    assert w.absmax2 is not None and w.offset is not None
    assert not nf4.double_dequantize(w.absmax, w.absmax2, w.offset).any()
    check_dequantize(w)

    # Each way to multiply decodes for itself.
    for dtype in (torch.float32, torch.bfloat16):
        assert not nf4.dequantize(w, dtype).any()
        for rows in (1, 2, 5, 16):
            x, dy = gaussian(rows, 128).to(dtype), gaussian(rows, 64).to(dtype)
            assert not few_rows(x, w).any()
            assert not matmul.nf4_linear(x, w, None).any()
            assert not matmul.nf4_linear_backward(dy, w).any()


@pytest.mark.skipif(not HAS_FMA, reason="the processor has no fused multiply-add")
def test_an_absmax_that_is_fused_would_be_seen() -> None:
    """The library's own formula, compiled as it must not be."""
    formula: Any = nf4.absmax_of_block
    fused = numba.njit(fastmath={"contract"})(formula.py_func)
    w = cancelling_weight((64, 128))
    assert w.absmax2 is not None and w.offset is not None
    parts = nf4.array(w.absmax), nf4.array(w.absmax2), np.float32(w.offset.item())
    assert formula(0, *parts) == 0 and fused(0, *parts) != 0


# Property: a tile is a part of the dense weight, and nothing beside it is written.


@settings(max_examples=100)
@given(
    rows=st.integers(1, 9),
    blocks=st.integers(1, 5),
    block_size=st.sampled_from([32, 64, 96, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    double=st.booleans(),
    data=st.data(),
)
def test_a_tile_is_a_part_of_the_dense_weight(
    rows: int, blocks: int, block_size: int, dtype: torch.dtype, double: bool, data: st.DataObject
) -> None:
    w = packed_weight(gaussian(rows, blocks * block_size), block_size, double)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, blocks - 1))
    bottom, right = data.draw(st.integers(top + 1, rows)), data.draw(st.integers(left + 1, blocks))
    expected = reference.dequantize(w, dtype)
    expected = expected[top:bottom, left * block_size : right * block_size]

    guard = 64
    memory = torch.full((guard + expected.numel() + guard,), torch.nan, dtype=dtype)
    out = memory[guard:-guard]
    nf4.dequantize_tile(w, out, (top, bottom), (left, right), blocks)
    assert torch.equal(out.view(expected.shape), expected)
    assert memory[:guard].isnan().all() and memory[-guard:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_odd_last_weight_is_written_and_nothing_behind_it(dtype: torch.dtype) -> None:
    w = packed_weight(gaussian(1, 65))
    memory = torch.full((66,), torch.nan, dtype=dtype)
    nf4.dequantize_tile(w, memory[:65], (0, 2), (0, 1), 1)
    assert torch.equal(memory[:65], reference.dequantize(w, dtype).flatten())
    assert memory[65].isnan()
