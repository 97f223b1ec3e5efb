"""What every comparison of this folder shares: a quiet machine, processes that take turns, results.

A measurement is a process of its own, because two OpenMP runtimes in one process slow each other
down and because the peak of a process's memory can only be read once. The sides take turns, in an
order that is reversed every round, so that a machine which becomes slower hurts both. Before the
first turn the machine has to be quiet, and it is watched during every turn: a turn in which other
programs used more than `QUIET` of the processor is measured again.

The child prints its result as one line of JSON, the last one of its output.
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "benchmarks"

Result = dict[str, Any]

# Share of all cores that other programs may use.
QUIET = 0.05

# Processor features that decide which kernel runs, as /proc/cpuinfo spells them.
FEATURES = ("avx2", "avx512f", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
FEATURES += ("asimd", "bf16", "sve")

PACKAGES = ("torch", "numba", "transformers", "peft", "bitsandbytes")


class NotQuiet(SystemExit):
    """Other programs are using the processor."""


# -- the machine ---------------------------------------------------------------------------------


def machine(threads: int, cpuinfo: str | None = None) -> Result:
    """Processor, features, memory and versions: what a table says above its figures."""
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text() if path.exists() else ""
    first = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", cpuinfo.split("\n\n")[0], re.MULTILINE))
    found = set(first.get("flags", first.get("Features", "")).split())
    name = first.get("model name") or platform.processor() or platform.machine()
    model = [first[key] for key in ("cpu family", "model") if key in first]
    return {
        "processor": f"{name} (family {model[0]}, model {model[1]})" if len(model) == 2 else name,
        "features": [feature for feature in FEATURES if feature in found],
        "cores": os.cpu_count(),
        "threads": threads,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": {"Python": platform.python_version()} | versions(PACKAGES),
        "date": time.strftime("%Y-%m-%d"),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe(machine: Result) -> str:
    """One paragraph: the processor, its features, the threads, the versions and the date."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    features = ", ".join(machine["features"]) or "no vector unit known to this script"
    memory = f"{machine['memory'] / 1e9:.0f} GB of memory"
    return (
        f"{machine['processor']}: {features}; {machine['threads']} threads on "
        f"{machine['cores']} cores, {memory}. {versions}; {machine['date']}."
    )


def file_name(machine: Result) -> str:
    """A name for the processor's folder: letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", machine["processor"].lower()).strip("-")


# -- quiet ---------------------------------------------------------------------------------------


def busy_seconds(stat: str | None = None) -> float:
    """Processor seconds that all programs have used since the machine started."""
    text = Path("/proc/stat").read_text() if stat is None else stat
    # user, nice, system, idle, iowait, irq, softirq, steal; guests are in user already.
    ticks = [int(field) for field in text.split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Processor seconds of this process and of its children that have ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


class Others:
    """The share of all cores that other programs use, since this was made."""

    def __init__(self) -> None:
        self.busy, self.own, self.start = busy_seconds(), own_seconds(), time.monotonic()

    def share(self) -> float:
        used = busy_seconds() - self.busy - (own_seconds() - self.own)
        elapsed = time.monotonic() - self.start
        return max(0.0, used / elapsed / (os.cpu_count() or 1))


def wait_for_quiet(patience: float = 60, interval: float = 2) -> None:
    """Returns when other programs use at most `QUIET` of the processor.

    Raises:
        NotQuiet: they still do not after `patience` seconds.
    """
    end = time.monotonic() + patience
    while True:
        others = Others()
        time.sleep(interval)
        share = others.share()
        if share <= QUIET:
            return
        if time.monotonic() >= end:
            raise NotQuiet(
                f"other programs use {share:.0%} of this machine's processor, and a time measured "
                "now would be theirs as well: stop them, or pass --noisy (nothing is stored then)"
            )


# -- processes that take turns -------------------------------------------------------------------


def run(script: str, arguments: Mapping[str, Any], threads: int) -> Result:
    """Runs `script --child JSON` and returns what it printed; "others" is added to it.

    The JSON has the arguments and the number of threads, with which OpenMP starts as well.
    """
    command = [sys.executable, script, "--child", json.dumps({**arguments, "threads": threads})]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    others = Others()
    done = subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
        reason = (errors or lines)[-1]
        raise SystemExit(f"{Path(script).name} {json.dumps(arguments)}: {reason}")
    found: Result = json.loads(done.stdout.splitlines()[-1])
    return found | {"others": round(others.share(), 3)}


def in_turn(
    measure: Callable[[str], Result],
    sides: Sequence[str],
    rounds: int,
    *,
    noisy: bool = False,
    attempts: int = 3,
) -> dict[str, list[Result]]:
    """Side -> its result of each round.

    Args:
        measure: one measurement of a side; "others" in its result is the share of the processor
            that other programs used meanwhile.
        noisy: keep what was measured while other programs ran.
        attempts: for one measurement, before the machine counts as not quiet.

    Raises:
        NotQuiet: other programs disturbed every attempt.
    """
    results: dict[str, list[Result]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            for _ in range(attempts):
                result = measure(side)
                if noisy or result["others"] <= QUIET:
                    break
            else:
                raise NotQuiet(
                    f"{side}: other programs used {result['others']:.0%} of the processor while it "
                    "ran: stop them, or pass --noisy (nothing is stored then)"
                )
            results[side].append(result)
    return results


def median(results: Sequence[Result], key: str) -> float:
    """The median over the rounds."""
    return statistics.median(result[key] for result in results)


def check(name: str, right: bool) -> None:
    """Ends the script if a result is wrong: it is not timed."""
    if not right:
        raise SystemExit(f"{name}: the result is wrong, so it is not timed")


def check_close(name: str, ours: Sequence[float], others: Sequence[float], bound: float) -> None:
    """Ends the script if the losses of two sides differ by more than `bound`, or one is NaN."""
    if len(ours) != len(others):
        raise SystemExit(f"{name}: {len(ours)} losses and {len(others)}: not timed")
    for step, (a, b) in enumerate(zip(ours, others, strict=True), start=1):
        if not abs(a - b) <= bound:
            raise SystemExit(
                f"{name}: the losses of step {step} are {a:.5f} and {b:.5f}, more than {bound:g} "
                "apart: the sides do not compute the same, so nothing is timed"
            )


# -- memory --------------------------------------------------------------------------------------


def memory(key: str = "VmHWM") -> int:
    """Bytes of an entry of /proc/self/status: VmHWM (the peak), VmRSS, RssAnon, RssFile.

    `ru_maxrss` would start at the size of the process that this one was forked from.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return 1024 * int(value.split()[0])
    raise ValueError(f"/proc/self/status has no {key} on this system")


def restart_peak() -> None:
    """Lets VmHWM start again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


# -- tables and files ----------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def store(name: str, results: Result, folder: Path = RESULTS) -> Path:
    """Writes the results of the script `name` on this processor, and returns the file.

    Those of another processor stay: every processor has a folder.
    """
    from minilora.files.atomic import write_text

    path = folder / file_name(results["machine"]) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(results, indent=1) + "\n")
    return path


def stored(name: str, folder: Path = RESULTS) -> Iterator[Result]:
    """The stored results of the script `name`, one for each processor."""
    for path in sorted(folder.glob(f"*/{name}.json")):
        yield json.loads(path.read_text())


# -- the options of every script -----------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """--full, --rounds, --threads, --model, --noisy, --store and what the children are given."""
    parser.add_argument("--full", action="store_true", help="the whole matrix")
    parser.add_argument("--rounds", type=int, help="processes per side; default: 1, --full: 3")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--model", type=Path, help="a dense model's folder; default: SmolLM2-135M")
    parser.add_argument("--noisy", action="store_true", help="go on while other programs run")
    parser.add_argument("--store", action="store_true", help="into docs/benchmarks, and the page")
    parser.add_argument("--child", help=argparse.SUPPRESS)


def begin(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Waits for a quiet machine and says what it is."""
    if options.store and options.noisy:
        parser.error("--store: times of a machine that is not quiet are not stored")
    options.rounds = options.rounds or (3 if options.full else 1)
    if not options.noisy:
        wait_for_quiet()
    print(describe(machine(options.threads)) + "\n", flush=True)


def finish(name: str, results: Result, options: argparse.Namespace) -> None:
    """Stores the results and renews the page, if asked to."""
    if not options.store:
        return
    import page

    path = store(name, {"machine": machine(options.threads)} | results)
    print(f"written to {path}, {page.update()}")
