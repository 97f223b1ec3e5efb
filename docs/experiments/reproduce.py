"""Runs the experiments, or what is left of them, and writes docs/reproductions.md:

    python docs/experiments/reproduce.py [--fresh] [--only NAME ...]

One result per claim and seed is stored as docs/experiments/results/NAME-SEED.json when it is there,
so an interrupted run goes on where it stopped. `--fresh` measures all anew.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fresh", action="store_true", help="measure again what is stored")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    options = parser.parse_args()

    for name in options.only:
        for seed in experiment(name).SEEDS:
            if path_of(name, seed).exists() and not options.fresh:
                print(f"{name}, seed {seed}: stored")
                continue
            result = run_seed(name, seed)
            print(f"{name}, seed {seed}: {result['seconds']:.0f} s", flush=True)

    from reproductions_page import update

    print(f"written: {update()}")


if __name__ == "__main__":
    main()
