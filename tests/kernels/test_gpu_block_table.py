"""The tiles decode exactly the weights of `dequantize`: the table in registers, and products."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu import on_device
from ptx import run_ptx
from weights import packed_weight

from minilora.kernels.gpu import matmul
from minilora.kernels.gpu.block_table import table_ptx
from minilora.kernels.reference import nf4 as reference
from minilora.kernels.reference.codebooks import levels

TOOLS = Path(__file__).resolve().parents[1] / "tools"
HALVES = (torch.bfloat16, torch.float16)
TILE = {"path": "tile", "BM": 64, "BO": 64, "BI": 64, "warps": 4, "stages": 4}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_table_of_a_block_holds_its_16_weights(quant_type: str, dtype: torch.dtype) -> None:
    # Ordinary numbers, zero, results that are denormal, that round to zero, and to infinity.
    ordinary = 4 * torch.rand(1000, generator=torch.Generator().manual_seed(0))
    absmax = torch.cat([ordinary, 2.0 ** torch.arange(-130, 120), torch.zeros(1)])

    found = run_ptx(table_ptx(quant_type, dtype), 8, [absmax.view(torch.int32).numpy()])
    planes = np.stack(found, axis=1).astype("<u4").view(np.uint8).reshape(-1, 2, 16)
    weights = planes[:, 0] | planes[:, 1].astype(np.uint16) << 8

    expected = (levels(quant_type) * absmax[:, None]).to(dtype)
    assert np.array_equal(weights.view(np.int16), expected.view(torch.int16).numpy())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("double", [False, True])
def test_the_identity_times_a_weight_gives_what_dequantize_gives(
    double: bool, dtype: torch.dtype
) -> None:
    w = packed_weight(0.1 * torch.randn(70, 128), 64, double)
    W, held = reference.dequantize(w, dtype), on_device(w)
    wide, tall = torch.eye(128).to(held.device, dtype), torch.eye(70).to(held.device, dtype)
    assert torch.equal(matmul.forward(wide, held, None, None, TILE).cpu(), W.T)
    assert torch.equal(matmul.backward(tall, held, None, TILE).cpu(), W)


def executed() -> list[dict[str, Any]]:
    """Runs ptx_weights.py in a process of its own: once triton interprets, it cannot compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", str(TOOLS / "ptx_weights.py")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_the_compiled_tiles_do_too() -> None:
    found = executed()
    assert len(found) == 4
    assert [case for case in found if case["differ"]] == []
