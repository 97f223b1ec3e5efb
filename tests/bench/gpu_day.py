"""The first hour on a GPU: every check and every figure that needs one, in order.

    make gpu-day                     or  python tests/bench/gpu_day.py
    make gpu-day DRY_RUN=1           or  python tests/bench/gpu_day.py --dry-run

Nothing is downloaded. Each step is a process of its own with a time limit of its own, so that a
kernel that hangs or spoils the device's context ends its step only; its error is in the report, and
the next step runs. The report, one Markdown file and one JSON file, is written anew after every
step, into docs/benchmarks/CARD, ready to be committed. No file is ever half written: a run that is
killed leaves the report of the steps before.

A dry run needs no GPU: launches do nothing, sizes are small, and every figure is "not measured".
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu_day_report
import gpu_machine
import side_by_side as bench

from minilora.files.atomic import atomic_files

HERE = Path(__file__).resolve().parent
STEPS = str(HERE / "gpu_day_steps.py")

# Seconds that a step may take.
LIMIT = 9 * 60

# `make test-gpu` runs the same files.
GPU_TESTS = (
    "tests/kernels/test_gpu_nf4.py",
    "tests/kernels/test_gpu_matmul.py",
    "tests/kernels/test_gpu_skinny.py",
    "tests/kernels/test_gpu_card.py",
    "tests/optim/test_paging_gpu.py",
)

# The status of a step that went through in a dry run.
STUBBED = "went through, stubbed"

# What a failed step's report has of its output.
LAST_CHARACTERS = 3000


class Step(NamedTuple):
    """One process.

    command: a file name in it that stands for {out} is where the step writes its results
    needs: a program without which the step is skipped
    """

    name: str
    what: str
    command: list[str]
    limit: float
    environment: dict[str, str]
    needs: str | None = None


def steps(dry_run: bool) -> list[Step]:
    """All steps of a day, in order. Paging is the last, because it uses up the memory."""
    return [
        own("smoke", "Every path once, against float64.", dry_run),
        *(tests(file, dry_run) for file in GPU_TESTS),
        *(sanitizer(tool, dry_run) for tool in ("memcheck", "racecheck")),
        own("crossover", "From how many rows on which path is fastest.", dry_run),
        own("tune", "The fastest paths of three shapes, stored for this user.", dry_run),
        own("bitsandbytes", "minilora against bitsandbytes and cuBLAS.", dry_run),
        own("decode", "A decoder's tokens per second, eager and as a CUDA graph.", dry_run),
        own("generate", "transformers' generation, as it is and inside decode_graph.", dry_run),
        own("QLoRA step", "Training steps of a model of LLaMA 7B's shape.", dry_run),
        own("paging", "PagedAdamW where its states do not fit.", dry_run),
    ]


def own(name: str, what: str, dry_run: bool) -> Step:
    """A step of gpu_day_steps.py."""
    function = name.lower().replace(" ", "_")
    command = [sys.executable, STEPS, function, "--out", "{out}", *["--dry-run"] * dry_run]
    return Step(name, what, command, LIMIT, {})


def tests(file: str, dry_run: bool) -> Step:
    """A file of tests on the GPU; a dry run only collects them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    command += ["--collect-only"] * dry_run
    # Without a GPU the files can only be read as those of interpreted kernels.
    environment = {"TRITON_INTERPRET": "1" if dry_run else "0"}
    return Step(f"tests: {Path(file).stem}", f"`{file}`.", command, LIMIT, environment)


def sanitizer(tool: str, dry_run: bool) -> Step:
    """The smoke test, on small sizes, under one of compute-sanitizer's tools."""
    command = [sys.executable, STEPS, "smoke", "--small"]
    what = f"Every path on small sizes under compute-sanitizer's {tool}."
    name = f"sanitizer: {tool}"
    if dry_run:
        return Step(name, what, [*command, "--dry-run"], LIMIT, {})

    # PyTorch's allocator would hide an access outside a tensor, inside its block.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    wrapped = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command]
    return Step(name, what, wrapped, LIMIT, environment, needs="compute-sanitizer")


def run(step: Step, dry_run: bool) -> dict[str, Any]:
    """Runs a step: its name, status, seconds, error and result. It never raises."""
    outcome: dict[str, Any] = {"name": step.name, "what": step.what, "seconds": None}
    outcome |= {"status": "skipped", "error": None, "result": {}}
    if step.needs and not shutil.which(step.needs):
        return outcome | {"error": f"{step.needs} is not installed"}

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [str(out) if part == "{out}" else part for part in step.command]
        status, printed = supervise(command, step.limit, step.environment)
        if out.exists():
            outcome["result"] = json.loads(out.read_text())
    if not dry_run:
        outcome["seconds"] = time.perf_counter() - start

    outcome["status"] = STUBBED if dry_run and status == "passed" else status
    if skipped := outcome["result"].get("skipped"):
        return outcome | {"status": "skipped", "error": skipped}
    if status == "passed":
        if not outcome["result"] and not dry_run:
            outcome["result"] = {"notes": [printed.strip().split("\n")[-1]]}
        return outcome
    faults = outcome["result"].get("faults")
    return outcome | {"error": "\n".join(faults) if faults else printed.strip()}


def supervise(command: Sequence[str], limit: float, environment: dict[str, str]) -> tuple[str, str]:
    """Runs a command with all that it starts: "passed", "failed" or "stopped", and its output.

    Over the limit, the whole process group is killed.
    """
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        process = subprocess.Popen(
            command,
            cwd=bench.ROOT,
            env=os.environ | offline | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return "failed", str(error)

    try:
        printed, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        return "stopped", f"{printed[-LAST_CHARACTERS:]}\nstopped after {limit:g} seconds"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    status = "failed" if process.returncode else "passed"
    return status, printed[-LAST_CHARACTERS:]


def machine() -> dict[str, Any]:
    """What gpu_machine.py prints. A process of its own: this one holds no device memory."""
    command = [sys.executable, str(HERE / "gpu_machine.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def write(day: dict[str, Any], folder: Path) -> Path:
    """Writes gpu_day.md and gpu_day.json, each of them atomically; returns the Markdown's path."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "gpu_day.md"
    numbers = json.dumps(day, indent=1, ensure_ascii=False) + "\n"
    with atomic_files(report, folder / "gpu_day.json") as (markdown, data):
        markdown.write_text(gpu_day_report.render(day), encoding="utf-8")
        data.write_text(numbers, encoding="utf-8")
    return report


def spend(day: dict[str, Any], todo: Sequence[Step], folder: Path) -> bool:
    """Runs the steps and writes the report after each. Returns whether none failed."""
    for step in todo:
        print(f"== {step.name}", flush=True)
        outcome = run(step, day["dry run"])
        day["steps"].append(outcome)
        took = "" if outcome["seconds"] is None else f" ({outcome['seconds']:.0f} s)"
        print(f"   {outcome['status']}{took}", flush=True)
        write(day, folder)
    return all(outcome["status"] in ("passed", "skipped", STUBBED) for outcome in day["steps"])


def folder_of(card: str) -> Path:
    """Where a card's report is committed."""
    return bench.RESULTS / re.sub("[^a-z0-9]+", "-", card.lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="no GPU: stubbed launches")
    parser.add_argument("--out", type=Path, help="folder (default: docs/benchmarks/CARD)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    args = parser.parse_args()

    todo = steps(args.dry_run)
    names = [step.name for step in todo]
    if unknown := set(args.only or ()) - set(names):
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    todo = [step for step in todo if not args.only or step.name in args.only]

    found = gpu_machine.no_card() if args.dry_run else machine()
    if args.dry_run:
        folder = args.out or bench.ROOT / "runs" / "gpu-day-dry-run"
    elif found["card"] is None:
        sys.exit("no GPU here: nothing was run. A dry run needs none: make gpu-day DRY_RUN=1")
    else:
        folder = args.out or folder_of(found["card"])

    is_good = spend({"dry run": args.dry_run, "machine": found, "steps": []}, todo, folder)
    print(f"\nwritten to {folder}/gpu_day.md and gpu_day.json")
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
