"""The processes of a run: which of them this is, and what they tell each other.

`torchrun --nproc-per-node 4 ...` starts a program four times. Each copy finds its rank, 0 to 3, in
its environment, and a store of keys and values that all of them reach. They have two ways to talk:

    share      texts, through the store, where something happens once in a while: the model is
               loaded, a checkpoint is saved. Whoever is alive may take as long as it needs.
    exchange   numbers, a collective of torch.distributed, once per step: fast, and everybody has
               to arrive within the timeout.

A process that fails leaves its error in the store, and one that is killed or hangs stops giving
signs of life (`Heartbeat`). The others end with a `ProcessError` that says which one it was.

With one process there is no store and no process group: each function returns what it was given.
"""

import gc
import itertools
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from minilora.distributed.heartbeat import SECONDS_BETWEEN, Heartbeat

T = TypeVar("T")

# One program may start several groups, one after the other: each has keys of its own.
_groups = itertools.count()

# Between two looks into the store.
_POLL = 0.01

# A process without a sign of life for so long is taken for dead, if a collective has failed.
_SILENCE = 4 * SECONDS_BETWEEN

# So long a collective's failure waits for the reason: an error of another process, or its silence.
_PATIENCE = _SILENCE + 2 * SECONDS_BETWEEN


class ProcessError(ConnectionError):
    """Another process of the run failed, was killed or hangs; the message says which."""


class Processes:
    """The processes of a run, as one of them sees them.

    Args:
        rank: the number of this process, from 0.
        size: the number of processes.
        store: what they share; None: there is only this one.
        timeout: how many seconds a process may give no sign of life.

    Example:
        >>> alone = Processes()
        >>> alone.is_first, alone.exchange(0.5, 2.0), alone.share("the data is read", "ok")
        (True, [[0.5, 2.0]], ['ok'])
    """

    def __init__(
        self, rank: int = 0, size: int = 1, store: Store | None = None, timeout: float = 20.0
    ) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self._store = store
        self._heartbeat = None if store is None else Heartbeat(_clone(store), rank, size)
        self._shared = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, phase: str, text: str = "") -> list[str]:
        """Waits until every process has called this; returns their texts, by rank.

        Args:
            phase: what the processes have done, for error messages: "the model is loaded".
            text: what the others get to know.

        Raises:
            ProcessError: another process failed, or gave no sign of life within the timeout.
        """
        if self._store is None:
            return [text]
        self._shared += 1
        name = f"shared/{self._shared}"
        with self._connected():
            self._store.set(f"{name}/{self.rank}", text)
            return [self._text(f"{name}/{rank}", phase) for rank in range(self.size)]

    def _text(self, key: str, phase: str) -> str:
        assert self._store is not None
        while not self._store.check([key]):
            reason = self._failure(phase, self.timeout)
            if reason is not None:
                raise ProcessError(reason)
            time.sleep(_POLL)
        text: str = self._store.get(key).decode()
        return text

    def check_same(self, what: str, text: str) -> None:
        """Raises ValueError, in every process, unless all of them have the same text.

        Args:
            what: what the text stands for, such as "the base model".
            text: the value, or a hash of it.
        """
        texts = self.share(f"{what} is compared", text)
        other = [rank for rank, found in enumerate(texts) if found != texts[0]]
        if other:
            raise ValueError(
                f"{what} of rank {other[0]} is not that of rank 0: start every process with the "
                "same command, files and versions"
            )

    def exchange(self, *values: float) -> list[list[float]]:
        """Returns the numbers of every process, by rank; a collective.

        Raises:
            RuntimeError: it failed; `explained` finds out why.
        """
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine)
        return [numbers.tolist() for numbers in found]

    def on_first(self, phase: str, work: Callable[[], T]) -> T | None:
        """Does something in the first process, for which the others wait; they get None.

        Raises:
            ProcessError: in the others, if it failed.
        """
        result = work() if self.is_first else None
        self.share(phase)
        return result

    @contextmanager
    def explained(self, phase: str) -> Iterator[None]:
        """Inside the block, a collective that fails because of another process says so.

        Raises:
            ProcessError: instead of the RuntimeError of the collective.
        """
        try:
            yield
        except RuntimeError as error:
            if self._store is None or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = self._reason(error, phase)
            if reason is None:
                raise
            raise ProcessError(reason) from error

    def _reason(self, error: RuntimeError, phase: str) -> str | None:
        text = str(error).lower()
        broken = isinstance(error, dist.DistError) or "connection" in text or "timed out" in text
        if not broken:
            return None
        end = time.monotonic() + _PATIENCE
        with self._connected():
            while time.monotonic() < end:
                reason = self._failure(phase, _SILENCE)
                if reason is not None:
                    return reason
                time.sleep(_POLL)
        return (
            f"another process did not arrive within {self.timeout:g} s, though all of them are "
            f"alive ({phase}): raise timeout if one of them is so much slower"
        )

    def _failure(self, phase: str, silence: float) -> str | None:
        """Which other process has failed, and how; None: none has."""
        assert self._store is not None and self._heartbeat is not None
        others = [rank for rank in range(self.size) if rank != self.rank]
        for rank in others:
            if self._store.check([_error_key(rank)]):
                return f"rank {rank} failed: {self._store.get(_error_key(rank)).decode()}"
        if self._heartbeat.lost is not None:
            return _lost(self._heartbeat.lost)
        for rank in self._heartbeat.silent(silence):
            if rank in others:
                return (
                    f"rank {rank} was killed or hangs: no sign of life for {silence:g} s ({phase})"
                )
        return None

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            raise ProcessError(_lost(error)) from error

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Gives signs of life; an error inside the block is left for the others."""
        assert self._store is not None and self._heartbeat is not None
        self._heartbeat.start()
        try:
            yield
        except BaseException as error:
            if not isinstance(error, ProcessError):
                with suppress(RuntimeError):
                    self._store.set(_error_key(self.rank), f"{type(error).__name__}: {error}")
            raise
        finally:
            self._heartbeat.end()


def _error_key(rank: int) -> str:
    return f"error/{rank}"


def _lost(error: RuntimeError) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"the store of torchrun cannot be reached any more, so it has ended: {first[:200]}"


def count_processes() -> int:
    """Returns the number of processes that were started together: 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this is the process that prints and writes."""
    return count_processes() == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def join_processes(timeout: float) -> Iterator[Processes]:
    """Joins the processes that torchrun has started; without torchrun there is only this one.

    The process group exists inside the block. Whatever needs it, such as a model wrapped by DDP,
    has to be given up before its end.

    Args:
        timeout: how many seconds the others are waited for, in collectives too.

    Raises:
        ValueError: the program has started a process group of its own.
        ProcessError: not all of them came within the timeout.

    Example:
        >>> with join_processes(timeout=20) as processes:
        ...     processes.size
        1
    """
    if count_processes() == 1:
        yield Processes(timeout=timeout)
        return
    if dist.is_initialized():
        raise ValueError(
            "torch.distributed has a process group already, and a run starts its own: call "
            "torch.distributed.destroy_process_group() before"
        )
    processes = _join(timeout)
    try:
        with processes._alive():
            processes.share("the processes have met")
            yield processes
    except BaseException as error:
        # Their variables hold the model.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # With gloo, a module of FSDP2 that outlives the group aborts the process at its exit.
        gc.collect()
        dist.destroy_process_group()


def _join(timeout: float) -> Processes:
    limit = timedelta(seconds=timeout)
    try:
        found, rank, size = next(rendezvous("env://", timeout=limit))
        # torchrun's store may outlive the processes, with what those before a restart have said.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"minilora/{start}/{next(_groups)}", found)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    except RuntimeError as error:
        raise ProcessError(
            f"the {count_processes()} processes did not meet within {timeout:g} s: {error}"
        ) from error
    return Processes(rank, size, store, timeout)


def _clone(store: Store) -> Store:
    """A connection of its own: while one thread waits for a key, no other may use it."""
    clone: Store = store.clone()  # type: ignore[attr-defined]
    return clone
