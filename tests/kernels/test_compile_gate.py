"""What the interpreter hides: every Triton kernel compiled for GPUs that are not here.

tests/tools/compile_gate.py compiles and describes the machine code; the rules are here.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton's compiler is what is tested")

TOOLS = Path(__file__).resolve().parents[1] / "tools"
BUDGET: dict[str, Any] = json.loads((TOOLS / "sass_budget.json").read_text())

# Bytes of shared memory that a program may have.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TARGETS = pytest.mark.parametrize("target", SHARED)
# All kernels for one target take a minute.
IN_SOAK = {"sm_100"}
ALL_KERNELS = pytest.mark.parametrize(
    "target",
    [pytest.param(t, marks=[pytest.mark.soak] if t in IN_SOAK else []) for t in SHARED],
)

KERNELS = {
    "_quantize",
    "_double_quantize",
    "_double_dequantize",
    "_dequantize",
    "_dropout",
    "_forward",
    "_backward",
    "_partial",
    "_sum",
}

# Nothing wide to move: one byte and two numbers per block; two words per lane (the layout of the
# tensor core); partial sums.
NARROW = ("_double_quantize", "_partial", "_sum")


@functools.cache
def gate(target: str) -> dict[str, Any]:
    """Runs compile_gate.py in a process of its own: once triton interprets, it cannot compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", str(TOOLS / "compile_gate.py"), target]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def faults(row: dict[str, Any], target: str) -> list[str]:
    """What is wrong with the machine code of one kernel."""
    is_nvidia = not target.startswith("gfx")
    is_tile = row["kernel"] in ("_forward", "_backward")
    may_be_narrow = row["kernel"] in NARROW or "odd" in row["case"]
    rules = {
        "spills registers": row["spills"] == 0 and row["stack"] == 0,
        "more shared memory than there is": row["shared"] <= SHARED[target],
        "no 128-bit access": row["wide"] > 0 or may_be_narrow,
    }

    if is_nvidia:
        rules["computes in float64"] = not row["f64"]
        rules["divides approximately"] = not row["div.full"]
    elif is_tile or row["kernel"] == "_partial":
        rules["no matrix instruction"] = row["mfma"] > 0

    # 64 is the height of a warp group's product.
    if target == "sm_90" and is_tile and row["meta"]["BM"] >= 64:
        rules["no wgmma"] = row["wgmma"] > 0
    return [f"{row['case']}: {row['kernel']}: {fault}" for fault, kept in rules.items() if not kept]


@ALL_KERNELS
def test_every_kernel_in_every_configuration_compiles_well(target: str) -> None:
    rows = gate(target)["rows"]
    assert len(rows) >= 25
    assert {row["kernel"] for row in rows} == KERNELS
    assert [fault for row in rows for fault in faults(row, target)] == []


@pytest.mark.parametrize("target", [target for target in SHARED if target.startswith("sm")])
def test_no_kernel_has_more_instructions_than_recorded(target: str) -> None:
    found = gate(target)
    version = found["triton"]
    if version not in BUDGET:
        pytest.skip(
            f"no budget of instructions for triton {version}: "
            "python tests/tools/compile_gate.py --record"
        )

    budget = BUDGET[version][target]
    numbers = {f"{row['case']}: {row['kernel']}": row["instructions"] for row in found["rows"]}
    assert numbers.keys() == budget.keys()
    assert {key: n for key, n in numbers.items() if n > budget[key]} == {}


@pytest.mark.parametrize(
    ("case", "most"), [("dequantize to bfloat16", 10), ("forward skinny M=1 bfloat16", 8)]
)
def test_instructions_per_weight(case: str, most: float) -> None:
    rows = gate("sm_90")["rows"]
    found = [row["per weight"] for row in rows if row["case"] == case and row["per weight"]]
    assert found and max(found) <= most


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
        "f64": False,
        "div.full": False,
        "wgmma": 4,
        "mfma": 1,
    }
    assert faults(good, target) == []

    bad: dict[str, Any] = {"spills": 1, "stack": 8, "shared": 1 << 20, "wide": 0}
    bad |= {"mfma": 0} if target.startswith("gfx") else {"f64": True, "div.full": True}
    bad |= {"wgmma": 0} if target == "sm_90" else {}
    for key, value in bad.items():
        assert len(faults(good | {key: value}, target)) == 1, key
