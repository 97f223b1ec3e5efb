r"""A training step that runs out of memory is run again, once, with the optimizer's states moved out of its way.

Forward and backward are where a long sequence runs out, before the optimizer has its turn. What they change is little: random
generators and gradients. Both are remembered, so that the second run starts from where the first one did and gives its bits.
"""

import gc
import random
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from minilora.optim.adamw import PagedAdamW

T = TypeVar("T")


def retry_on_oom(step: Callable[[], T], optimizer: PagedAdamW) -> T:
    """Runs forward + backward, and once more with the states on the host if the device runs out of memory.

    The second run starts with the random state (PyTorch's, of the CPU and of the parameters' devices, Python's, NumPy's) and the
    gradients that the first one found: its loss, gradients and random state are those of a step that never failed, to the bit.

    Args:
        step: runs forward and backward once and returns, say, the loss. It may be called twice: what else it changes (the running
            mean of a BatchNorm, an iterator, gradients of parameters that the optimizer does not have) is changed twice.
        optimizer: its parameters are those whose gradients are restored. With page="never" only the cache is emptied.

    Returns:
        What `step` returned.

    Raises:
        torch.OutOfMemoryError: the second run failed too, or the gradients could not be remembered; it says what was in use, what
            was freed and what to change. Gradients and random state are as they were before.
        MemoryError: the host has no room for the states.

    While gradients accumulate (they are not None), each call copies them to host memory first. A CPU that runs out of memory
    raises a plain RuntimeError, which is not caught: no state can be moved out of its way.

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
    before = _Before(optimizer)
    try:
        return step()
    except torch.OutOfMemoryError as error:
        first = str(error)
    # Out of the handler: the traceback held the frames of `step`, and they the activations.
    before.restore()
    gc.collect()
    freed = 0 if optimizer.page == "never" else optimizer.page_out()
    optimizer.release()
    try:
        return step()
    except torch.OutOfMemoryError as error:
        second = str(error)
    used = optimizer.in_use()
    before.restore()
    raise torch.OutOfMemoryError(
        f"forward + backward ran out of memory twice.\n  first: {first}\n  then: {second}\n"
        f"Between the two, {freed / 1e6:.1f} MB of optimizer states moved to the host and the cache was emptied.\n"
        f"In use after the second: {used}.\n"
        "Use a smaller batch (and accumulate gradients), shorter sequences, or gradient checkpointing."
    )


class _Before:
    """What a step finds: random states, and the gradients of an optimizer's parameters, copied to the host."""

    def __init__(self, optimizer: PagedAdamW) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.grads = [(p, None if p.grad is None else p.grad.to("cpu", copy=True)) for p in params]
        self.devices = {p.device for p in params} - {torch.device("cpu")}
        self.random = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.device_random = {d: torch.get_device_module(d).get_rng_state(d) for d in self.devices}

    def restore(self) -> None:
        python, numpy, cpu = self.random
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        for device, state in self.device_random.items():
            torch.get_device_module(device).set_rng_state(state, device)
        for p, grad in self.grads:
            _set_grad(p, grad)


def _set_grad(p: Any, grad: Tensor | None) -> None:
    if grad is None:
        p.grad = None
    elif p.grad is None:  # the step dropped it
        p.grad = grad.to(p.device, copy=True)
    else:
        with torch.no_grad():
            p.grad.copy_(grad)  # in place: no memory is needed
