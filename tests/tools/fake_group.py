"""A process group of many ranks in one process: what is sent is counted and goes nowhere."""

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    """Inside the block, this process is the first of so many. Results of collectives are made up.

    Whatever is sharded inside the block must not outlive it.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        gc.collect()
        dist.destroy_process_group()


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends inside the block.

    Attributes:
        bytes: name of a collective operation -> bytes that a ring algorithm sends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.partition(".")[0]
            if name not in ("_allgather_base_", "_reduce_scatter_base_"):
                raise NotImplementedError(f"{name}: what it sends is not counted")
            # Output and input: one is all shards, the other the own one.
            self.bytes[name] += abs(args[0].nbytes - args[1].nbytes)
        return func(*args, **(kwargs or {}))
