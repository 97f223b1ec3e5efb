"""Injects running out of memory at any allocation of any operator, without a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FailingAllocator(TorchDispatchMode):
    """Within `with FailingAllocator(fails) as memory:` allocations k = 0, 1, ... are counted.

    Allocation k raises `torch.OutOfMemoryError` where fails(k); by default none does. An operator
    allocates, however it is spelled, if it returns a storage that it was not given, or makes a
    given one larger.

    Attributes:
        count: allocations so far, failed ones included.
        failed: allocations that failed.
    """

    def __init__(self, fails: Callable[[int], bool] = lambda k: False) -> None:
        super().__init__()
        self.fails = fails
        self.count = 0
        self.failed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = (args, kwargs or {})
        sizes = {storage._cdata: storage.nbytes() for storage in _storages(inputs)}

        out = func(*args, **(kwargs or {}))

        after = _storages((inputs, out))
        if any(storage.nbytes() > sizes.get(storage._cdata, 0) for storage in after):
            self._count(func)
        return out

    def _count(self, func: Any) -> None:
        k = self.count
        self.count += 1
        if self.fails(k):
            self.failed += 1
            raise torch.OutOfMemoryError(f"injected at allocation {k}: {func}")


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
