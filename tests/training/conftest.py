"""What tests of training share: a small file of examples, and a run on it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interrupted import Outcome, run

from minilora.training import FinetuneConfig

WORDS = ("yes", "no", "perhaps", "never")
BASIC: dict[str, Any] = {"lr": 1e-2, "max_length": 80, "eval_fraction": 0.2}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four words in upper case, five times each."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [{"prompt": f"say {word}", "completion": word.upper()} for word in WORDS * 5]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def configure(folder: Path, data: Path, tmp_path: Path) -> Callable[..., FinetuneConfig]:
    """Returns a function that makes the config of a run on a tiny model, in tmp_path / "run"."""

    def make(**changes: Any) -> FinetuneConfig:
        paths = {"model": str(folder), "data": str(data), "out": str(tmp_path / "run")}
        return FinetuneConfig(**(paths | BASIC | changes))

    return make


RESUMABLE: dict[str, Any] = {
    "steps": 5,
    "batch_size": 2,
    "grad_accum": 2,
    "dropout": 0.1,
    "r": 4,
    "eval_every": 2,
    "save_every": 0,
}


@pytest.fixture
def resumable(configure: Callable[..., FinetuneConfig]) -> Callable[..., FinetuneConfig]:
    """`configure` for a run of five steps with dropout, that saves a checkpoint when interrupted.

    The random generators that `finetune` does not seed start from 0.
    """
    seed_generators()
    return lambda **changes: configure(**(RESUMABLE | changes))


@pytest.fixture(scope="session")
def uninterrupted(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What the `resumable` run leaves if nothing interrupts it."""
    seed_generators()
    out = tmp_path_factory.mktemp("uninterrupted")
    paths = {"model": str(folder), "data": str(data), "out": str(out)}
    return run(FinetuneConfig(**(paths | BASIC | RESUMABLE)))


def seed_generators() -> None:
    random.seed(0)
    np.random.seed(0)
