"""What the interpreter hides: every Triton kernel compiled for GPUs that are not here.

tests/tools/compile_gate.py compiles and describes the machine code; the rules are here. Everything
is compiled for one target in `make test`, the main loops of the products for the others; `make
soak` compiles everything for all.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton's compiler is what is tested")

import machine_code

TOOLS = Path(__file__).resolve().parents[1] / "tools"
BUDGET: dict[str, Any] = json.loads((TOOLS / "sass_budget.json").read_text())

# Bytes of shared memory that a program may have: CUDA's programming guide, "technical
# specifications per compute capability", and AMD's LDS.
SHARED = {
    "sm_75": 64 << 10,
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
TARGETS = pytest.mark.parametrize("target", SHARED)
IN_FULL = "sm_90"

# sm_86 is compiled as sm_89 is, up to the assembler.
SAMPLED = [target for target in SHARED if target not in (IN_FULL, "sm_86")]

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
TILES = {"_forward", "_backward"}

# Instructions of the skinny kernel's loop per weight, by rows of x: at most so many.
MOST_PER_WEIGHT = {
    "sm_80": {8: 6.2, 16: 6.2},
    "sm_90": {8: 6.2, 16: 6.2, 32: 7.5, 64: 8.5},
}

# Nothing wide to move: one byte and two numbers per block; two words per lane (the layout of the
# tensor core); partial sums.
NARROW = ("_double_quantize", "_partial", "_sum")


def gate(*arguments: str) -> dict[str, Any]:
    """Runs compile_gate.py in a process of its own: once triton interprets, it cannot compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", str(TOOLS / "compile_gate.py"), *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with the machine code of one kernel."""
    target = row["target"]
    may_be_narrow = row["kernel"] in NARROW or "odd" in row["case"]
    rules = {
        "spills registers": row["spills"] == 0 and row["stack"] == 0,
        "more shared memory than there is": row["shared"] <= SHARED[target],
        "no 128-bit access": row["wide"] > 0 or may_be_narrow,
    }

    if target.startswith("sm"):
        rules["computes in float64"] = not row["f64"]
        rules["divides approximately"] = not row["div.full"]
        rules |= rules_of_loops(row, target)
    elif row["kernel"] in TILES or row["kernel"] == "_partial":
        rules["no matrix instruction"] = row["mfma"] > 0
    return [f"{row['case']}: {row['kernel']}: {fault}" for fault, kept in rules.items() if not kept]


def rules_of_loops(row: dict[str, Any], target: str) -> dict[str, bool]:
    """The main loops of the products on NVIDIA: they load ahead, and do nothing twice."""
    is_tile = row["kernel"] in TILES
    rules: dict[str, bool] = {}

    # Below sm_80 there is no asynchronous copy, and Triton makes no product of tensor cores.
    if target == "sm_75":
        return {"a tile without tensor cores": not is_tile}

    if is_tile or row["kernel"] == "_partial":
        # A wait for everything that was started: nothing is loaded while the loop computes. Two
        # stages, for a card with too little shared memory, have no buffer to load into meanwhile.
        has_buffers = row["meta"].get("num_stages", 3) > 2
        rules["waits for all of its copies"] = bool(row["in_flight"]) or not has_buffers
        rules["loads its words one step at a time"] = row["buffers"] >= 2 or not has_buffers

        # A table that is looked up by copies takes one of 4 bytes per weight; words that are not
        # seen to be aligned take one per 8 weights, absmax and its two parts one per 64.
        rules["copies by 4 bytes"] = row["narrow per weight"] < 1 / 8
        rules["no matrix instruction"] = row["mma"] > 0

    # A word is decoded by the lane whose tensor core wants it.
    if row["kernel"] == "_partial":
        rules["moves weights between lanes"] = row["shuffles"] == 0
        most = MOST_PER_WEIGHT.get(target, {}).get(row["meta"]["MB"], math.inf)
        rules[f"more than {most} instructions per weight"] = row["per weight"] <= most

    # 64 is the height of a warp group's product.
    if target == "sm_90" and is_tile and row["meta"]["BM"] >= 64:
        rules["no wgmma"] = row["wgmma"] > 0
    return rules


def over_budget(found: dict[str, Any], target: str) -> dict[str, tuple[int, int]]:
    """The kernels that have more instructions than recorded: (found, recorded)."""
    budget = BUDGET.get(found["triton"], {}).get(target, {})
    rows = (row for row in found["rows"] if row["target"] == target and "instructions" in row)
    numbers = {f"{row['case']}: {row['kernel']}": row["instructions"] for row in rows}
    return {key: (n, budget[key]) for key, n in numbers.items() if n > budget.get(key, n)}


def check_everything(found: dict[str, Any], target: str) -> None:
    rows = found["rows"]
    assert {row["kernel"] for row in rows} == (KERNELS - TILES if target == "sm_75" else KERNELS)
    assert [fault for row in rows for fault in faults(row)] == []
    if target.startswith("gfx"):
        return

    assert over_budget(found, target) == {}
    recorded = BUDGET.get(found["triton"], {}).get(target)
    if recorded is None:
        pytest.skip(
            f"no budget of instructions for triton {found['triton']} and {target}: "
            "python tests/tools/compile_gate.py --record"
        )
    assert {f"{row['case']}: {row['kernel']}" for row in rows} == recorded.keys()


def test_every_kernel_in_every_configuration_compiles_well() -> None:
    found = gate(IN_FULL)
    rows = [row for row in found["rows"] if row["case"] == "dequantize to bfloat16"]
    assert rows and max(row["per weight"] for row in rows) <= 10
    check_everything(found, IN_FULL)


def test_the_main_loops_compile_well_for_every_target() -> None:
    found = gate("--sample", *SAMPLED)
    assert {row["target"] for row in found["rows"]} == set(SAMPLED)
    assert [(row["target"], fault) for row in found["rows"] for fault in faults(row)] == []
    assert {t: over for t in SAMPLED if (over := over_budget(found, t))} == {}


@pytest.mark.soak
@pytest.mark.parametrize("target", [target for target in SHARED if target != IN_FULL])
def test_every_kernel_compiles_well_for_every_target(target: str) -> None:
    check_everything(gate(target), target)


GOOD = {
    "case": "c",
    "kernel": "_forward",
    "spills": 0,
    "stack": 0,
    "shared": 1024,
    "wide": 2,
    "meta": {"BM": 64, "MB": 16},
    "per weight": 6.2,
    "f64": False,
    "div.full": False,
    "in_flight": 6,
    "buffers": 3,
    "weights": 32.0,
    "narrow per weight": 3 / 64,
    "shuffles": 0,
    "mma": 16,
    "wgmma": 4,
    "mfma": 1,
}


@TARGETS
def test_each_fault_is_seen(target: str) -> None:
    good = GOOD | {"target": target}
    expected = 1 if target == "sm_75" else 0
    assert len(faults(good)) == expected
    good["kernel"] = "_partial"
    assert faults(good) == []

    bad: list[dict[str, Any]] = [{"spills": 1}, {"stack": 8}, {"shared": 1 << 20}]
    if target.startswith("gfx"):
        bad.append({"mfma": 0})
    else:
        bad += [{"f64": True}, {"div.full": True}]
    if target.startswith("sm") and target != "sm_75":
        bad += [{"in_flight": 0}, {"in_flight": None}, {"buffers": 1}, {"mma": 0}]
        # Words by 4 bytes; a table.
        bad += [{"narrow per weight": 1 / 8}, {"narrow per weight": 1.0}, {"shuffles": 64}]
    for fault in bad:
        assert len(faults(good | fault)) == 1, fault

    assert len(faults(good | {"kernel": "_quantize", "wide": 0})) == 1
    if target == "sm_90":
        assert len(faults(good | {"kernel": "_forward", "wgmma": 0})) == 1
    if target in MOST_PER_WEIGHT:
        assert len(faults(good | {"per weight": 6.21})) == 1


# A loop of the low-rank term, and the main one.
TTGIR = """
  %0 = ttg.local_alloc : () -> !ttg.memdesc<3x64x8xi32, #shared, #smem, mutable>
  %1 = ttg.local_alloc : () -> !ttg.memdesc<1x64x64xbf16, #shared, #smem, mutable>
  %2 = scf.for %a = %c0 to %r step %c64 iter_args(%b = %c) -> (tensor<64x64xf32>) {
    %3 = ttg.async_wait %t {num = 0 : i32}
    %4 = tt.dot %x, %y, %b
  }
  %5 = ttg.async_wait {num = 0 : i32}
  %6 = scf.for %a = %c0 to %I step %c64 iter_args(%b = %2) -> (tensor<64x64xf32>) {
    %7 = ttg.async_wait %t, %u {num = 6 : i32}
    scf.if %e {
      %8 = ttg.async_copy_global_to_local %p, %q : tensor<64x2x!tt.ptr<f32>, #b> -> <64x2xf32>
    }
    %w = ttg.async_copy_global_to_local %p, %q {contiguity = 2 : i32} : tensor<64x8x!tt.ptr<i32>>
    %z = ttg.async_copy_global_to_local %p, %q {contiguity = 1 : i32} : tensor<64x8x!tt.ptr<i32>>
    %o = ttg.async_copy_global_to_local %p, %q {contiguity = 2 : i32} : tensor<64x8x!tt.ptr<bf16>>
    %9 = ttg.async_wait %v {num = NUM : i32}
    %10 = tt.dot %x, %y, %b
  }
  %11 = ttg.async_wait {num = 0 : i32}
"""


@pytest.mark.parametrize("num", [0, 4, 9])
def test_the_pipeline_is_that_of_the_main_loop(num: int) -> None:
    found = machine_code.pipeline(TTGIR.replace("NUM", str(num)))
    # Of the floats 64 x 2, of the words those that are not known to be neighbours; none of x.
    assert found == (min(num, 6), 3, 128 + 512)


def test_without_asynchronous_copies_there_is_no_pipeline() -> None:
    lines = TTGIR.split("\n")
    text = "\n".join(line for line in lines if "async" not in line and "i32," not in line)
    assert machine_code.pipeline(text) == (None, 0, 0)


def test_a_loop_is_what_a_backward_branch_encloses() -> None:
    lines = [(16 * i, name, "") for i, name in enumerate("MOV SHFL LDGSTS.E IADD BRA EXIT".split())]
    lines[4] = (64, "BRA", " 0x10")
    assert machine_code.loops(lines) == [["SHFL", "LDGSTS.E", "IADD", "BRA"]]
    lines[4] = (64, "BRA", " 0x50")
    assert machine_code.loops(lines) == []


def test_a_kernel_behind_others_is_described_as_if_it_were_alone() -> None:
    branch, load = (0x1230, "BRA", " 0x1210"), (0x1220, "LDG.E", " R2, [R4+0x1210]")
    assert machine_code._moved(branch, 0x1200) == (0x30, "BRA", " 0x10")
    assert machine_code._moved(load, 0x1200) == (0x20, "LDG.E", " R2, [R4+0x1210]")


def test_more_instructions_than_recorded_are_seen() -> None:
    version, targets = next(iter(BUDGET.items()))
    target, budget = next(iter(targets.items()))
    (case, kernel), n = next((key.rsplit(": ", 1), n) for key, n in budget.items())

    row = {"target": target, "case": case, "kernel": kernel, "instructions": n}
    assert over_budget({"triton": version, "rows": [row]}, target) == {}
    row["instructions"] = n + 1
    expected = {f"{case}: {kernel}": (n + 1, n)}
    assert over_budget({"triton": version, "rows": [row]}, target) == expected
