"""Shared memory of one CTA, with the checks that neither an interpreter nor a GPU makes.

* Nothing is read before it is written.
* Between two barriers, no byte that a warp writes is read or written by another warp. Several may
  write it in one instruction, if they write the same. (The threads of one warp run together here;
  what they do among themselves is not checked.)
* What a cp.async copies is untouchable from its issue until a wait for its group: it may land at
  any time between the two. After the wait it counts as written by the warp that asked for it, so
  that other warps need a barrier as well.

Counted are wavefronts: shared memory has 32 banks of 4 bytes and gives one word of each at a time.
Accesses of 8 and 16 bytes go by half and by quarter warps.
"""

import collections

import numpy as np
from ptx_values import Array

WARP = 32
BANKS = 32

# No warp yet; more than one.
NOBODY, SEVERAL = -1, -2


class SharedMemory:
    """`size` bytes; `grain` divides the width of every access, and is what the checks go by."""

    def __init__(self, size: int, grain: int) -> None:
        units = -(-size // grain)
        self.size, self.grain = size, grain
        # A pattern that no test expects, where nothing was written.
        self.memory = np.full((units, grain), 0xCD, np.uint8)
        self.written = np.zeros(units, np.bool_)
        self.in_flight = np.zeros(units, np.bool_)

        self.epoch = 0
        self.writer, self.write_epoch = np.full(units, NOBODY), np.full(units, -1)
        self.reader, self.read_epoch = np.full(units, NOBODY), np.full(units, -1)

        self.pending: list[_Copy] = []
        self.groups: list[list[_Copy]] = []
        self.counts: collections.Counter[str] = collections.Counter()

    def barrier(self) -> None:
        """All warps have come here."""
        self.epoch += 1

    def load(self, addresses: Array, width: int, active: Array) -> Array:
        """Returns `width` bytes for each thread, zeros where it is not active: [threads, width]."""
        found = np.zeros((active.size, width), np.uint8)
        if active.any():
            threads, units = self._units(addresses, width, active)
            if not self.written[units].all():
                raise MemoryError("shared memory is read before it is written")
            self._check_flight(units)
            self._read_by(threads // WARP, units)
            found[active] = self.memory[units].reshape(-1, width)
            self._count("load", addresses, width, active)
        return found

    def store(self, addresses: Array, values: Array, active: Array) -> None:
        """Stores values, uint8 [threads, width]."""
        width = values.shape[1]
        if active.any():
            threads, units = self._units(addresses, width, active)
            self._check_flight(units)
            self._written_by(threads // WARP, units)
            self._put(units, values[active])
            self._count("store", addresses, width, active)

    def copy(self, addresses: Array, values: Array, active: Array) -> None:
        """Issues a cp.async of values, uint8 [threads, width]."""
        width = values.shape[1]
        if active.any():
            threads, units = self._units(addresses, width, active)
            self._check_flight(units)
            self._written_by(threads // WARP, units)
            self.in_flight[units] = True
            self.pending.append(_Copy(threads // WARP, units, values[active]))
            self._count("cp.async", addresses, width, active)

    def commit(self) -> None:
        """cp.async.commit_group: what was issued since the last one is a group."""
        self.groups.append(self.pending)
        self.pending = []

    def wait(self, newest: int) -> None:
        """cp.async.wait_group: all groups but the `newest` are complete."""
        while len(self.groups) > newest:
            for copy in self.groups.pop(0):
                self.in_flight[copy.units] = False
                self._written_by(copy.warps, copy.units)
                self._put(copy.units, copy.values)

    def wait_all(self) -> None:
        self.commit()
        self.wait(0)

    def _put(self, units: Array, values: Array) -> None:
        given = values.reshape(*units.shape, self.grain)
        self.memory[units] = given
        self.written[units] = True
        if (self.memory[units] != given).any():
            raise MemoryError("two threads write different values to the same shared bytes")

    def _units(self, addresses: Array, width: int, active: Array) -> tuple[Array, Array]:
        """The active threads [n], and the units that each accesses [n, width / grain]."""
        threads = np.nonzero(active)[0]
        first = addresses[threads].astype(np.int64)
        if (first % width).any():
            raise MemoryError(f"misaligned shared access of {width} bytes")
        if first.min() < 0 or first.max() + width > self.size:
            raise MemoryError(f"shared access out of bounds: there are {self.size} bytes")
        return threads, (first // self.grain)[:, None] + np.arange(width // self.grain)

    def _check_flight(self, units: Array) -> None:
        if self.in_flight[units].any():
            raise MemoryError("access to shared memory that a cp.async may still be writing")

    def _read_by(self, warps: Array, units: Array) -> None:
        warps = np.repeat(warps[:, None], units.shape[1], 1)
        if ((self.write_epoch[units] == self.epoch) & (self.writer[units] != warps)).any():
            raise MemoryError("race in shared memory: read of what another warp has just written")

        # One warp at a time stays in `reader`, so each is asked for after all have been put down.
        again = self.read_epoch[units] == self.epoch
        several = again & (self.reader[units] != warps)
        self.reader[units] = warps
        self.reader[units[several | (self.reader[units] != warps)]] = SEVERAL
        self.read_epoch[units] = self.epoch

    def _written_by(self, warps: Array, units: Array) -> None:
        warps = np.repeat(warps[:, None], units.shape[1], 1)
        other_wrote = (self.write_epoch[units] == self.epoch) & (self.writer[units] != warps)
        other_read = (self.read_epoch[units] == self.epoch) & (self.reader[units] != warps)
        self.writer[units] = warps
        self.writer[units[self.writer[units] != warps]] = SEVERAL
        if other_wrote.any():
            raise MemoryError("race in shared memory: two warps write the same bytes")
        if other_read.any():
            raise MemoryError("race in shared memory: write of what another warp has just read")
        self.write_epoch[units] = self.epoch

    def _count(self, what: str, addresses: Array, width: int, active: Array) -> None:
        self.counts[f"shared {what} wavefronts"] += wavefronts(addresses, width, active)


class _Copy:
    """A cp.async under way: the warps that issued it [n], its units [n, k] and its bytes."""

    def __init__(self, warps: Array, units: Array, values: Array) -> None:
        self.warps, self.units, self.values = warps, units, values


def wavefronts(addresses: Array, width: int, active: Array) -> int:
    """How often the banks have to be asked for an access of all warps."""
    threads = np.nonzero(active)[0]
    words = max(width // 4, 1)

    # Threads that are served together: a warp, a half or a quarter of one.
    parts = threads // (WARP // words)
    word = addresses[threads].astype(np.int64)[:, None] // 4 + np.arange(words)
    distinct = np.unique(parts[:, None] << 40 | word)

    bank = (distinct >> 40) * BANKS + distinct % BANKS
    return int(
        np.bincount(bank, minlength=BANKS * (parts.max() + 1)).reshape(-1, BANKS).max(1).sum()
    )
