r"""Running a training step again after it ran out of memory.

A long sequence runs out of memory in forward or backward, before the optimizer has its turn to move
its states. `retry_on_oom` then moves them and runs forward and backward once more. What the first
run has changed is little: random generators and gradients. Both are saved before and restored, so
the second run is bit-identical to one that never failed.

It costs nothing while gradients are None at the start; while they accumulate, one copy of them to
host memory per call. accelerate's `find_executable_batch_size` restarts the whole training with a
smaller batch instead.

With several processes there is no second run: each process takes part in the others' forward and
backward, and one that repeats its own would wait for them, and they for it.
"""

import gc
import random
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from minilora.optim.adamw import PagedAdamW

T = TypeVar("T")


def retry_on_oom(step: Callable[[], T], optimizer: PagedAdamW) -> T:
    """Runs forward and backward; if the device runs out of memory, again with the states moved.

    The second run starts with the gradients and the random state that the first one found (of
    PyTorch on the CPU and the parameters' devices, of Python and of NumPy). Its loss, gradients and
    random state are bit-identical to those of a step that never failed.

    Args:
        step: runs forward and backward once and returns, for example, the loss. It may be called
            twice: anything else that it changes is changed twice (the running mean of a BatchNorm,
            an iterator, gradients of parameters that the optimizer does not have).
        optimizer: the gradients of its parameters are restored. With page="never" its states stay
            where they are, and only the allocator's cache is emptied.

    Returns:
        What `step` returned.

    Raises:
        torch.OutOfMemoryError: the second run failed too, or the gradients could not be saved. The
            message says what was in use, what was freed and what to change. Gradients and random
            state are as they were before. With several processes: the first run failed.
        MemoryError: not enough host memory for the states.

    While gradients accumulate (they are not None), each call first copies them to host memory. A
    CPU that runs out of memory raises a plain RuntimeError, which is not caught: moving states
    within its own memory would not help.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> optimizer = minilora.PagedAdamW(layer.parameters(), lr=1e-3)
        >>> def step():
        ...     loss = layer(torch.ones(1, 3)).sum()
        ...     loss.backward()
        ...     return loss.detach()
        >>> loss = minilora.retry_on_oom(step, optimizer)
        >>> optimizer.step()
    """
    before = _Snapshot(optimizer)

    try:
        return step()
    except torch.OutOfMemoryError as error:
        first = str(error)

    # Outside the handler: its traceback kept alive the frames of `step`, and with them activations.
    before.restore()
    if (processes := _processes()) > 1:
        raise torch.OutOfMemoryError(_ran_out_in_a_group(first, processes, optimizer.page))
    gc.collect()
    freed = 0 if optimizer.page == "never" else optimizer.page_out()
    optimizer.release()

    try:
        return step()
    except torch.OutOfMemoryError as error:
        second = str(error)

    in_use = optimizer.in_use()
    before.restore()
    raise torch.OutOfMemoryError(_ran_out_twice(first, second, freed, in_use))


def _ran_out_twice(first: str, second: str, freed: int, in_use: str) -> str:
    return (
        "forward + backward ran out of memory twice.\n"
        f"  first: {first}\n"
        f"  then: {second}\n"
        f"In between, {freed / 1e6:.1f} MB of optimizer states moved to the host and the "
        "allocator's cache was emptied.\n"
        f"In use after the second failure: {in_use}.\n"
        "Use a smaller batch (and accumulate gradients), shorter sequences, or gradient "
        "checkpointing."
    )


def _processes() -> int:
    """The number of processes that train together."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if started else 1


def _ran_out_in_a_group(first: str, processes: int, page: str) -> str:
    always = "" if page == "always" else ', PagedAdamW(page="always")'
    return (
        f"forward + backward ran out of memory: {first}\n"
        f"It is not repeated, because the other processes ({processes - 1}) would not take part.\n"
        "Use a smaller batch (and accumulate gradients), shorter sequences, gradient checkpointing"
        f"{always}."
    )


class _Snapshot:
    """What a step finds: random states, and the gradients of the optimizer's parameters."""

    def __init__(self, optimizer: PagedAdamW) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.grads = [(p, None if p.grad is None else p.grad.to("cpu", copy=True)) for p in params]

        self.python = random.getstate()
        self.numpy = np.random.get_state()
        self.cpu = torch.get_rng_state()

        devices = {p.device for p in params} - {torch.device("cpu")}
        self.devices = {d: torch.get_device_module(d).get_rng_state(d) for d in devices}

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)

        for p, grad in self.grads:
            _restore_grad(p, grad)


def _restore_grad(p: Tensor, grad: Tensor | None) -> None:
    if grad is None:
        p.grad = None
    elif p.grad is None:
        # The step has dropped the gradient.
        p.grad = grad.to(p.device, copy=True)
    else:
        # In place, since that needs no memory.
        with torch.no_grad():
            p.grad.copy_(grad)
