"""What tests of interrupted runs share: everything that a run leaves, and ways to interrupt it."""

import json
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minilora.training import FinetuneConfig, Interrupted, Sample, finetune, loop, recipe
from minilora.training.random_state import random_states

# What a finished run leaves in its folder.
FINISHED = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    *(["loss.png"] if find_spec("matplotlib") else []),
    "metrics.jsonl",
    "report.md",
    *(["tensorboard"] if find_spec("tensorboard") else []),
]


@dataclass
class Outcome:
    """Everything that two runs have to agree in. Only the seconds may differ."""

    history: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    evaluated: tuple[float | None, float | None, int | None]
    samples: list[Sample]
    adapter: dict[str, Tensor]
    optimizer: dict[str, Any]
    randomness: dict[str, Any]

    def agrees(self, other: "Outcome") -> bool:
        return (
            self.history == other.history
            and self.metrics == other.metrics
            and self.evaluated == other.evaluated
            and self.samples == other.samples
            and same_tensors(self.adapter, other.adapter)
            and self.optimizer["param_groups"] == other.optimizer["param_groups"]
            and self.optimizer["state"].keys() == other.optimizer["state"].keys()
            and all(
                same_tensors(state, other.optimizer["state"][i])
                for i, state in self.optimizer["state"].items()
            )
            and self.randomness == other.randomness
        )


def same_tensors(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(
        torch.equal(value, theirs[key]) for key, value in mine.items()
    )


def without_seconds(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in step.items() if key != "seconds"} for step in steps]


@contextmanager
def optimizers() -> Iterator[list[torch.optim.Optimizer]]:
    """Collects the optimizers that are made inside the block."""
    made: list[torch.optim.Optimizer] = []
    original = recipe.make_optimizer

    def remember(model: Any, config: FinetuneConfig) -> torch.optim.Optimizer:
        made.append(original(model, config))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "make_optimizer", remember)
        yield made


def run(config: FinetuneConfig) -> Outcome:
    with optimizers() as made:
        result = finetune(config)
    lines = (result.out / "metrics.jsonl").read_text().splitlines()
    return Outcome(
        history=without_seconds([vars(step) for step in result.history]),
        metrics=without_seconds([json.loads(line) for line in lines]),
        evaluated=(result.eval_before, result.eval_after, result.best_step),
        samples=result.samples,
        adapter={
            n: p.detach().clone() for n, p in result.model.named_parameters() if p.requires_grad
        },
        optimizer=made[0].state_dict(),
        randomness=random_states(torch.device("cpu")),
    )


@contextmanager
def in_step(step: int, act: Callable[[], Any], accum: int = 2) -> Iterator[None]:
    """Calls `act` in the last forward pass of a step (1, 2, ... of those that are run)."""
    original, calls = loop.token_losses, [0]

    def token_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
        calls[0] += model.training
        if model.training and calls[0] == step * accum:
            act()
        return original(model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "token_losses", token_losses)
        yield


def interrupt(config: FinetuneConfig, step: int, number: int = signal.SIGINT) -> Interrupted:
    """Runs until a signal arrives in a step, then seeds the generators as a new process would."""
    with in_step(step, lambda: signal.raise_signal(number)), pytest.raises(Interrupted) as caught:
        finetune(config)
    random.seed(step)
    np.random.seed(step)
    torch.manual_seed(step)
    return caught.value


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder and its subfolders."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
