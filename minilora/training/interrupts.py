"""Ctrl-C and SIGTERM during a run: finish the current step, save a checkpoint, stop."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

MESSAGE = (
    b"\nminilora: finishing this step, then saving a checkpoint (Ctrl-C again: stop immediately)\n"
)


class Interrupted(KeyboardInterrupt):
    """A run was interrupted by Ctrl-C or SIGTERM; its checkpoint has been saved.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


@dataclass
class StopRequest:
    """The signal that asked the run to stop.

    Attributes:
        signal: its number; None: no signal has arrived in this process.
        agreed: the same of all processes of the run, after the last step.
    """

    signal: int | None = None
    agreed: int | None = None


@contextmanager
def catch_signals(request: StopRequest) -> Iterator[None]:
    """Inside the block, the first Ctrl-C or SIGTERM only records its number in `request.signal`.

    A second Ctrl-C raises KeyboardInterrupt at once. A second SIGTERM does nothing, because some
    job schedulers send each signal twice. Signals that are ignored, as for a process in the
    background, stay ignored. Outside the main thread, where Python allows no signal handlers, the
    block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: FrameType | None) -> None:
        if request.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if request.signal is None:
            request.signal = number
            # Not `print`, which may be what the signal interrupted.
            with suppress(OSError):
                os.write(2, MESSAGE)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    caught = [n for n, handler in previous.items() if handler not in (None, signal.SIG_IGN)]
    try:
        for number in caught:
            signal.signal(number, handle)
        yield
    finally:
        for number in caught:
            signal.signal(number, previous[number])
