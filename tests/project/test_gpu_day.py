"""`make gpu-day` without a GPU: every step runs, a failing one does not stop the others.

A dry run invents no figure.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_scripts import BENCH, ROOT, load

pytest.importorskip("triton", reason="a GPU's day is spent on Triton kernels")

day = load("gpu_day")
report = load("gpu_day_report")

MACHINE = {"card": "Card 9", "driver": "1.2", "versions": {"torch": "3"}, "date": "2026-01-02"}

# Not interpreted, and without a GPU, wherever the tests run.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = ""


def python(name: str, code: str, limit: float = 60, **more: Any) -> Any:
    return day.Step(name, f"It is {name}.", [sys.executable, "-c", code], limit, {}, **more)


def spend(steps: list[Any], folder: Path, dry_run: bool = False) -> tuple[bool, Any, str]:
    """Runs steps: whether all is well, the JSON and the Markdown."""
    is_good = day.spend({"dry run": dry_run, "machine": MACHINE, "steps": []}, steps, folder)
    return is_good, json.loads((folder / "gpu_day.json").read_text()), read(folder)


def read(folder: Path) -> str:
    return (folder / "gpu_day.md").read_text()


def dry_run(folder: Path, *only: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "gpu_day.py"), "--dry-run", "--out", str(folder)]
    command += ["--only", *only] if only else []
    return subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=500, check=False
    )


# -- steps ---------------------------------------------------------------------------------------


def test_a_step_that_fails_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    steps = [
        python("first", "raise ValueError('the first is broken')"),
        python("gone", "import os; os.kill(os.getpid(), 9)"),
        python("absent", "", needs="no-such-program"),
        python("last", "print('all is well')"),
    ]
    is_good, written, text = spend(steps, tmp_path)
    assert not is_good
    statuses = [outcome["status"] for outcome in written["steps"]]
    assert statuses == ["failed", "failed", "skipped", "passed"]
    assert "ValueError: the first is broken" in text
    assert "no-such-program is not installed" in text
    assert "## Last\n\nIt is last.\n\nall is well\n" in text
    assert all(outcome["seconds"] for outcome in written["steps"] if outcome["name"] != "absent")
    assert text.startswith("# Card 9\n") and "driver 1.2; torch 3; 2026-01-02." in text


def test_a_step_over_its_limit_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(lives)!r}).touch()"
    code = f"import subprocess, sys; print('begun', flush=True); \
subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.perf_counter()
    is_good, written, text = spend([python("long", code, limit=1.0), python("next", "")], tmp_path)
    assert not is_good
    assert [outcome["status"] for outcome in written["steps"]] == ["stopped", "passed"]
    assert "begun" in text and "stopped after 1 seconds" in text
    time.sleep(max(0.0, 2.5 - (time.perf_counter() - start)))
    assert not lives.exists()


def test_a_command_that_does_not_exist_is_a_failed_step(tmp_path: Path) -> None:
    step = day.Step("none", "None.", ["/no/such/program"], 5, {})
    is_good, written, _ = spend([step], tmp_path)
    assert not is_good and written["steps"][0]["status"] == "failed"


def test_what_a_step_found_stands_beside_its_faults(tmp_path: Path) -> None:
    found = {
        "tables": [{"title": "T", "rows": [{"rows": 16, "µs": 12.345}], "measured": ["µs"]}],
        "faults": ["forward M=16 tile: the result is wrong, so it is not timed"],
    }
    code = f"import sys, json; json.dump({found!r}, open(sys.argv[1], 'w')); sys.exit(1)"
    step = day.Step("half", "Half.", [sys.executable, "-c", code, "{out}"], 60, {})
    is_good, _, text = spend([step], tmp_path)
    assert not is_good
    assert "the result is wrong, so it is not timed" in text and "| 16 | 12.3 |" in text


# -- the report ----------------------------------------------------------------------------------


def lose_the_machine(folder: Path, during: str) -> None:
    """Runs three steps. In the second, or while its report is written, this process is killed."""

    def write_half(path: Path, text: str, encoding: str) -> None:
        if "It is second." not in text:
            path.write_bytes(text.encode(encoding))
            return
        path.write_bytes(text.encode(encoding)[: len(text) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    kill = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"
    if during == "report":
        Path.write_text = write_half  # type: ignore[assignment, method-assign]
    second = python("second", kill if during == "step" else "")
    spend([python("first", "print('all is well')"), second, python("third", "")], folder)


@pytest.mark.parametrize("during", ["step", "report"])
def test_a_lost_machine_leaves_the_report_of_every_finished_step(
    during: str, tmp_path: Path
) -> None:
    here, tools = Path(__file__).parent, ROOT / "tests" / "tools"
    code = f"import pathlib, test_gpu_day as t; \
t.lose_the_machine(pathlib.Path({str(tmp_path)!r}), {during!r})"
    paths = [str(here), str(tools), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    written = json.loads((tmp_path / "gpu_day.json").read_text())
    assert [outcome["name"] for outcome in written["steps"]] == ["first"]
    assert read(tmp_path) == report.render(written)
    assert read(tmp_path).endswith("## First\n\nIt is first.\n\nall is well\n")

    # The next day removes the half that was written.
    spend([python("next", "")], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_day.json", "gpu_day.md"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spend([python("first", "")], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(_: Any) -> str:
        raise OSError("the disk is full")

    monkeypatch.setattr(report, "render", fail)
    with pytest.raises(OSError, match="the disk is full"):
        spend([python("second", "")], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_step_killed_while_it_writes_has_no_result(tmp_path: Path) -> None:
    """Half of its JSON would end the day."""
    code = f"""
import os, pathlib, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(BENCH)!r}]
import gpu_day_steps

def write_half(path, text, encoding=None):
    path.write_bytes(text.encode()[:9])
    print("half of it", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

pathlib.Path.write_text = write_half
gpu_day_steps.run = lambda *_: {{"faults": []}}
sys.argv[1:] = ["smoke", "--out", sys.argv[1]]
gpu_day_steps.main()
"""
    half = day.Step("half", "Half.", [sys.executable, "-c", code, "{out}"], 60, {})
    _, written, _ = spend([half, python("next", "")], tmp_path)
    first, second = written["steps"]
    assert first["status"] == "failed" and first["error"] == "half of it"
    assert first["result"] == {} and second["status"] == "passed"


# -- the days ------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_and_fails(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "gpu_day.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "no GPU here" in done.stderr and "DRY_RUN=1" in done.stderr
    assert not (tmp_path / "out").exists()


def check_that_nothing_was_invented(folder: Path) -> None:
    """No measured value in the JSON and none in the Markdown."""
    written = json.loads((folder / "gpu_day.json").read_text())
    assert written["dry run"] and not any(isinstance(value, float) for value in leaves(written))
    tables = [each for step in written["steps"] for each in step["result"].get("tables", ())]
    for table in tables:
        assert table["rows"] and table["measured"]
        assert all(row.get(column) is None for row in table["rows"] for column in table["measured"])
    assert all(step["seconds"] is None for step in written["steps"])

    text = read(folder)
    assert "Dry run" in text.split("\n## ")[0]
    assert text.count(report.NOT_MEASURED) >= len(written["steps"])
    # A figure with its decimals, or a unit behind it, would be a measured one.
    body = text.split("| step |")[1]
    assert not re.search(r"\d\.\d|\d ?(µs|ms|s|GB|MB|tokens/s)\b", body)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value


def test_an_invented_figure_is_seen(tmp_path: Path) -> None:
    found = {"tables": [{"title": "T", "rows": [{"M": 1, "µs": None}], "measured": ["µs"]}]}
    outcome = {"name": "n", "what": "w", "status": "s", "error": None}
    outcome |= {"seconds": None, "result": found}
    written = {"dry run": True, "machine": MACHINE, "steps": [outcome]}
    day.write(written, tmp_path)
    check_that_nothing_was_invented(tmp_path)
    for figure in (12.5, 12):
        found["tables"][0]["rows"] = [{"M": 1, "µs": figure}]
        day.write(written, tmp_path)
        with pytest.raises(AssertionError):
            check_that_nothing_was_invented(tmp_path)


def test_a_dry_run_of_the_crossover_launches_every_path(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "crossover")
    assert done.returncode == 0, done.stdout + done.stderr
    check_that_nothing_was_invented(tmp_path)
    (step,) = json.loads((tmp_path / "gpu_day.json").read_text())["steps"]
    columns = {column for each in step["result"]["tables"] for column in each["measured"]}
    assert {"dense", "skinny"} < columns and any("tile" in column for column in columns)
    assert step["result"]["stubbed launches"] > len(columns)


@pytest.mark.soak
def test_a_dry_run_goes_through_all_steps(tmp_path: Path) -> None:
    done = dry_run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    check_that_nothing_was_invented(tmp_path)
    steps = json.loads((tmp_path / "gpu_day.json").read_text())["steps"]
    assert [step["name"] for step in steps] == [step.name for step in day.steps(dry_run=True)]
    assert {step["status"] for step in steps} == {day.STUBBED}


def test_paging_comes_last_and_every_step_takes_less_than_ten_minutes() -> None:
    for dry in (False, True):
        steps = day.steps(dry)
        assert steps[0].name == "smoke" and steps[-1].name == "paging"
        assert all(step.limit < 600 for step in steps)


def test_the_test_files_are_those_of_make_test_gpu() -> None:
    target = re.search(r"^test-gpu:.*\n(\t.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert target and re.findall(r"tests/\S+\.py", target[1]) == list(day.GPU_TESTS)


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize(("options", "ending"), [((), "gpu_day.py"), (("DRY_RUN=1",), "--dry-run")])
def test_make_prints_the_command_and_runs_nothing(options: tuple[str], ending: str) -> None:
    before = sorted(path.name for path in ROOT.iterdir())

    # As if these tests were not run by make themselves.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--dry-run", "gpu-day", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.rstrip().endswith(ending)
    assert sorted(path.name for path in ROOT.iterdir()) == before


# -- what is not timed ---------------------------------------------------------------------------


def test_a_wrong_path_and_one_that_does_not_fit_are_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, checks, clock = (load(f"gpu_{name}") for name in ("day_steps", "checks", "clock"))
    monkeypatch.setattr(checks, "DEVICE", "cpu")
    monkeypatch.setattr(clock, "clock", clock.StoppedClock)
    lines = [{"path": name} for name in ("dense", "skinny", "huge")]
    monkeypatch.setattr(steps, "paths", lambda direction, M, w: lines)

    def too_large() -> torch.Tensor:
        raise steps.triton.runtime.errors.OutOfResources(300_000, 101_376, "shared memory")

    def forced(direction: str, x: torch.Tensor, w: Any, lines: list[Any]) -> Iterator[Any]:
        W = w.dequantized if direction == "forward" else w.dequantized.T
        yield lines[0], lambda: (x.float() @ W.T).to(x.dtype)
        yield lines[1], lambda: (1.1 * x.float() @ W.T).to(x.dtype)
        yield lines[2], too_large

    monkeypatch.setattr(steps, "forced", forced)
    W = checks.gaussian(64, 128).float()
    monkeypatch.setattr(checks, "packed_weight", lambda O, I: (SimpleNamespace(dequantized=W), W))
    found = steps.crossover(SimpleNamespace(square=(64, 128), rows=(1, 3)))
    for each in found["tables"]:
        assert each["measured"] == ["cuBLAS, not quantized", "dense"]
    assert found["faults"] == [
        f"{direction} M={M} skinny: {steps.WRONG}"
        for direction in ("forward", "backward")
        for M in (1, 3)
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "not measured"), (0.01234, "0.0123"), (12.34, "12.3"), (1234.5, "1,234"), (7, "7")],
)
def test_cells(value: Any, text: str) -> None:
    assert report.cell(value) == text
