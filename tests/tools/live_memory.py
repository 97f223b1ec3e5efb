"""The bytes of the tensors that are alive, or that autograd keeps, counted storage by storage."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Inside the block, every storage that an operator returns counts until it is freed.

    Attributes:
        now: bytes of the storages alive now that were made inside the block.
        peak: the most that `now` has been.
        at_peak: (bytes, dtype, shape, operator) of each of them at that moment.
    """

    def __init__(self, known: Any = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_peak: list[tuple[int, str, tuple[int, ...], str]] = []
        self._live: dict[int, tuple[int, str, tuple[int, ...], str]] = {}
        # What is there already: an operator may return it.
        self._known = {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.device.type == "cpu":
                self._count(t, str(func))
        return out

    def _count(self, t: torch.Tensor, func: str) -> None:
        storage = t.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if not size or key in self._live or key in self._known:
            return
        self._live[key] = size, str(t.dtype), tuple(t.shape), func
        self.now += size
        weakref.finalize(storage, self._free, key)
        if self.now > self.peak:
            self.peak = self.now
            self.at_peak = sorted(self._live.values(), reverse=True)

    def _free(self, key: int) -> None:
        size, *_ = self._live.pop(key, (0,))
        self.now -= size


def parameter_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters; a tied one counts once."""
    return sum(p.nbytes for p in module.parameters())


def kept_bytes(run: Callable[[], Any], frozen: nn.Module) -> int:
    """Bytes that autograd keeps for the backward, each storage once, without the parameters."""
    found: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in frozen.parameters()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        kept.append(t)
        return t

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(found.values())
