"""Signs of life: each process gives one a second, and notices when another one gives none.

A process that was killed closes its connections, which the others see at once. One that hangs keeps
them open, and nobody can tell it from one that computes. So a thread of each process writes a
growing number into the store that all of them share, and reads the numbers of the others: it goes
on while the process computes, and stops with it.
"""

import threading
import time

from torch._C._distributed_c10d import Store

SECONDS_BETWEEN = 1.0


class Heartbeat(threading.Thread):
    """A thread that gives signs of life and looks for those of the other processes.

    Args:
        store: a connection to the store that no other thread uses.
        rank, size: of this process, and the number of all.

    Attributes:
        lost: why the store cannot be reached any more; None: it can.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        super().__init__(name="minilora-heartbeat", daemon=True)
        self.lost: RuntimeError | None = None
        self._store, self._rank = store, rank
        self._beats = [b""] * size
        self._seen = [time.monotonic()] * size
        self._end = threading.Event()

    def run(self) -> None:
        beat = 0
        keys = [_key(rank) for rank in range(len(self._beats))]
        try:
            while not self._end.is_set():
                beat += 1
                self._store.set(_key(self._rank), str(beat))
                if self._store.check(keys):
                    self._take_note(self._store.multi_get(keys))
                self._end.wait(SECONDS_BETWEEN)
        except RuntimeError as error:
            self.lost = error

    def _take_note(self, beats: list[bytes]) -> None:
        now = time.monotonic()
        for rank, beat in enumerate(beats):
            if beat != self._beats[rank]:
                self._beats[rank], self._seen[rank] = beat, now

    def silent(self, seconds: float) -> list[int]:
        """Returns the processes that have given no sign of life for so many seconds."""
        now = time.monotonic()
        return [rank for rank, seen in enumerate(self._seen) if now - seen > seconds]

    def end(self) -> None:
        """Ends the thread."""
        self._end.set()
        self.join(2 * SECONDS_BETWEEN)


def _key(rank: int) -> str:
    return f"beat/{rank}"
