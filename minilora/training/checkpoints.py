"""Checkpoints of a run: saved atomically, found again, verified, and restored bit for bit.

A checkpoint is a folder, OUT/checkpoints/step-00000040:

    adapter_config.json,          the adapter in PEFT's layout; the folder can be given as --adapter
    adapter_model.safetensors
    optimizer.safetensors         AdamW's moments and step counts, as "<parameter's index>.<name>"
    best.safetensors              with eval_every: the parameters of the adapter with the lowest
                                  hold-out loss so far, as "<parameter's index>"
    run.json                      format version, config, learning rate, random states, hashes of
                                  the examples and of the base, the loss on the hold-out and the
                                  sample answers before training, how much of OUT/metrics.jsonl
                                  belongs to it
    manifest.json                 the SHA-256 of every other file

It is written under a temporary name, synced to the disk and then renamed, so that a kill at any
moment leaves a folder that is complete, or one that is ignored. It is removed the other way round:
renamed first. The hashes detect later damage: a copy that was cut short, a failing disk. The order
of the batches and the learning rate are functions of the step and need no state. Nothing is
pickled.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.files.adapter_folder import WEIGHTS
from minilora.files.adapters import save_adapter
from minilora.files.atomic import atomic_folder, sync
from minilora.files.disk_errors import naming
from minilora.files.hashing import sha256_of_file
from minilora.files.json_file import read_json
from minilora.files.peft_config import CONFIG as ADAPTER_CONFIG
from minilora.files.tensors import write_tensors
from minilora.files.text import shown
from minilora.sharded import full
from minilora.surgery import adapter_parameters
from minilora.training.data import Example
from minilora.training.run_state import METRICS, RUN, RunState, checkpoint_name

FOLDER = "checkpoints"
OPTIMIZER = "optimizer.safetensors"
BEST = "best.safetensors"
MANIFEST = "manifest.json"

_FILES = frozenset({ADAPTER_CONFIG, WEIGHTS, OPTIMIZER, RUN})

# What a process that was killed leaves of a checkpoint that it was writing or removing.
_UNFINISHED = ".step-*.partial"


def checkpoint_path(out: Path, steps: int) -> Path:
    """Returns the folder of the checkpoint after so many steps."""
    return out / FOLDER / checkpoint_name(steps)


def fingerprint(*parts: Sequence[Example]) -> str:
    """Returns the SHA-256 of all token ids and labels.

    It changes with the data, the tokenizer and the chat template.

    Args:
        parts: the training examples, and the hold-out.
    """
    total = hashlib.sha256()
    for examples in parts:
        total.update(array("q", [len(examples)]).tobytes())
        for example in examples:
            numbers = [len(example.ids), *example.ids, *example.labels]
            total.update(array("q", numbers).tobytes())
    return total.hexdigest()


def save_checkpoint(
    out: Path,
    run: RunState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
    best: Sequence[Tensor] = (),
) -> Path:
    """Saves a checkpoint after the last step of `run.history`; removes all but the last `keep`.

    The lines of these steps must already be in OUT/metrics.jsonl.

    Args:
        out: the output folder.
        run: what the checkpoint holds besides tensors.
        model: the model with its adapters. If it is sharded, the other processes `take_part`.
        optimizer: the optimizer of the adapters' parameters.
        keep: number of checkpoints to keep.
        best: the parameters of the best adapter so far, if the hold-out was evaluated.

    Raises:
        OSError: the disk is full or not writable. Earlier checkpoints stay as they were.
    """
    path = checkpoint_path(out, len(run.history))
    try:
        # The checkpoint refers to it.
        sync(out / METRICS)
        with atomic_folder(path) as folder:
            _write(folder, run, model, optimizer, best)
    except OSError as error:
        raise OSError(
            f"the checkpoint {path} could not be written; earlier checkpoints are unchanged: "
            f"{error}"
        ) from error

    saved = list_checkpoints(out)
    for old in saved[: saved.index(path) + 1][:-keep]:
        with naming(old, "removed"):
            discard(old)
    sweep(out)
    return path


def _write(
    folder: Path,
    run: RunState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: Sequence[Tensor],
) -> None:
    save_adapter(model, folder)
    write_tensors(folder / OPTIMIZER, _states(optimizer), {})
    if best:
        write_tensors(folder / BEST, {str(i): tensor for i, tensor in enumerate(best)}, {})

    facts = run.facts(optimizer, adapter_parameters(model)[0].device)
    (folder / RUN).write_text(json.dumps(facts) + "\n")

    # Last, so that it lists every other file.
    hashes = {file.name: sha256_of_file(file) for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")


def take_part(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What another process than the first does while that one saves a sharded model.

    Its part of the adapter and of the optimizer's states is gathered, in the same order.
    """
    save_adapter(model, os.devnull)
    _states(optimizer)


def _states(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's states, whole; of a sharded model every process calls this."""
    return {
        f"{index}.{name}": full(value)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def discard(path: Path) -> None:
    """Removes a checkpoint: at any moment it is there as a whole, or ignored."""
    if path.is_symlink() or not path.is_dir():
        # What a link leads to is not the run's.
        path.unlink()
        return
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    path.rename(unfinished)
    shutil.rmtree(unfinished, ignore_errors=True)


def sweep(out: Path) -> None:
    """Removes what a process that was killed has left of checkpoints."""
    for unfinished in (out / FOLDER).glob(_UNFINISHED):
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_checkpoints(out: Path) -> None:
    """Removes all checkpoints of a run, the newest last, and their folder if nothing else is in it.

    Warns if they cannot be removed.
    """
    try:
        for path in list_checkpoints(out):
            discard(path)
    except OSError as error:
        warnings.warn(f"the checkpoints could not be removed: {error}", stacklevel=2)
        return
    sweep(out)
    with suppress(OSError):
        (out / FOLDER).rmdir()


def list_checkpoints(out: Path) -> list[Path]:
    """Returns the checkpoints in an output folder, intact or not, the newest last."""
    folder = out / FOLDER
    found = folder.iterdir() if folder.is_dir() else ()
    steps = [path for path in found if re.fullmatch(r"step-[0-9]{8,18}", path.name)]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")))


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
    if path.is_symlink():
        return "it is a symbolic link"
    if not (path / MANIFEST).exists():
        return f"{MANIFEST} is missing"
    try:
        return _find_damage(path, read_json(path / MANIFEST))
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"


def _find_damage(path: Path, manifest: Mapping[str, Any]) -> str | None:
    # Only what is in this folder is opened, whatever the manifest names.
    present = {file.name: file for file in path.iterdir() if file.name != MANIFEST}
    if missing := manifest.keys() - present.keys():
        return f"{_listed(missing)} is missing"
    if special := {n for n, file in present.items() if file.is_symlink() or not file.is_file()}:
        return f"{_listed(special)} is not a regular file"
    if changed := {n for n, hash_ in manifest.items() if sha256_of_file(present[n]) != hash_}:
        return f"{_listed(changed)} is damaged or cut short"
    if unlisted := (_FILES | present.keys()) - manifest.keys():
        return f"{MANIFEST} does not list {_listed(unlisted)}"
    return None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(shown(name) for name in sorted(names))
