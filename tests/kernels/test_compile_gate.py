"""What the interpreter hides: every Triton kernel compiled for GPUs that are not here, and its machine code looked at."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton's compiler is what is tested")

HERE = Path(__file__).parent
BUDGET: dict[str, Any] = json.loads((HERE / "sass_budget.json").read_text())
SHARED = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}  # bytes that a program may have
TARGETS = pytest.mark.parametrize("target", SHARED)


@functools.cache
def gate(target: str) -> dict[str, Any]:
    """compile_gate.py in a process of its own: once triton interprets, it cannot compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", str(HERE / "compile_gate.py"), target]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def faults(row: dict[str, Any], target: str) -> list[str]:
    """What is wrong with one kernel's machine code."""
    nvidia, tile = not target.startswith("gfx"), row["kernel"] in ("_forward", "_backward")
    rules = {
        "spills registers": row["spills"] == 0 and row["stack"] == 0,
        "more shared memory than there is": row["shared"] <= SHARED[target],
        "no 128-bit access": row["wide"] > 0 or row["kernel"] in NARROW or "odd" in row["case"],
    }
    if nvidia:
        rules["computes in float64"] = not row["f64"]
        rules["divides approximately"] = not row["div.full"]
    else:
        rules["no matrix instruction"] = row["mfma"] > 0 or not (
            tile or row["kernel"] == "_partial"
        )
    if (
        target == "sm_90" and tile and row["meta"]["BM"] >= 64
    ):  # the height of a warp group's product
        rules["no wgmma"] = row["wgmma"] > 0
    return [f"{row['case']}: {row['kernel']}: {fault}" for fault, kept in rules.items() if not kept]


# Kernels that have nothing wide to move: a byte and two numbers a block; two words a lane (the tensor core's layout); partial sums.
NARROW = ("_double_quantize", "_partial", "_sum")


@TARGETS
def test_every_kernel_in_every_configuration_compiles_well(target: str) -> None:
    found = gate(target)
    assert len(found["rows"]) >= 25
    assert {row["kernel"] for row in found["rows"]} == {
        "_quantize", "_double_quantize", "_double_dequantize", "_dequantize", "_forward", "_backward", "_partial", "_sum"
    }  # fmt: skip
    assert [fault for row in found["rows"] for fault in faults(row, target)] == []
    if target == "sm_90":
        nested = [
            row["a weight"] for row in found["rows"] if row["case"] == "dequantize to bfloat16"
        ]
        skinny = [
            row["a weight"]
            for row in found["rows"]
            if row["case"].startswith("forward skinny M=1 bfloat16") and row["a weight"]
        ]
        assert nested and max(nested) <= 10
        assert skinny and max(skinny) <= 8
    if target.startswith("sm"):
        if found["triton"] not in BUDGET:
            pytest.skip(
                f"no budget of instructions for triton {found['triton']}: python tests/tools/compile_gate.py --record"
            )
        numbers = {f"{row['case']}: {row['kernel']}": row["instructions"] for row in found["rows"]}
        budget = BUDGET[found["triton"]][target]
        assert numbers.keys() == budget.keys()
        assert {key: n for key, n in numbers.items() if n > budget[key]} == {}, (
            "more instructions than recorded"
        )


@TARGETS
def test_each_fault_is_seen(target: str) -> None:
    good = {
        "case": "c",
        "kernel": "_forward",
        "spills": 0,
        "stack": 0,
        "shared": 1024,
        "wide": 2,
        "meta": {"BM": 64},
    }
    good |= {"f64": False, "div.full": False, "wgmma": 4, "mfma": 1}
    assert faults(good, target) == []
    bad: dict[str, Any] = {"spills": 1, "stack": 8, "shared": 1 << 20, "wide": 0}
    bad |= {"mfma": 0} if target.startswith("gfx") else {"f64": True, "div.full": True}
    bad |= {"wgmma": 0} if target == "sm_90" else {}
    for key, value in bad.items():
        assert len(faults(good | {key: value}, target)) == 1, key
