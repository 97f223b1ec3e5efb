"""Signals: handlers are restored, a second signal, ignored signals, other threads."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interrupted import Outcome, in_step, interrupt, run

from minilora.training import FinetuneConfig, Interrupted, finetune
from minilora.training.checkpoints import newest_checkpoint

Configure = Callable[..., FinetuneConfig]


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_the_handlers_are_restored(resumable: Configure) -> None:
    before, inside = handlers(), []
    with in_step(1, lambda: inside.extend(handlers())):
        finetune(resumable(steps=1))
    assert handlers() == before and not set(inside) & set(before)
    interrupt(resumable(overwrite=True), 1)
    assert handlers() == before


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not(
    resumable: Configure, uninterrupted: Outcome
) -> None:
    def twice(number: int) -> Callable[[], None]:
        def act() -> None:
            signal.raise_signal(number)
            signal.raise_signal(number)

        return act

    with in_step(1, twice(signal.SIGTERM)), pytest.raises(Interrupted):
        finetune(resumable())
    before = handlers()
    with in_step(2, twice(signal.SIGINT)), pytest.raises(KeyboardInterrupt) as caught:
        finetune(resumable(resume=True))
    assert type(caught.value) is KeyboardInterrupt and handlers() == before
    assert newest_checkpoint(Path(resumable().out)).name == "step-00000001"
    assert run(resumable(resume=True)).agrees(uninterrupted)


def test_a_signal_that_is_ignored_stays_ignored(resumable: Configure) -> None:
    """As for a process in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with in_step(1, lambda: signal.raise_signal(signal.SIGINT)):
            assert len(finetune(resumable(steps=2)).history) == 2
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_a_run_works_without_handlers(resumable: Configure) -> None:
    before, found = handlers(), []
    thread = threading.Thread(target=lambda: found.append(finetune(resumable(steps=2))))
    thread.start()
    thread.join()
    assert len(found[0].history) == 2 and handlers() == before
