"""The folder of an interrupted run, harmed in a random way; then the run is resumed.

Bytes of every file; values of run.json and of the manifest, with the hashes of the manifest made
right again; tensors of the optimizer; files that are missing, too many, links, pipes, folders.
"""

import contextlib
import functools
import io
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzzing import REFUSED, SAME, Wrong, attempt
from interrupted import Outcome, in_step
from interrupted import run as outcome_of
from safetensors.torch import load_file, save_file
from tiny_runs import inputs, settings

from minilora.files.hashing import sha256_of_file
from minilora.training import FinetuneConfig, finetune

CI, SAMPLE, FULL = 25, 200, 1500

Harm = Callable[[random.Random, Path], None]


def configure(out: Path, **changes: Any) -> FinetuneConfig:
    random.seed(0)
    np.random.seed(0)
    return FinetuneConfig(**settings(out, **changes))


@functools.cache
def runs() -> tuple[Path, Outcome]:
    """The folder of a run that died in its third step, and what one leaves that did not die."""
    base = inputs()[0].parent
    with contextlib.redirect_stdout(io.StringIO()):
        whole = outcome_of(configure(base / "whole"))

    class Died(Exception):  # noqa: N818 - the test's own
        pass

    def die() -> None:
        raise Died

    try:
        with in_step(3, die, accum=1), contextlib.redirect_stdout(io.StringIO()):
            finetune(configure(base / "interrupted"))
    except Died:
        return base / "interrupted", whole
    raise AssertionError("the run was not interrupted")


def run(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    interrupted, whole = runs()
    out = folder / "run"
    shutil.copytree(interrupted, out)
    names = sorted(HARMS)
    HARMS[names[seed % len(names)]](rng, out)

    before = snapshot(folder)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        found, error = attempt(lambda: outcome_of(configure(out, resume=True)), [str(out)])
    if error is not None:
        if snapshot(folder) != before:
            raise Wrong("changed", f"the folder is not what it was, after: {error}")
        return REFUSED
    if not found.agrees(whole):
        raise Wrong("silent", "the resumed run gives another result")
    return SAME


def snapshot(folder: Path) -> dict[str, Any]:
    """What every name in a folder is, and contains."""
    return {str(p.relative_to(folder)): contents_of(p) for p in sorted(folder.rglob("*"))}


def contents_of(path: Path) -> Any:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    return path.read_bytes() if path.is_file() else oct(path.stat().st_mode)


def checkpoint(rng: random.Random, out: Path) -> Path:
    """Mostly the newest one."""
    return out / "checkpoints" / f"step-0000000{rng.choice((2, 2, 2, 1))}"


def rehash(path: Path) -> None:
    """A manifest that fits, as if nothing had happened."""
    files = [p for p in sorted(path.iterdir()) if p.is_file() and p.name != "manifest.json"]
    hashes = {p.name: sha256_of_file(p) for p in files}
    (path / "manifest.json").write_text(json.dumps(hashes))


def bytes_of_a_file(rng: random.Random, out: Path) -> None:
    path = rng.choice([p for p in sorted(out.rglob("*")) if p.is_file()])
    content = bytearray(path.read_bytes())
    # A byte that is appended to metrics.jsonl, or after its steps, is not part of the history.
    at = rng.randrange(len(content))
    what = rng.choice(("flip", "cut", "append", "delete", "insert", "zero", "empty"))
    if what == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del content[at:]
    elif what == "append":
        content += rng.randbytes(rng.randint(1, 99))
    elif what == "delete":
        del content[at : at + rng.randint(1, 9)]
    elif what == "insert":
        content[at:at] = rng.randbytes(rng.randint(1, 9))
    elif what == "zero":
        content[at : at + 64] = bytes(min(64, len(content) - at))
    else:
        content.clear()
    path.write_bytes(content)


DEEP = "[" * 5000 + "]" * 5000
HOSTILE: tuple[Any, ...] = (
    "x",
    "\x1b[31m\u202e",
    "9" * 5000,
    {},
    [],
    [[]],
    -1,
    1 << 80,
    -0.5,
    True,
)


def harmed(rng: random.Random, value: Any, path: tuple[Any, ...] = ()) -> Any:
    """A copy of a JSON value with one entry replaced, left out, added, or of another type."""
    inside = isinstance(value, dict | list) and len(value) > 0
    if inside and rng.random() < (0.97 if not path else 0.6):
        copy = value.copy()
        key = rng.choice(sorted(copy) if isinstance(copy, dict) else range(len(copy)))
        chance = rng.random()
        if chance < 0.15:
            del copy[key]
        elif chance < 0.25 and isinstance(copy, dict):
            copy["unknown \x1b[31m"] = copy[key]
        else:
            copy[key] = harmed(rng, copy[key], (*path, key))
        return copy
    if path == ("eval_before",):
        # Another number would be one that a run can have.
        return rng.choice([h for h in HOSTILE if not isinstance(h, int | float) or h is True])
    if path[:1] == ("answers",) and len(path) > 1:
        # Another text would be one that a model can say.
        return rng.choice([h for h in HOSTILE if not isinstance(h, str)])
    return rng.choice(HOSTILE)


def values_of_run_json(rng: random.Random, out: Path) -> None:
    path = checkpoint(rng, out)
    facts = json.loads((path / "run.json").read_text())
    text = json.dumps(harmed(rng, facts))
    if rng.random() < 0.1:
        text = text.replace("null", rng.choice(("NaN", "-Infinity", "1e999", DEEP)), 1)
    if rng.random() < 0.05:
        text = rng.choice((DEEP, "[]", "3", "null", "", '{"format": 3}', "\xff", "{" * 9))
    (path / "run.json").write_text(text)
    rehash(path)


def values_of_the_config(rng: random.Random, out: Path) -> None:
    path = checkpoint(rng, out)
    facts = json.loads((path / "run.json").read_text())
    facts["config"] = harmed(rng, facts["config"])
    (path / "run.json").write_text(json.dumps(facts))
    rehash(path)


def the_random_states(rng: random.Random, out: Path) -> None:
    path = checkpoint(rng, out)
    facts = json.loads((path / "run.json").read_text())
    name = rng.choice(("torch", "python", "numpy"))
    state = facts["random"][name]
    if name == "torch":
        facts["random"][name] = rng.choice((state[:-2], state + "00", "zz" + state[2:], "", 3))
    elif name == "python":
        wrong = ([3, state[1][:-1], None], [2, *state[1:]], [3, [*state[1][:-1], 9999], None], [])
        facts["random"][name] = rng.choice((*wrong, [3, state[1], "x"]))
    else:
        inner = state["state"]
        inner["pos"] = rng.choice((625, -1, 1 << 40, "0", 1.5))
    (path / "run.json").write_text(json.dumps(facts))
    rehash(path)


def the_manifest(rng: random.Random, out: Path) -> None:
    path = checkpoint(rng, out) / "manifest.json"
    hashes = json.loads(path.read_text())
    outside = out.parent / "outside"
    outside.write_text("x")
    chance = rng.randrange(7)
    if chance == 0:
        hashes[str(outside)] = sha256_of_file(outside)
    elif chance == 1:
        hashes["../../../outside"] = sha256_of_file(outside)
    elif chance == 2:
        hashes["/dev/zero"] = "0"
    elif chance == 3:
        hashes[rng.choice(("", ".", "..", "\x1b", "a\0b", "x" * 300))] = "0"
    else:
        hashes = harmed(rng, hashes)
    path.write_text(DEEP if chance == 6 else json.dumps(hashes))


def the_optimizer(rng: random.Random, out: Path) -> None:
    path = checkpoint(rng, out)
    file = path / "optimizer.safetensors"
    tensors = {key: t.clone() for key, t in load_file(file).items()}
    key = rng.choice(sorted(tensors))
    index, _, name = key.partition(".")
    wrong = torch.full_like(tensors[key], rng.choice((float("nan"), float("inf"))))
    chance = rng.randrange(9)
    if chance == 0:
        del tensors[key]
    elif chance == 1:
        tensors = {k: t for k, t in tensors.items() if not k.startswith(f"{index}.")}
    elif chance == 2:
        other = rng.choice((f"x.{name}", f"-1.{name}", f"99.{name}", "0", "0.", f"{index}.other"))
        tensors[other] = tensors.pop(key)
    elif chance == 3:
        tensors[key] = tensors[key].to(rng.choice((torch.int32, torch.float16, torch.float64)))
    elif chance == 4:
        tensors[key] = tensors[key][None].repeat(2, *[1] * tensors[key].dim())
    elif chance == 5:
        tensors[key] = wrong
    elif chance == 6:
        tensors[f"{index}.step"] = torch.tensor(rng.choice((-1.0, 3.0, 0.5, 1e9)))
    elif chance == 7:
        tensors[f"{index}.exp_avg_sq"] = -1 - tensors[f"{index}.exp_avg_sq"]
    else:
        tensors = {}
    save_file(tensors, file)
    rehash(path)


def the_best_adapter(rng: random.Random, out: Path) -> None:
    path = out / "checkpoints" / "step-00000002"
    file = path / "best.safetensors"
    tensors = {key: t.clone() for key, t in load_file(file).items()}
    key = rng.choice(sorted(tensors))
    chance = rng.randrange(7)
    if chance == 0:
        del tensors[key]
    elif chance == 1:
        tensors[rng.choice(("x", "-1", "99", "", f"{key}.exp_avg"))] = tensors.pop(key)
    elif chance == 2:
        tensors[key] = tensors[key].to(rng.choice((torch.int32, torch.float16, torch.float64)))
    elif chance == 3:
        tensors[key] = tensors[key][None].repeat(2, *[1] * tensors[key].dim())
    elif chance == 4:
        tensors[key] = torch.full_like(tensors[key], rng.choice((float("nan"), float("inf"))))
    elif chance == 5:
        tensors["99"] = tensors[key].clone()
    else:
        tensors = {}
    save_file(tensors, file)
    rehash(path)


def the_metrics(rng: random.Random, out: Path) -> None:
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    kept = out.parent / "kept"
    path.rename(kept)
    chance = rng.randrange(7)
    if chance == 0:
        path.symlink_to(kept)
    elif chance == 1:
        path.mkdir()
    elif chance == 2:
        os.mkfifo(path)
    elif chance == 3:
        rng.shuffle(lines)
        path.write_bytes(b"".join(lines))
    elif chance == 4:
        path.write_bytes(b"".join(lines[: rng.randint(0, len(lines))]))
    elif chance == 5:
        path.write_bytes(b"".join(lines) + rng.choice((b"{", b"\xff" * 99, lines[0])))


def a_file_of_a_checkpoint(rng: random.Random, out: Path) -> None:
    path = checkpoint(rng, out)
    file = rng.choice(sorted(path.iterdir()))
    kept = out.parent / "kept"
    chance = rng.randrange(8)
    if chance < 4:
        file.rename(kept)
    if chance == 1:
        file.symlink_to(kept)
    elif chance == 2:
        os.mkfifo(file)
    elif chance == 3:
        file.mkdir()
    elif chance == 4:
        (path / rng.choice(("more", ".hidden", "\x1b[31m", "run.json.old"))).write_text("x")
    elif chance == 5:
        other = rng.choice([p for p in sorted(path.iterdir()) if p != file])
        shutil.copyfile(file, kept)
        shutil.copyfile(other, file)
        shutil.copyfile(kept, other)
    elif chance >= 6 and file.name != "run.json":
        first = out / "checkpoints" / "step-00000001" / file.name
        file.write_bytes(first.read_bytes())
    if file.name != "manifest.json" and chance not in (5, 6, 7) and rng.random() < 0.5:
        rehash(path)


def the_folder_of_checkpoints(rng: random.Random, out: Path) -> None:
    folder = out / "checkpoints"
    newest = folder / "step-00000002"
    kept = out.parent / "kept"
    chance = rng.randrange(10)
    if chance == 0:
        newest.rename(folder / rng.choice(("step-00000003", "step-000000002", "step-99999999")))
    elif chance == 1:
        newest.rename(kept)
        newest.symlink_to(kept)
    elif chance == 2:
        folder.rename(kept)
        folder.symlink_to(kept)
    elif chance == 3:
        (folder / rng.choice(("step-00000009", "step-99999999999999999999"))).mkdir()
    elif chance == 4:
        (folder / "step-00000009").write_text("x")
    elif chance == 5:
        (folder / ".step-00000003.partial").mkdir()
        (folder / ".step-00000003.0f0f.partial").mkdir()
    elif chance == 6:
        shutil.rmtree(newest)
    elif chance == 7:
        shutil.rmtree(folder)
    elif chance == 8:
        shutil.rmtree(folder)
        folder.write_text("x")
    else:
        shutil.copytree(newest, folder / "step-00000003")


def around_it(rng: random.Random, out: Path) -> None:
    chance = rng.randrange(8)
    lock, outside = out / ".minilora.lock", out.parent / "outside"
    outside.write_text("x")
    if chance == 0:
        lock.write_text("pid 1 on \x1b[31m")
    elif chance == 1:
        lock.symlink_to(outside)
    elif chance == 2:
        os.mkfifo(lock)
    elif chance == 3:
        lock.mkdir()
    elif chance == 4:
        (out / "config.json").write_text(rng.choice(("", DEEP, "{}", "[]")))
    elif chance == 5:
        name = rng.choice(("report.md", "loss.png"))
        (out / name).write_text(rng.choice(("x", "\x1b[31m")))
    elif chance == 6:
        events = out / "tensorboard"
        shutil.rmtree(events, ignore_errors=True)
        events.symlink_to(out.parent)
    else:
        (out / "adapter_model.safetensors").write_text("x")


HARMS: dict[str, Harm] = {
    harm.__name__: harm
    for harm in (
        bytes_of_a_file,
        values_of_run_json,
        values_of_the_config,
        the_random_states,
        the_manifest,
        the_optimizer,
        the_best_adapter,
        the_metrics,
        a_file_of_a_checkpoint,
        the_folder_of_checkpoints,
        around_it,
    )
}

# Not within the first case.
runs()
