"""The kernels' PTX for sm_80, executed on a CPU: products, conversions, planted faults, traffic.

The tools in tests/tools/ptx_*.py do it, in processes of their own: once triton interprets, it
cannot compile. What the emulator itself computes is tested in test_ptx_machine.py.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton compiles the kernels that are executed")

TOOLS = Path(__file__).resolve().parents[1] / "tools"
BUDGET: dict[str, Any] = json.loads((TOOLS / "traffic_budget.json").read_text())

# Why a planted fault may go unnoticed in some place: it changes nothing that is seen.
UNSEEN = {
    "a barrier removed": "no two warps touch the same bytes between the ones around it",
    "a wait removed": "after the loop nothing is read of what was copied",
    "a wait for one group too few": "after the loop nothing is read of what was copied",
    "a commit removed": "a later commit of the same iteration takes the copies along, or the last "
    "copies are not read",
    "the mask of a load dropped": "it is always true, or holds for all rows of this size",
    "the mask of a copy dropped": "it holds for all rows of this size, or the copy is for an "
    "iteration beyond the last, which is not read",
    "a load one element further": "a neighbouring absmax in the table of 8-bit codes differs by "
    "less than the bound",
    "a store one element further": "the store is masked off in all threads",
}


def run_tool(name: str, *options: str) -> dict[str, Any]:
    """Runs a tool in a process of its own and returns the JSON that it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", str(TOOLS / f"{name}.py"), *options]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.stdout, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_sample_of_products_is_right() -> None:
    result = run_tool("ptx_products", "--count", "16")
    assert result["wrong"] == [] and result["faults"] == []
    assert result["ran"] == 16


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_hundreds_of_products_are_right(seed: int) -> None:
    result = run_tool("ptx_products", "--seed", str(seed), "--count", "100")
    assert result["wrong"] == [] and result["faults"] == []
    kinds = result["kinds"]
    products = {"forward skinny", "forward tile", "forward dense", "backward tile"}
    assert result["ran"] == 100 and products <= kinds.keys()


def unexplained(rows: list[dict[str, Any]]) -> list[str]:
    """Places in which a fault is missed and no reason is known."""
    return [
        f"{row['product']}: {row['fault']}: {missed}"
        for row in rows
        for missed in row["missed"]
        if row["fault"] not in UNSEEN
    ]


def test_planted_faults_are_found() -> None:
    options = "--places", "3", "--products", "3", "--until-found"
    rows = run_tool("ptx_faults", *options)["rows"]
    assert len({row["fault"] for row in rows}) >= 15
    assert unexplained(rows) == []

    found = [bool(row["found"]) for row in rows]
    assert sum(found) >= 0.9 * len(found)


@pytest.mark.soak
def test_planted_faults_are_found_in_many_places() -> None:
    rows = run_tool("ptx_faults", "--places", "6")["rows"]
    assert unexplained(rows) == []
    every = {row["fault"] for row in rows}
    assert len(every) >= 15
    assert every == {row["fault"] for row in rows if row["found"]}


def test_an_absmax_is_rounded_twice_wherever_bits_are_promised() -> None:
    """Fused, the absmax of a tile differs in its last bit, which no other test sees in 16 bits.

    The skinny product is not among these: it promises an error bound, and fuses on purpose.
    """
    rows = run_tool("ptx_fusion")["rows"]
    kernels = {kernel for row in rows for kernel in row["kernels"]}
    assert kernels == {"_double_dequantize", "_dequantize", "_forward", "_backward"}
    for row in rows:
        assert row["not 0"] == 0, row
        assert row["fusible"] == [], row
        # Fused, only weights of level 0 are 0.
        assert row["not 0 if fused"] > row["of"] / 2, row


@functools.cache
def traffic() -> dict[str, Any]:
    return run_tool("ptx_traffic", "--json")


def test_no_product_moves_more_than_recorded() -> None:
    found = traffic()
    version = found["triton"]
    if version not in BUDGET:
        pytest.skip(
            f"no budget of traffic for triton {version}: python tests/tools/ptx_traffic.py --record"
        )
    assert found["table"].keys() == BUDGET[version].keys()
    higher = {
        f"{case}: {what}": (n, BUDGET[version][case][what])
        for case, row in found["table"].items()
        for what, n in row.items()
        if n > BUDGET[version][case].get(what, n)
    }
    assert higher == {}


def test_recorded_numbers_only_go_down() -> None:
    from ptx_traffic import limits, lowered

    found = {"a": {"shared wavefronts": 3.0, "global sectors": 2.0, "PTX instructions": 9.0}}
    held = {"a": {"shared wavefronts": 2.0, "global sectors": 4.0}, "gone": {"global sectors": 1.0}}
    assert limits(found) == {"a": {"shared wavefronts": 3.0, "global sectors": 2.0}}
    assert lowered(limits(found), held) == {"a": {"shared wavefronts": 2.0, "global sectors": 2.0}}
    assert lowered(limits(found), {}) == limits(found)
