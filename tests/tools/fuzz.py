"""Runs the fuzz suite and prints one line per family: `make fuzz`, `make fuzz FULL=1`.

Results are kept in .fuzz/, under a digest of the sources: a run that was interrupted goes on where
it stopped, and a change of the library starts anew.

    python tests/tools/fuzz.py [--full] [--jobs 2] [FAMILY ...]
    python tests/tools/fuzz.py --case FAMILY SEED     one case, with its traceback
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fuzzing

ROOT = Path(__file__).parents[2]
STATE = ROOT / ".fuzz"

# Cases per process: a crash costs one case, not a family.
CHUNK = 100


def digest() -> str:
    total = hashlib.sha256()
    for folder in ("minilora", "kernels", "tests/fuzz", "tests/tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()[:12]


def results(name: str, version: str) -> dict[int, fuzzing.Case]:
    path = STATE / f"{name}-{version}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    cases = (fuzzing.Case(**json.loads(line)) for line in lines)
    return {case.seed: case for case in cases}


def record(version: str, case: fuzzing.Case) -> None:
    STATE.mkdir(exist_ok=True)
    with (STATE / f"{case.family}-{version}.jsonl").open("a") as file:
        file.write(json.dumps(case._asdict()) + "\n")


def run_chunk(name: str, version: str, seeds: list[int]) -> None:
    """Runs cases in a process of their own; one in which the process died is recorded as such."""
    command = [sys.executable, __file__, "--worker", version, name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    while seeds:
        arguments = [*command, *map(str, seeds)]
        code = subprocess.run(arguments, env=environment, stdin=subprocess.DEVNULL).returncode
        seeds = [seed for seed in seeds if seed not in results(name, version)]
        if seeds:
            died = f"died: the process ended with {code}"
            record(version, fuzzing.Case(name, seeds[0], "wrong", 0.0, 0.0, died))
            seeds = seeds[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--case", action="store_true")
    parser.add_argument("--worker")
    options = parser.parse_args()

    if options.worker or options.case:
        name, *seeds = options.families
        module = fuzzing.family(name)
        for seed in map(int, seeds):
            case = fuzzing.run_case(name, module, seed)
            if options.worker:
                record(options.worker, case)
            else:
                print(case.wrong or case)
        return 0

    version, start = digest(), time.time()
    names = options.families or fuzzing.family_names()
    counts = {}
    chunks = []
    for name in names:
        module = fuzzing.family(name, prepare=False)
        counts[name] = module.FULL if options.full else module.SAMPLE
        done = results(name, version)
        seeds = [seed for seed in range(counts[name]) if seed not in done]
        chunks += [(name, seeds[i : i + CHUNK]) for i in range(0, len(seeds), CHUNK)]

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda chunk: run_chunk(chunk[0], version, chunk[1]), chunks))

    wrong = report({name: results(name, version) for name in names}, counts)
    print(f"{time.time() - start:.0f} s; results in {STATE.name}/*-{version}.jsonl")
    return 1 if wrong else 0


def report(found: dict[str, dict[int, fuzzing.Case]], counts: dict[str, int]) -> int:
    """Prints the table and every case that went wrong; returns their number."""
    head = ("family", "cases", "same", "refused", "wrong", "slowest s", "most MB")
    print(f"{head[0]:<20}" + "".join(f"{text:>11}" for text in head[1:]))
    wrong: list[fuzzing.Case] = []
    for name, cases in found.items():
        chosen = [case for seed, case in cases.items() if seed < counts[name]]
        bad = [case for case in chosen if case.wrong]
        ended = Counter(case.ended for case in chosen if not case.wrong)
        slowest = max((case.seconds for case in chosen), default=0)
        most = max((case.megabytes for case in chosen), default=0)
        numbers = (len(chosen), ended[fuzzing.SAME], ended[fuzzing.REFUSED], len(bad))
        cells = [*(f"{n:>11,}" for n in numbers), f"{slowest:>11.2f}", f"{most:>11.0f}"]
        print(f"{name:<20}" + "".join(cells))
        wrong += bad
    for case in wrong:
        first = (case.wrong or "").splitlines()[0]
        print(f"WRONG {case.family} {case.seed}: {first[:300]}")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
