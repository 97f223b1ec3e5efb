"""Checkpoints of a run: saved atomically, found again, verified, and restored bit for bit.

A checkpoint is a folder, OUT/checkpoints/step-00000040:

    adapter_config.json,          the adapter in PEFT's layout; the folder can be given as --adapter
    adapter_model.safetensors
    optimizer.safetensors         AdamW's moments and step counts, as "<parameter's index>.<name>"
    run.json                      format version, config, learning rate, random states, a hash of
                                  the examples, the loss on the hold-out before training
    metrics.jsonl                 the steps so far
    manifest.json                 the SHA-256 of every other file

It is written under a temporary name, synced to the disk and then renamed, so that a kill at any
moment leaves a folder that is complete, or one that is ignored. The hashes detect later damage: a
copy that was cut short, a failing disk. The order of the batches and the learning rate are
functions of the step and need no state. Nothing is pickled.
"""

import hashlib
import json
import re
import shutil
import warnings
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.files.adapters import load_adapter, save_adapter
from minilora.files.atomic import atomic_folder
from minilora.files.hashing import sha256_of_file
from minilora.files.tensors import read_tensors, write_tensors
from minilora.surgery import adapter_parameters
from minilora.training.callbacks import to_jsonl
from minilora.training.data import Example
from minilora.training.loop import Step
from minilora.training.random_state import random_states, set_random_states

# Increase it whenever the contents of a checkpoint change. Checkpoints of format 1 have no number.
FORMAT = 2

FOLDER = "checkpoints"
OPTIMIZER = "optimizer.safetensors"
RUN = "run.json"
METRICS = "metrics.jsonl"
MANIFEST = "manifest.json"

# Settings that may change when a run is resumed. The path of the data may, but not its examples.
MAY_CHANGE = {"data", "out", "device", "checkpointing", "save_every", "keep", "resume"}


@dataclass
class RunState:
    """What a checkpoint holds besides tensors and random states.

    Attributes:
        config: the settings, as JSON holds them.
        examples: the `fingerprint` of the data.
        eval_before: loss (nats per completion token) on the hold-out before training.
        history: the metrics of every step so far.
    """

    config: dict[str, Any]
    examples: str = ""
    eval_before: float | None = None
    history: list[Step] = field(default_factory=list)


def fingerprint(examples: Sequence[Example]) -> str:
    """Returns the SHA-256 of all token ids and labels.

    It changes with the data, the tokenizer and the chat template.
    """
    total = hashlib.sha256()
    for example in examples:
        numbers = [len(example.ids), *example.ids, *example.labels]
        total.update(array("q", numbers).tobytes())
    return total.hexdigest()


def save_checkpoint(
    out: Path, run: RunState, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Saves a checkpoint after the last step of `run.history`; removes all but the last `keep`.

    Raises:
        OSError: the disk is full or not writable. Earlier checkpoints stay as they were.
    """
    path = out / FOLDER / f"step-{len(run.history):08}"
    try:
        with atomic_folder(path) as folder:
            _write(folder, run, model, optimizer)
    except OSError as error:
        raise OSError(
            f"the checkpoint {path} could not be written; earlier checkpoints are unchanged: "
            f"{error}"
        ) from error

    saved = [p for p in list_checkpoints(out) if p.name <= path.name]
    for old in saved[:-keep]:
        shutil.rmtree(old)

    # Temporary folders of a process that was killed.
    for unfinished in path.parent.glob(".step-*.partial"):
        shutil.rmtree(unfinished)
    return path


def _write(folder: Path, run: RunState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    save_adapter(model, folder)

    tensors = {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    write_tensors(folder / OPTIMIZER, tensors, {})

    facts = {
        "format": FORMAT,
        "config": run.config,
        "examples": run.examples,
        "eval_before": run.eval_before,
        "lr": [group["lr"] for group in optimizer.param_groups],
        "random": random_states(adapter_parameters(model)[0].device),
    }
    (folder / RUN).write_text(json.dumps(facts) + "\n")
    (folder / METRICS).write_text(to_jsonl(run.history))

    # Last, so that it lists every other file.
    hashes = {file.name: sha256_of_file(file) for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")


def remove_checkpoints(out: Path) -> None:
    """Removes the checkpoints of a finished run."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def list_checkpoints(out: Path) -> list[Path]:
    """Returns the checkpoints in an output folder, intact or not, the newest last."""
    folder = out / FOLDER
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if re.fullmatch(r"step-\d{8,}", path.name))


def find_checkpoint(out: Path, resume: bool) -> Path | None:
    """Returns the checkpoint to resume from; None for a new run.

    Raises:
        ValueError: a new run would start where an unfinished one has left checkpoints.
        FileNotFoundError: a run is to be resumed, but there is no intact checkpoint.
    """
    if resume:
        return newest_checkpoint(out)
    if list_checkpoints(out):
        raise ValueError(
            f"{out} contains the checkpoints of an unfinished run: resume it (--resume, "
            f"resume=True), or remove {out / FOLDER} to start over"
        )
    return None


def newest_checkpoint(out: Path) -> Path:
    """Returns the newest intact checkpoint of a run; warns about each one that it skips.

    Raises:
        FileNotFoundError: there is none.
    """
    checkpoints = list_checkpoints(out)
    for path in reversed(checkpoints):
        damage = find_damage(path)
        if damage is None:
            return path
        warnings.warn(f"{path} is skipped: {damage}", stacklevel=2)

    none = f"{out} contains no checkpoint"
    if checkpoints:
        none = f"none of the {len(checkpoints)} checkpoints in {out / FOLDER} is intact"
    raise FileNotFoundError(
        f"{none} (a finished run keeps none), so there is nothing to resume: leave out --resume "
        "(resume=True) to start the run"
    )


def find_damage(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint; None if it is intact."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        changed = [name for name, hash_ in manifest.items() if sha256_of_file(path / name) != hash_]
        unlisted = {file.name for file in path.iterdir()} - {*manifest, MANIFEST}
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"it cannot be read ({error})"
    if changed:
        return f"{', '.join(changed)} is damaged or cut short"
    if unlisted:
        return f"{MANIFEST} does not list {', '.join(sorted(unlisted))}"
    return None


def read_checkpoint(path: Path) -> RunState:
    """Returns what an intact checkpoint holds besides tensors and random states.

    Raises:
        ValueError: another version of minilora wrote it, in another format.
    """
    facts = json.loads((path / RUN).read_text())
    _check_format(path, facts.get("format", 1))

    lines = (path / METRICS).read_text().splitlines()
    try:
        history = [Step(**json.loads(line)) for line in lines]
    except TypeError:
        raise ValueError(
            f"{path} was written by a version of minilora with other metrics per step: finish the "
            f"run with that version, or remove {path.parent} to start over"
        ) from None
    return RunState(facts["config"], facts["examples"], facts["eval_before"], history)


def _check_format(path: Path, found: int) -> None:
    if found == FORMAT:
        return
    formats = f"(checkpoint format {found}; this version reads format {FORMAT})"
    if found < FORMAT:
        raise ValueError(
            f"{path} was written by an older version of minilora {formats}: finish the run with "
            f"that version, or remove {path.parent} to start over"
        )
    raise ValueError(
        f"{path} was written by a newer version of minilora {formats}: update minilora to resume "
        f"the run, or remove {path.parent} to start over"
    )


def check_config(path: Path, run: RunState, config: Mapping[str, Any]) -> None:
    """Raises ValueError, which names the settings, if `config` cannot continue the run.

    Args:
        path: the checkpoint.
        run: what it holds.
        config: the settings to resume with.
    """
    # As JSON holds them: a tuple is a list.
    now = json.loads(json.dumps(dict(config)))

    differing = [
        f"{name}={run.config.get(name)!r}, not {now.get(name)!r}"
        for name in sorted(run.config.keys() | now.keys())
        if name not in MAY_CHANGE and run.config.get(name) != now.get(name)
    ]
    if differing:
        raise ValueError(
            f"{path} belongs to a run with {'; '.join(differing)}: resume with the same settings, "
            "or start a new run in another folder"
        )


def restore_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores the adapters, the optimizer's states and all random states.

    Model and optimizer may be on another device than they were.
    """
    load_adapter(model, path, allow_zero=True)

    # Copied: the tensors are mapped from a file that will be removed.
    tensors, _ = read_tensors(path / OPTIMIZER)
    states: dict[int, dict[str, Tensor]] = {}
    for key in sorted(tensors, key=lambda key: int(key.partition(".")[0])):
        index, _, name = key.partition(".")
        states.setdefault(int(index), {})[name] = tensors[key].clone()
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})

    # Whatever else is in a parameter group comes from the config.
    facts = json.loads((path / RUN).read_text())
    for group, lr in zip(optimizer.param_groups, facts["lr"], strict=True):
        group["lr"] = lr
    set_random_states(facts["random"], adapter_parameters(model)[0].device)
