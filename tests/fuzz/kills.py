"""KILL, TERM and INT at every call of the file system and at random times.

In a run from its start to its end, in a run that replaces another one, in a merge and in a saved
adapter. Afterwards the folder still is what it was, or repeating or resuming gives what a run gives
that was not killed. Each case starts processes, and takes longer than one of another family.
"""

import functools
import random
import signal
import tempfile
from pathlib import Path
from typing import Any

import tiny_runs
from fuzzing import REFUSED, SAME, Wrong
from interrupted import contents
from tiny_runs import result, server, settings

CI, SAMPLE, FULL = 6, 60, 400
SECONDS, MEGABYTES = 20, 1000

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDED = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 128 + 15, 128 + 2, 1)


def finetune(out: Path, **more: Any) -> dict[str, Any]:
    changes = more.pop("changes", {})
    task = {"do": "finetune", "base": str(out.parent), "settings": settings(out, **changes)}
    return task | more


def whole(out: Path, **changes: Any) -> Any:
    """The result of a run that nobody kills."""
    ((code, said),) = server().run(finetune(out, changes=changes))
    if code:
        raise Wrong("stuck", f"a run in {out} ended with {code}: {said}")
    return result(out)


@functools.cache
def plain(seed: int) -> tuple[Any, int]:
    """The result of a run of that seed, and how many calls of the file system it makes."""
    with tempfile.TemporaryDirectory(prefix="minilora-plain-") as folder:
        out = Path(folder) / "run"
        ((code, said),) = server().run(finetune(out, changes={"seed": seed}))
        assert code == 0, said
        return result(out), said["calls"]


def prepare() -> None:
    """Starts the server, which takes longer than a case."""
    plain(0)


def run(seed: int, folder: Path) -> str:
    kinds = (a_run, a_run, a_run, a_replaced_run, a_merge, an_adapter)
    kind = kinds[seed % len(kinds)]
    return kind(seed, random.Random(seed), folder / "run")


def moment(seed: int, rng: random.Random, calls: int, seconds: float) -> dict[str, Any]:
    """The n-th call, each n in turn as the seeds go on; one in four at a random time."""
    when: dict[str, Any] = {"signal": SIGNALS[seed // 2 % 3]}
    if rng.random() < 0.25:
        return when | {"after": rng.uniform(0, seconds)}
    return when | {"call": 1 + (seed * 7) % calls}


def a_run(seed: int, rng: random.Random, out: Path) -> str:
    expected, calls = plain(0)
    ((code, said),) = server().run(finetune(out, **moment(seed, rng, calls, 0.6)))
    if code not in (0, *ENDED):
        raise Wrong("raw", f"the run ended with {code}: {said}")
    return finished(out, expected)


def a_replaced_run(seed: int, rng: random.Random, out: Path) -> str:
    """Over a finished run of another seed."""
    old, _ = plain(1)
    expected, calls = plain(0)
    whole(out, seed=1)
    before = contents(out)
    when = moment(seed, rng, calls, 0.6)
    server().run(finetune(out, changes={"overwrite": True}, **when))
    left = {name: value for name, value in contents(out).items() if name != ".minilora.lock"}
    if left == before:
        if result(out) != old:
            raise Wrong("silent", "the run before is not what it was")
        return REFUSED
    return finished(out, expected)


def finished(out: Path, expected: Any) -> str:
    """Goes on as a user would, by what is there; compares with the run that nobody killed."""
    from minilora.training.checkpoints import list_checkpoints

    if list_checkpoints(out):
        whole(out, resume=True)
    elif not (out / "adapter_model.safetensors").exists():
        whole(out)
    if result(out) != expected:
        raise Wrong("silent", "the result is not that of a run that was not killed")
    return SAME


@functools.cache
def merged() -> tuple[Path, dict[str, bytes], int]:
    """An adapter, what its merge writes, and how many calls that takes."""
    folder = Path(tempfile.mkdtemp(prefix="merged-", dir=tiny_runs.inputs()[0].parent))
    whole(folder / "run")
    ((code, said),) = server().run(merge(folder / "run", folder / "merged"))
    assert code == 0, said
    return folder / "run", contents(folder / "merged"), said["calls"]


def merge(adapter: Path, out: Path, **more: Any) -> dict[str, Any]:
    model, _ = tiny_runs.inputs()
    arguments = ["--model", str(model), "--adapter", str(adapter), "--out", str(out)]
    arguments.append("--no-quantize")
    return {"do": "merge", "base": str(out.parent), "arguments": arguments} | more


def a_merge(seed: int, rng: random.Random, out: Path) -> str:
    adapter, expected, calls = merged()
    server().run(merge(adapter, out, **moment(seed, rng, calls, 0.3)))
    if not out.exists():
        ((code, said),) = server().run(merge(adapter, out))
        if code:
            raise Wrong("stuck", f"the merge cannot be repeated: {said}")
    if contents(out) != expected:
        raise Wrong("silent", "the merged model is not that of a merge that was not killed")
    return SAME


def saved(folder: Path, seed: int, **more: Any) -> dict[str, Any]:
    return {"do": "save", "base": str(folder.parent), "folder": str(folder), "seed": seed} | more


def loads_as(folder: Path) -> Any:
    from minilora.files.adapter_folder import read_adapter
    from minilora.lora import LoRA

    read = read_adapter(folder, own_options=LoRA(1, 1, r=1).config())
    return {layer: {k: t.tolist() for k, t in held.items()} for layer, held in read.layers.items()}


def an_adapter(seed: int, rng: random.Random, out: Path) -> str:
    """Over another one: what loads afterwards is the old one or the new one, never a mixture."""
    ((_, said),) = server().run(saved(out.parent / "new", 1))
    new = loads_as(out.parent / "new")
    server().run(saved(out, 0))
    old = loads_as(out)
    server().run(saved(out, 1, **moment(seed, rng, said["calls"], 0.02)))
    found = loads_as(out)
    if found not in (old, new):
        raise Wrong("silent", "the adapter that loads is neither the old one nor the new one")
    server().run(saved(out, 1))
    if loads_as(out) != new:
        raise Wrong("stuck", "the adapter cannot be saved again")
    return SAME
