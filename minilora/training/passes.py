"""Forward passes whose gradients are summed over the processes of a run."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minilora.distributed.processes import Processes
from minilora.sharded import sharding_of

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


class ForwardPasses:
    """Computes losses; their backward gives every process the same gradients.

    With one process it is the loss function and nothing else. With several, a model that `shard`
    has sharded communicates by itself; for any other one DDP does, while the backward pass goes on.
    DDP hooks onto the forward of what it wraps, and a loss that goes past the output head does not
    call the model's: so it wraps a module whose forward is the loss.

    Args:
        model: a model with adapters, the same in every process.
        loss: computes the loss of a batch.
        processes: the processes of the run.
    """

    def __init__(self, model: nn.Module, loss: Loss, processes: Processes) -> None:
        self._module: nn.Module = _LossModule(model, loss)
        self._sharded: Any = model if sharding_of(model) is not None else None
        self._replicated: DistributedDataParallel | None = None
        if processes.size > 1 and self._sharded is None:
            # The parameters are the same already: `Processes.check_same` has compared the base,
            # and the adapters are drawn from a seed or read from a file.
            self._replicated = _replicate(self._module)
            self._module = self._replicated

    def __call__(self, batch: Batch) -> Tensor:
        """Returns the loss of a batch."""
        loss: Tensor = self._module(batch)
        return loss

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward: only the last pass of a step communicates."""
        if self._sharded is not None:
            self._sharded.set_requires_gradient_sync(last)
        if self._replicated is None or last:
            return nullcontext()
        return self._replicated.no_sync()


def _replicate(module: nn.Module) -> DistributedDataParallel:
    with warnings.catch_warnings():
        # PyTorch 2.9 has no other name for it.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
        return DistributedDataParallel(module, init_sync=False, broadcast_buffers=False)


class _LossModule(nn.Module):
    """A module whose forward is the loss of a batch."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Batch) -> Tensor:
        return self._loss(self.model, batch)
