"""A run that torchrun starts again resumes what is its own, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest
from interrupted import interrupt

from minilora.distributed.processes import Processes
from minilora.training import FinetuneConfig
from minilora.training.restart import RESTART, after_restart, forget_start, remember_start


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Returns a function that sets the environment of the n-th start by the same torchrun."""

    def set_environment(restarts: int) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))

    return set_environment


def test_a_run_that_had_begun_resumes_its_checkpoint_or_starts_over(
    start: Callable[[int], None], resumable: Callable[..., FinetuneConfig]
) -> None:
    config, out = resumable(), Path(resumable().out)
    interrupt(config, 1)
    start(0)
    assert after_restart(config, Processes()) == config
    remember_start(out)

    start(1)
    resumed = after_restart(config, Processes())
    assert (resumed.resume, resumed.overwrite) == (True, False)

    # The only checkpoint is damaged.
    next(out.glob("checkpoints/*/run.json")).write_text("{}")
    over = after_restart(config, Processes())
    assert (over.resume, over.overwrite) == (False, True)


def test_what_another_torchrun_left_is_not_resumed(
    start: Callable[[int], None],
    configure: Callable[..., FinetuneConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, out = configure(), Path(configure().out)
    out.mkdir()
    start(0)
    remember_start(out)
    start(1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert after_restart(config, Processes()) == config

    # The first start of the next run removes the note, and a run that is refused writes none.
    start(0)
    after_restart(config, Processes(rank=1, size=2))
    assert (out / RESTART).exists()
    after_restart(config, Processes())
    start(1)
    assert after_restart(config, Processes()) == config


def test_without_torchrun_nothing_is_noted(
    configure: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    out = Path(configure().out)
    out.mkdir()
    remember_start(out)
    forget_start(out)
    assert list(out.iterdir()) == []
