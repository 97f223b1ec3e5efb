r"""Everything that a step allocates, and what is given up when that does not fit.

A step first allocates everything and then updates in place. `allocate` is the first half. Nothing
has changed until it returns, so running out of memory means no more than another attempt with less:

    1. the states move to host memory (`page="on_oom"`)
    2. the pages are halved, again and again, down to their minimum
    3. `torch.OutOfMemoryError`, and the caller may free memory and call `step` again

torch.optim.AdamW allocates inside the update: running out there can leave some parameters updated
and others not, with no way to tell which.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from minilora.optim.buffers import GroupUpdates, StepBuffers
from minilora.optim.checks import TrainedGroup
from minilora.optim.pages import Update
from minilora.optim.placement import Placement, States
from minilora.optim.shards import local


class Allocated(NamedTuple):
    """What a step needs: buffers for each device, and states of parameters that had none."""

    buffers: list[StepBuffers]
    new_states: States


def allocate(
    trained: list[TrainedGroup],
    state: States,
    placement: Placement,
    page_out: Callable[[], int],
) -> Allocated:
    """Allocates all memory of a step. The only thing that may change is where states live.

    Args:
        trained: what the step updates.
        state: the optimizer's states.
        placement: where they live.
        page_out: moves them to the host; called when the device runs out of memory.

    Raises:
        torch.OutOfMemoryError: not even the smallest pages fit, or page="never".
        MemoryError: the host does not have enough memory for the states.
    """
    while True:
        try:
            return _try_to_allocate(trained, state, placement)
        except torch.OutOfMemoryError as error:
            reason = str(error)

        # Outside the handler: its traceback kept alive what had been allocated.
        _free_memory(reason, state, placement, page_out)


def _try_to_allocate(trained: list[TrainedGroup], state: States, placement: Placement) -> Allocated:
    on_host = placement.prefers_host
    new_states = {
        p: placement.new_state(p, on_host)
        for _, params in trained
        for p in params
        if not state.get(p)
    }

    buffers = [
        StepBuffers(placement.transfer(device), work, paged=on_host)
        for device, work in _work_by_device(trained, state, new_states, placement).items()
    ]
    return Allocated(buffers, new_states)


def _work_by_device(
    trained: list[TrainedGroup], state: States, new_states: States, placement: Placement
) -> dict[torch.device, list[GroupUpdates]]:
    """The updates of each device, in the order of the groups, separated by dtype."""
    by_device: dict[torch.device, list[GroupUpdates]] = {}

    for group, params in trained:
        alike: dict[tuple[torch.device, torch.dtype], list[Update]] = {}

        for p in params:
            is_new = p in new_states
            on_host = placement.prefers_host if is_new else p in placement.on_host
            its_state = new_states[p] if is_new else state[p]
            assert p.grad is not None
            update = Update(
                param=local(p),
                grad=local(p.grad),
                exp_avg=local(its_state["exp_avg"]),
                exp_avg_sq=local(its_state["exp_avg_sq"]),
                step=its_state["step"].item() + 1,
                on_host=on_host,
            )
            alike.setdefault((p.device, p.dtype), []).append(update)

        for (device, _), updates in alike.items():
            by_device.setdefault(device, []).append((group, updates))

    return by_device


def _free_memory(
    reason: str, state: States, placement: Placement, page_out: Callable[[], int]
) -> None:
    """Gives up device memory, or raises an error that says what the caller can do."""
    if placement.mode == "never":
        raise torch.OutOfMemoryError(
            f"{reason}\nNo parameter has changed. "
            'page="on_oom" would move the optimizer states to the host.'
        )

    if not placement.prefers_host or placement.on_device(state):
        page_out()
        return

    if not placement.halve_pages():
        raise torch.OutOfMemoryError(
            f"{reason}\nThe optimizer states are already on the host, in pages of the smallest "
            "size. No parameter has changed: free memory on the device (a smaller batch, shorter "
            "sequences, zero_grad) and call step() again."
        )
