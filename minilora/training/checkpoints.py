"""Checkpoints of a run: written whole or not at all, found again, verified, and put back to the bit.

A checkpoint is a folder, OUT/checkpoints/step-00000040:

    adapter_config.json, adapter_model.safetensors    the adapter: any of these folders serves as --adapter
    optimizer.safetensors                             AdamW's moments and counts, as "<parameter's index>.<name>"
    run.json                                          the config, what the examples were, learning rate, random states
    metrics.jsonl                                     a line for each step so far
    manifest.json                                     the SHA-256 of every other file

It is written under another name, every file is synced to the disk, and then the folder is renamed: a kill at any moment leaves a
folder that is whole, or one that is not looked at. The hashes find what a copy cut short or a failing disk did afterwards.
The order of the batches and the learning rate are functions of the step and need no state.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import threading
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from minilora.files.adapters import load_adapter, save_adapter
from minilora.files.atomic import partial, sync
from minilora.files.tensors import read_tensors, write_tensors
from minilora.surgery import adapter_parameters
from minilora.training.data import Example

FOLDER, OPTIMIZER, RUN, METRICS, MANIFEST = (
    "checkpoints",
    "optimizer.safetensors",
    "run.json",
    "metrics.jsonl",
    "manifest.json",
)

# What may change between the parts of a run. The path of the data too: what counts are the examples that it gives.
FREE = {"data", "out", "device", "checkpointing", "save_every", "keep", "resume"}


@dataclass
class Run:
    """What a checkpoint knows besides the tensors: where the run stands, and what decides its bits."""

    config: dict[str, Any]  # of FinetuneConfig, as JSON gives it back
    examples: str = ""  # their `fingerprint`
    eval_before: float | None = None  # loss on the hold-out
    metrics: list[str] = field(default_factory=list)  # a line for each step

    @property
    def step(self) -> int:
        return len(self.metrics)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the step in hand was finished and its checkpoint written. `signal` is its number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


def fingerprint(examples: Sequence[Example]) -> str:
    """Returns the SHA-256 of all token ids and labels: another file, tokenizer or chat template gives another."""
    total = hashlib.sha256()
    for e in examples:
        total.update(array("q", [len(e.ids), *e.ids, *e.labels]).tobytes())
    return total.hexdigest()


# ---- write


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a folder under a temporary name; on leaving without an error it is synced and renamed to `path`.

    On an error it is removed. A folder that stood at `path` is replaced.
    """
    temporary = partial(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in (*temporary.iterdir(), temporary):
            sync(file)
        if path.exists():  # of this step, but damaged: or the run would have gone on from it
            shutil.rmtree(path)
        temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save(
    out: Path, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Writes the checkpoint of the step that `run` stands at, then removes all but the last `keep`.

    Raises:
        OSError: the disk is full or cannot be written to; the checkpoints that were there stay.
    """
    path = out / FOLDER / f"step-{run.step:08}"
    try:
        with atomic_folder(path) as folder:
            save_adapter(model, folder)
            state = optimizer.state_dict()["state"]
            tensors = {
                f"{index}.{name}": value
                for index, held in state.items()
                for name, value in held.items()
            }
            write_tensors(folder / OPTIMIZER, tensors, {})
            device = adapter_parameters(model)[0].device
            facts: dict[str, Any] = {
                "config": run.config,
                "examples": run.examples,
                "eval_before": run.eval_before,
            }
            facts |= {
                "lr": [group["lr"] for group in optimizer.param_groups],
                "random": random_states(device),
            }
            (folder / RUN).write_text(json.dumps(facts) + "\n")
            (folder / METRICS).write_text("".join(run.metrics))
            (folder / MANIFEST).write_text(
                json.dumps({p.name: _sha256(p) for p in sorted(folder.iterdir())}, indent=2) + "\n"
            )
    except OSError as error:
        raise OSError(
            f"the checkpoint {path} could not be written; those before it are as they were: {error}"
        ) from error
    for old in [p for p in present(out) if p.name <= path.name][:-keep]:
        shutil.rmtree(old)
    for left in path.parent.glob(".step-*.partial"):  # by a kill
        shutil.rmtree(left)
    return path


def clear(out: Path) -> None:
    """Removes the checkpoints of a finished run."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


# ---- find and verify


def present(out: Path) -> list[Path]:
    """The checkpoints in a run's folder, whole or not, the newest last."""
    folder = out / FOLDER
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in found if re.fullmatch(r"step-\d{8,}", p.name))


def find(out: Path, resume: bool) -> Path | None:
    """Returns the checkpoint to go on from; None for a run that starts.

    Raises:
        ValueError: a new run is to start where there are checkpoints of an unfinished one.
        FileNotFoundError: a run is to be resumed and there is no whole checkpoint.
    """
    if resume:
        return newest(out)
    if present(out):
        raise ValueError(
            f"{out} holds the checkpoints of a run that was not finished: go on with it (--resume, resume=True), "
            f"or remove {out / FOLDER} to start anew"
        )
    return None


def newest(out: Path) -> Path:
    """Returns the newest whole checkpoint of a run; warns of each one that it has to skip.

    Raises:
        FileNotFoundError: there is none.
    """
    checkpoints = present(out)
    for path in reversed(checkpoints):
        wrong = damage(path)
        if wrong is None:
            return path
        warnings.warn(f"{path} is skipped: {wrong}", stacklevel=2)
    none = (
        f"none of the {len(checkpoints)} checkpoints in {out / FOLDER} is whole"
        if checkpoints
        else f"{out} holds no checkpoint"
    )
    raise FileNotFoundError(
        f"{none} (a finished run keeps none): there is nothing to resume. Leave out --resume (resume=True) to start the run"
    )


def damage(path: Path) -> str | None:
    """Says what is wrong with a checkpoint; None: it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        wrong = [name for name, expected in manifest.items() if _sha256(path / name) != expected]
    except FileNotFoundError as error:
        return f"it was cut short, {Path(error.filename).name} is not there"
    except (OSError, ValueError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return f"{', '.join(wrong)} is damaged or cut short" if wrong else None


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def read(path: Path) -> Run:
    """Returns what a whole checkpoint knows besides its tensors."""
    facts = json.loads((path / RUN).read_text())
    lines = (path / METRICS).read_text().splitlines(keepends=True)
    return Run(facts["config"], facts["examples"], facts["eval_before"], lines)


def check_config(path: Path, run: Run, config: Mapping[str, Any]) -> None:
    """Raises ValueError, with names, if `config` would not go on with the run that the checkpoint is of."""
    now = json.loads(json.dumps(dict(config)))
    differ = [
        name
        for name in sorted(run.config.keys() | now.keys())
        if run.config.get(name) != now.get(name)
    ]
    shown = [
        f"{name}={run.config.get(name)!r}, not {now.get(name)!r}"
        for name in differ
        if name not in FREE
    ]
    if shown:
        raise ValueError(
            f"{path} was made with {'; '.join(shown)}: give the same to resume, or start anew in another folder"
        )


# ---- put back


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts back the adapter, the optimizer's states and every random state. Model and optimizer may be on another device."""
    load_adapter(model, path, allow_zero=True)
    tensors, _ = read_tensors(path / OPTIMIZER)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key in sorted(tensors, key=lambda key: int(key.partition(".")[0])):
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensors[
            key
        ].clone()  # what was read is mapped from a file that will be removed
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    facts = json.loads((path / RUN).read_text())
    for group, lr in zip(
        optimizer.param_groups, facts["lr"], strict=True
    ):  # what else is in a group comes from the config
        group["lr"] = lr
    set_random_states(facts["random"], adapter_parameters(model)[0].device)


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of every generator that a model may draw from, as JSON holds them."""
    drawn = np.random.get_state(legacy=False)
    assert isinstance(drawn, dict)
    drawn["state"]["key"] = drawn["state"]["key"].tolist()
    states = {
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "python": random.getstate(),
        "numpy": drawn,
    }
    if device.type == "cuda":
        states["cuda"] = bytes(torch.cuda.get_rng_state(device).tolist()).hex()
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of `random_states`. The GPU's is left alone where the run was on none before."""
    torch.set_rng_state(_bytes(states["torch"]))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(states["numpy"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_bytes(states["cuda"]), device)


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


# ---- signals, and the whole of it around a loop


@dataclass
class Stop:
    """The number of the signal that asked the run to stop, once there was one."""

    signal: int | None = None


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Inside the block the first Ctrl-C or SIGTERM only sets `Stop.signal`; a Ctrl-C after it stops at once.

    A second SIGTERM is nothing new: some runners send each signal twice. Outside the main thread Python allows no handlers, and
    the block changes nothing; nor does it where a signal is ignored, as for a process in the background.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _: FrameType | None) -> None:
        if stop.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if stop.signal is None:
            stop.signal = number
            with suppress(OSError):  # `print` may be what was interrupted
                os.write(
                    2,
                    b"\nminilora: finishing this step, then saving a checkpoint (Ctrl-C again: stop at once)\n",
                )

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = [number for number, handler in before.items() if handler not in (None, signal.SIG_IGN)]
    try:
        for number in ours:
            signal.signal(number, ask)
        yield stop
    finally:
        for number in ours:
            signal.signal(number, before[number])


class Keeper:
    """Keeps one run: starts it where its last checkpoint stands, saves while it goes on, and when it is asked to stop.

    Args:
        out: the run's folder.
        config: of the run, as JSON gives it back.
        every: steps between two checkpoints; 0: none but when asked to stop.
        keep: checkpoints that are kept.
        resume: go on from the newest whole checkpoint.

    Raises:
        ValueError, FileNotFoundError: see `find` and `check_config`.
    """

    def __init__(
        self, out: Path, config: dict[str, Any], *, every: int, keep: int, resume: bool
    ) -> None:
        self.out, self.every, self.keep = out, every, keep
        self.last = find(out, resume)  # the checkpoint, known to be whole, that an error can name
        self.resumed = self.last is not None
        self.run = Run(config)
        self.stop = Stop()
        if self.last is not None:
            self.run = read(self.last)
            check_config(self.last, self.run, config)

    def check_examples(self, data: str, examples: Sequence[Example]) -> None:
        """Raises ValueError if the data gives other examples than those that the run has learned so far."""
        now = fingerprint(examples)
        if self.resumed and now != self.run.examples:
            raise ValueError(
                f"{data} gives other examples than those that {self.last} was trained on: the file has changed, or the model's "
                "tokenizer has. Restore it to resume, or start anew in another folder"
            )
        self.run.examples = now

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
        """Puts back what there is to go on from; returns the lines of metrics so far."""
        if self.last is not None:
            restore(self.last, model, optimizer)
        return list(self.run.metrics)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """To be put around the loop: catches signals, and adds to an error where the last checkpoint is."""
        with interruptible() as self.stop:
            try:
                yield
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"{error} The last checkpoint: {self.last or 'there is none yet'}."
                ) from error

    def after(self, line: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """To be called after each step, with its line of metrics.

        Raises:
            Interrupted: the run was asked to stop; its checkpoint is written.
            OSError: a checkpoint could not be written.
        """
        self.run.metrics.append(line)
        number = self.stop.signal
        if number is not None or (self.every and self.run.step % self.every == 0):
            self.last = save(self.out, self.run, model, optimizer, self.keep)
        if number is not None:
            raise Interrupted(
                number,
                f"stopped by {signal.Signals(number).name} after step {self.run.step}; the checkpoint is {self.last}. "
                "To go on, give the same command with --resume (from Python: resume=True)",
            )
