"""Runs the experiments that have no stored result yet, and writes docs/reproductions.md:

    python docs/experiments/reproduce.py [--fresh] [--only NAME ...]

The result of each claim and seed is stored as docs/experiments/results/NAME-SEED.json as soon as it
is there, so an interrupted run goes on where it stopped. `--fresh` first removes what is stored.
"""

import argparse
import importlib
import json
import platform
import re
import sys
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results"
sys.path.insert(0, str(HERE.parent))

from minilora.files.atomic import write_text  # noqa: E402

# In the order of the page.
EXPERIMENTS = (
    "rank",
    "targets",
    "learning_rate",
    "datatypes",
    "double_quantization",
    "qlora",
    "forgetting",
    "rank_stabilized",
    "merged_latency",
)
PACKAGES = ("torch", "numba", "transformers")

Stored = dict[str, Any]


def experiment(name: str) -> ModuleType:
    return importlib.import_module(name)


def path_of(name: str, seed: int, folder: Path = RESULTS) -> Path:
    return folder / f"{name}-{seed}.json"


def machine() -> Stored:
    """Processor, threads, versions and date: where a number comes from."""
    import torch

    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    found = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))
    family = [found[key] for key in ("cpu family", "model") if key in found]
    name = found.get("model name") or platform.processor() or platform.machine()
    return {
        "processor": f"{name} (family {family[0]}, model {family[1]})" if family else name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def run_seed(name: str, seed: int, folder: Path = RESULTS, short: bool = False) -> Stored:
    """Runs one experiment with one seed and stores what it found."""
    start = time.perf_counter()
    numbers = experiment(name).run(seed, short)
    result = {
        "experiment": name,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine(),
        "numbers": numbers,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path_of(name, seed, folder), json.dumps(result, indent=1) + "\n")
    return result


def stored(name: str, folder: Path = RESULTS) -> list[Stored]:
    """The results of an experiment, by seed."""
    paths = [path_of(name, seed, folder) for seed in experiment(name).SEEDS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def run_missing(name: str, folder: Path = RESULTS) -> list[int]:
    """Runs the seeds that have no stored result, and returns them."""
    missing = [seed for seed in experiment(name).SEEDS if not path_of(name, seed, folder).exists()]
    for seed in missing:
        result = run_seed(name, seed, folder)
        print(f"{name}, seed {seed}: {result['seconds']:.0f} s", flush=True)
    return missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fresh", action="store_true", help="remove what is stored first")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    options = parser.parse_args()

    if options.fresh:
        for name in options.only:
            for path in RESULTS.glob(f"{name}-*.json"):
                path.unlink()
    for name in options.only:
        run_missing(name)

    from reproductions_page import update

    print(f"written: {update()}")


if __name__ == "__main__":
    main()
