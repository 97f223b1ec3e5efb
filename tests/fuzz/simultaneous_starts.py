"""Two processes start in one folder, new or resuming: one wins, the other says so.

Each case starts processes, and takes longer than one of another family.
"""

import random
import re
import tempfile
from pathlib import Path

from fuzzing import SAME, Wrong
from tiny_runs import STEPS, result, server, settings

CI, SAMPLE, FULL = 2, 10, 50
SECONDS, MEGABYTES = 20, 1000


def task(out: Path, delay: float, **changes: object) -> dict[str, object]:
    base = str(out.parent)
    return {"do": "finetune", "base": base, "settings": settings(out, **changes), "delay": delay}


def prepare() -> None:
    """Starts the server and waits for its first run, which takes longer than a case."""
    with tempfile.TemporaryDirectory(prefix="minilora-first-") as folder:
        server().run(task(Path(folder) / "run", 0))


def run(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    out = folder / "run"
    ((code, said),) = server().run(task(folder / "alone", 0))
    assert code == 0, said
    resume = bool(seed % 2)
    if resume:
        # Stopped by a signal at its middle, counted in calls of the file system.
        stop = {"signal": 9, "call": rng.randint(130, 170)}
        server().run(task(out, 0) | stop)
        resume = any((out / "checkpoints").glob("step-*"))

    later = rng.choice((0.0, rng.uniform(0, 0.05), rng.uniform(0, 0.3)))
    delays = [0.0, later] if rng.random() < 0.5 else [later, 0.0]
    ended = server().run(*(task(out, delay, resume=resume) for delay in delays))

    codes = [code for code, _ in ended]
    if sorted(codes) != [0, 1]:
        raise Wrong("silent", f"the two runs ended with {codes}: {ended}")
    message = next(said["message"] for code, said in ended if code)
    working = re.search(r"another run is working in (.*) \((pid \d+ on .+|which has.*)\)", message)
    # Or the first one had ended already.
    over = "of a finished run" in message or "a finished run keeps none" in message
    if str(out) not in message or not (working or over):
        raise Wrong("raw", f"the second run says {message!r}")
    if result(out) != result(folder / "alone") or len(result(out)[0]) != STEPS:
        raise Wrong("silent", "the result is not that of a run alone")
    if any(path.name.startswith(".") for path in out.iterdir()):
        raise Wrong("changed", f"the runs have left {sorted(p.name for p in out.iterdir())}")
    return SAME
