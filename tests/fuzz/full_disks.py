"""A disk that is full: at a byte of a file (RLIMIT_FSIZE), or at a call that writes.

In a run, in a saved adapter, in a merge. The error is one line that names a path in the folder,
old files stay, nothing unfinished is left, and what is repeated or resumed gives what it gives on a
disk with space. Each case starts processes, and takes longer than one of another family.
"""

import random
from pathlib import Path
from typing import Any

import fuzzing
from fuzzing import REFUSED, SAME, Wrong
from interrupted import contents
from tiny_runs import server

CI, SAMPLE, FULL = 6, 60, 400
SECONDS, MEGABYTES = 20, 1000

# Of the family `kills`: the same work, and how to go on after it.
kills = fuzzing.family("kills", prepare=False)


def prepare() -> None:
    """Starts the server, which takes longer than a case."""
    kills.plain(0)


def run(seed: int, folder: Path) -> str:
    kind = (a_run, a_run, a_merge, an_adapter)[seed % 4]
    return kind(seed, random.Random(seed), folder / "run")


def full(seed: int, rng: random.Random, largest: int, calls: int) -> dict[str, Any]:
    """Where the disk is full: each byte, or each call, in turn as the seeds go on."""
    if rng.random() < 0.5:
        return {"limit": 1 + (seed * 31) % largest}
    return {"full": rng.choice(("from", "once")), "call": 1 + (seed * 7) % calls}


def refused(code: int, said: dict[str, Any], folder: Path) -> bool:
    """Whether it failed; raises `Wrong` if not with an error that a user can act on."""
    if code == 0:
        return False
    message = said.get("message", "")
    if not said.get("os") and said.get("error") not in ("ValueError", "TypeError"):
        raise Wrong("raw", f"it ended with {code}: {said}")
    if str(folder) not in message or "\n" in message:
        raise Wrong("raw", f"{message!r} is not one line that names a path in {folder}")
    return True


def unfinished(folder: Path) -> list[str]:
    return [name for name in contents(folder) if any(p.startswith(".") for p in Path(name).parts)]


def check_nothing_unfinished(folder: Path) -> None:
    if left := unfinished(folder):
        raise Wrong("changed", f"{left} is left")


def a_run(seed: int, rng: random.Random, out: Path) -> str:
    expected, calls = kills.plain(0)
    where = full(seed, rng, 30_000, calls // 3)
    ((code, said),) = server().run(kills.finetune(out, **where))
    failed = refused(code, said, out)
    check_nothing_unfinished(out.parent)
    kills.finished(out, expected)
    return REFUSED if failed else SAME


def a_merge(seed: int, rng: random.Random, out: Path) -> str:
    adapter, expected, calls = kills.merged()
    where = full(seed, rng, 40_000, calls // 2)
    ((code, said),) = server().run(kills.merge(adapter, out, **where))
    failed = refused(code, said, out.parent)
    check_nothing_unfinished(out.parent)
    if failed:
        if out.exists():
            raise Wrong("changed", "a merge that failed has left its folder")
        server().run(kills.merge(adapter, out))
    if contents(out) != expected:
        raise Wrong("silent", "the merged model is another one")
    return REFUSED if failed else SAME


def an_adapter(seed: int, rng: random.Random, out: Path) -> str:
    server().run(kills.saved(out, 0), kills.saved(out.parent / "new", 1))
    before, new = contents(out), kills.loads_as(out.parent / "new")
    where = full(seed, rng, 1500, 8)
    ((code, said),) = server().run(kills.saved(out, 1, **where))
    failed = refused(code, said, out)
    check_nothing_unfinished(out)
    if failed and contents(out) != before and kills.loads_as(out) != new:
        raise Wrong("changed", "the old adapter is not what it was")
    server().run(kills.saved(out, 1))
    if kills.loads_as(out) != new:
        raise Wrong("silent", "the adapter is another one")
    return REFUSED if failed else SAME
