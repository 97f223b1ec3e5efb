"""The CPU benchmarks' own code: they refuse what is wrong or disturbed, and write the page."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import BENCH, ROOT, load

from minilora.huggingface import heap

bench = load("side_by_side")
plots = load("plots")
sides = load("sides")
train_step = load("train_step")

EPYC = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
EPYC += "flags\t\t: fpu avx2 avx512f avx512_bf16\n\nprocessor\t: 1\nmodel name\t: other\n"


# -- a quiet machine -----------------------------------------------------------------------------


def test_busy_time_leaves_out_idle_and_waiting() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    # user, nice, system, idle, iowait, irq, softirq, steal, guest
    stat = f"cpu  {3 * ticks} {ticks} {ticks} {90 * ticks} {50 * ticks} 0 0 {2 * ticks} 9 9\ncpu0 1"
    assert bench.busy_seconds(stat) == 7


def test_the_share_of_other_programs_leaves_out_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"busy_seconds": 100.0, "own_seconds": 10.0}
    for name in times:
        monkeypatch.setattr(bench, name, lambda name=name: times[name])
    monkeypatch.setattr(bench.time, "monotonic", lambda: times["busy_seconds"] / 10)
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 2)
    others = bench.Others()
    times.update(busy_seconds=120.0, own_seconds=29.0)
    assert others.share() == pytest.approx((20 - 19) / 2 / 2)


@pytest.mark.parametrize(("share", "refused"), [(0.04, False), (0.06, True)])
def test_it_waits_for_a_quiet_machine_and_then_refuses(
    share: float, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.Others, "share", lambda self: share)
    if not refused:
        bench.wait_for_quiet(patience=0, interval=0)
        return
    with pytest.raises(SystemExit, match=r"other programs use 6% .* --noisy"):
        bench.wait_for_quiet(patience=0, interval=0)


def test_sides_take_turns_in_alternating_order() -> None:
    order: list[str] = []

    def measure(side: str) -> dict[str, Any]:
        order.append(side)
        return {"others": 0.0, "number": len(order)}

    results = bench.in_turn(measure, ("a", "b"), rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [one["number"] for one in results["b"]] == [2, 3, 6]
    assert bench.median(results["b"], "number") == 3


def test_a_disturbed_measurement_is_repeated_and_then_refused() -> None:
    shares = iter([0.5, 0.01, 0.5, 0.5, 0.5])

    def measure(side: str) -> dict[str, Any]:
        return {"others": next(shares)}

    assert bench.in_turn(measure, ("a",), rounds=1) == {"a": [{"others": 0.01}]}
    with pytest.raises(SystemExit, match="a: other programs used 50%"):
        bench.in_turn(measure, ("a",), rounds=1)


def test_a_noisy_run_keeps_what_it_measured() -> None:
    kept = bench.in_turn(lambda side: {"others": 0.9}, ("a",), rounds=2, noisy=True)
    assert kept == {"a": [{"others": 0.9}] * 2}


# -- processes -----------------------------------------------------------------------------------


def test_a_child_gets_its_arguments_and_its_last_line_is_the_result(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, sys\nprint('a library says hello')\n"
        "given = json.loads(sys.argv[2])\n"
        "print(json.dumps(given | {'OpenMP': os.environ['OMP_NUM_THREADS']}))\n"
    )
    found = bench.run(str(script), {"n": 21}, threads=1)
    assert 0 <= found.pop("others") <= 1.1
    assert found == {"n": 21, "threads": 1, "OpenMP": "1"}


def test_what_a_child_fails_with_is_named(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text("raise ValueError('no such side')")
    with pytest.raises(SystemExit, match=r"child.py \{\"side\": \"x\"\}: ValueError: no such side"):
        bench.run(str(script), {"side": "x"}, threads=1)


# -- a wrong result is not timed -----------------------------------------------------------------


@pytest.mark.parametrize("other", [[1.0, 2.2], [1.0, float("nan")], [1.0]])
def test_losses_that_differ_end_the_run(other: list[float]) -> None:
    bench.check_close("case", [1.0, 2.0], [1.0, 2.09], bound=0.1)
    with pytest.raises(SystemExit, match=r"case: .*timed"):
        bench.check_close("case", [1.0, 2.0], other, bound=0.1)


def results_of(losses: dict[str, list[float]], trained: int = 8) -> dict[str, Any]:
    return {side: [{"losses": found, "trained": trained}] for side, found in losses.items()}


def test_each_step_is_compared_where_the_roundings_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bfloat16, float32 = sides.Case(), sides.Case(dtype="float32")

    def check(case: sides.Case, other: str, losses: list[float]) -> None:
        ours = [{"losses": [3.0, 2.0], "trained": 8}]
        found = {sides.OURS: ours} | results_of({other: losses})
        train_step.check_results(case, found)

    late, wrong = [3.0, 2.8], [3.1, 2.0]
    for has_it in (True, False):
        monkeypatch.setattr(train_step, "AVX512_BF16", has_it)
        check(bfloat16, sides.SAME_DTYPE, late)
        for case in (bfloat16, sides.Case(dropout=0.05)):
            with pytest.raises(SystemExit, match="step 1"):
                check(case, sides.THEIRS, wrong)
        with pytest.raises(SystemExit, match="step 2"):
            check(float32, sides.THEIRS, late)

    check(bfloat16, sides.THEIRS, late)
    monkeypatch.setattr(train_step, "AVX512_BF16", True)
    with pytest.raises(SystemExit, match="step 2"):
        check(bfloat16, sides.THEIRS, late)

    two_rounds = results_of({sides.OURS: [3.0, 2.0]})
    two_rounds[sides.OURS] += results_of({sides.OURS: late})[sides.OURS]
    with pytest.raises(SystemExit, match="step 2"):
        train_step.check_results(bfloat16, two_rounds)


def test_the_same_numbers_have_to_be_trained() -> None:
    results = results_of({sides.OURS: [3.0], sides.THEIRS: [3.0]})
    results[sides.THEIRS][0]["trained"] = 7
    with pytest.raises(SystemExit, match="trained numbers"):
        train_step.check_results(sides.Case(), results)


# -- tables, stored results, the page ------------------------------------------------------------


def machine(name: str = "AMD EPYC") -> dict[str, Any]:
    found: dict[str, Any] = bench.machine(2, EPYC.replace("AMD EPYC", name))
    return found


def train_step_results() -> dict[str, Any]:
    def row(batch: int, length: int, ours: float, theirs: float) -> dict[str, Any]:
        figures = {"peak": 2e9, "peak above imports": 1.5e9, "loading above imports": 1e9}
        both = {sides.OURS: ours, sides.THEIRS: theirs}
        return {
            "case": sides.Case(batch=batch, length=length).to_dict(),
            "sides": {side: figures | {"seconds": seconds} for side, seconds in both.items()},
        }

    growth = [row(1, 64, 0.2, 0.3), row(1, 256, 0.5, 0.8), row(2, 256, 1.05, 1.5)]
    main = {"name": "step"} | row(4, 256, 1.5, 3.0)
    return {"machine": machine(), "rounds": 3, "rows": [main], "growth": growth}


def test_the_machine_is_named_by_its_first_processor() -> None:
    found = machine()
    assert found["processor"] == "AMD EPYC (family 25, model 17)"
    assert found["features"] == ["avx2", "avx512f", "avx512_bf16"]
    assert bench.file_name(found) == "amd-epyc-family-25-model-17"
    assert f"torch {torch.__version__.split('+')[0]}" in bench.describe(found)


def test_the_table_shows_ours_over_theirs() -> None:
    lines = train_step.main_table(train_step_results()["rows"]).splitlines()
    assert lines[2].startswith("| step | minilora | 1.50 |  | 2,000 |  | 1,500 |  |")
    assert lines[3] == "|  | peft + bitsandbytes | 3.00 | 0.50 | 2,000 | 1.00 | 1,500 | 1.00 |"


def test_growth_is_tokens_per_second_and_the_cost_of_a_doubling() -> None:
    growth = train_step_results()["growth"]
    assert "| 2 x 256 | 488 | 341 | 1.43 |" in train_step.growth_table(growth)
    assert train_step.doublings(growth, sides.OURS) == {"1 -> 2 x 256": pytest.approx(2.1)}


def test_results_of_another_processor_stay(tmp_path: Path) -> None:
    bench.store("train_step", train_step_results(), tmp_path)
    bench.store("train_step", train_step_results() | {"machine": machine("Xeon")}, tmp_path)
    newer = train_step_results() | {"rounds": 5}
    bench.store("train_step", newer, tmp_path)
    found = [
        (one["machine"]["processor"][:4], one["rounds"])
        for one in bench.stored("train_step", tmp_path)
    ]
    assert found == [("AMD ", 5), ("Xeon", 3)]


def test_the_page_has_a_table_and_a_plot_per_processor(tmp_path: Path) -> None:
    page = load("page")
    folder = tmp_path / "benchmarks"
    for name in ("AMD EPYC", "Xeon"):
        bench.store("train_step", train_step_results() | {"machine": machine(name)}, folder)
    text = page.render("".join(f"<!-- {n} -->\nold\n<!-- /{n} -->\n" for n in page.BLOCKS), folder)
    assert "old" not in text
    assert text.count("| step | minilora |") == 2
    for name in ("amd-epyc", "xeon"):
        picture = f"benchmarks/{name}-family-25-model-17/growth.svg"
        assert f"({picture})" in text
        assert ET.parse(tmp_path / picture).getroot().tag.endswith("svg")
    assert text.count("Not measured yet.") == len(page.BLOCKS) - 1
    assert page.render(text, folder) == text


def test_a_page_without_a_script_s_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_step"):
        load("page").render("<!-- generate -->\n<!-- /generate -->", tmp_path)


def test_the_published_page_is_what_the_stored_results_make(tmp_path: Path) -> None:
    """To renew it: python tests/bench/page.py"""
    import shutil

    page = load("page")
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    if bench.RESULTS.exists():
        shutil.copytree(bench.RESULTS, folder, dirs_exist_ok=True)
    assert page.render(page.PAGE.read_text(), folder) == page.PAGE.read_text()
    for plot in folder.rglob("*.svg"):
        assert plot.read_text() == (bench.RESULTS / plot.relative_to(folder)).read_text()


def test_the_plot_starts_at_zero_and_holds_every_point() -> None:
    growth = train_step_results()["growth"]
    assert plots.series(growth, sides.OURS, "length") == [(64, 320), (256, 512)]
    assert plots.series(growth, sides.OURS, "batch") == [(1, 512), (2, pytest.approx(487.6, 1e-3))]
    assert [plots.nice_ceiling(value) for value in (487, 512, 81, 1.5)] == [500, 800, 100, 2]
    assert plots.at_y(0, 800) == plots.BOTTOM


def test_times_of_a_disturbed_machine_are_not_stored() -> None:
    command = [sys.executable, str(BENCH / "train_step.py"), "--noisy", "--store"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "not quiet are not stored" in done.stderr


def test_memory_is_read_for_this_process_alone() -> None:
    # Or the tensor might lie in memory that earlier tests have left in the heap.
    heap.return_freed_memory()
    bench.restart_peak()
    start = bench.memory()
    kept = torch.ones(64 << 20, dtype=torch.uint8)
    assert 60e6 < bench.memory() - start < 80e6
    del kept
    with pytest.raises(ValueError, match="VmNothing"):
        bench.memory("VmNothing")


def test_every_case_is_json() -> None:
    for case in (*train_step.MAIN.values(), *train_step.GROWTH):
        assert sides.Case(**json.loads(json.dumps(case.to_dict()))) == case
    assert len({str(case) for case in train_step.GROWTH}) == len(train_step.GROWTH)
