r"""Where the states live: on the device, or in host memory.

The states of a parameter are AdamW's two moments, in the dtype of the parameter or in float32
(`state_dtype`), and its number of steps, which is always on the CPU. `page` decides where the
moments are:

    "on_oom"   on the device until it runs out of memory, from then on in host memory
    "always"   in host memory from the start
    "never"    on the device; running out of memory is an error

Moving is safe to interrupt. A state is dropped only after it was copied, and `Placement` remembers
per parameter where its states are: if the host runs out of memory halfway, both halves are usable.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from minilora.optim.paging import Paging
from minilora.optim.shards import local
from minilora.optim.transfer import Transfer, transfer_for

PageMode = Literal["on_oom", "always", "never"]

# The states of one parameter: "step" and the two moments.
State = dict[str, Tensor]
States = dict[Tensor, State]

MOMENTS = ("exp_avg", "exp_avg_sq")


class Placement:
    """Knows which parameters have their states in host memory, makes states and moves them.

    The methods take the optimizer's `state` dict as an argument, because PyTorch replaces that dict
    when a state dict is loaded.

    Attributes:
        mode: the optimizer's `page`.
        state_dtype: the dtype of the moments of 16-bit parameters; None: the parameter's.
        paging: what was moved so far.
        on_host: the parameters whose states are in host memory.
    """

    def __init__(self, mode: PageMode, state_dtype: torch.dtype | None = None) -> None:
        self.mode = mode
        self.state_dtype = state_dtype
        self.paging = Paging()
        self.on_host: set[Tensor] = set()
        self._transfers: dict[torch.device, Transfer] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Transfers hold CUDA streams, which can be neither copied nor pickled.
        return {**self.__dict__, "_transfers": {}}

    @property
    def prefers_host(self) -> bool:
        """Whether states belong in host memory. Some may still be on the device."""
        return self.mode == "always" or self.paging.since is not None

    def dtype_of(self, param: Tensor) -> torch.dtype:
        """The dtype of a parameter's moments, and of the arithmetic of its update."""
        if self.state_dtype is not None and param.itemsize == 2:
            return self.state_dtype
        return param.dtype

    def transfer(self, device: torch.device) -> Transfer:
        if device not in self._transfers:
            self._transfers[device] = transfer_for(device)
        return self._transfers[device]

    def forget_transfers(self) -> None:
        """Lets the next page size be chosen from what is free then."""
        self._transfers.clear()

    def halve_pages(self) -> bool:
        """Halves the page size on every device; returns False if all are at their minimum."""
        halved = [transfer.halve_page() for transfer in self._transfers.values()]
        return any(halved)

    def new_state(self, param: Tensor, on_host: bool) -> State:
        """The states of a parameter before its first step: zeros."""
        state = {"step": torch.zeros((), dtype=torch.float32)}

        dtype = self.dtype_of(param)

        for key in MOMENTS:
            if on_host:
                state[key] = self.transfer(param.device).empty_on_host(param, dtype)
                local(state[key]).zero_()
            else:
                state[key] = torch.zeros_like(param, dtype=dtype)

        return state

    def install(self, states: States, state: States, on_host: bool) -> None:
        """Adds `states` to the optimizer's `state`; `on_host` says where all of them are."""
        state.update(states)

        if on_host:
            self.on_host = self.on_host | states.keys()
        else:
            self.on_host = self.on_host - states.keys()

    def on_device(self, state: States) -> list[Tensor]:
        """The parameters whose states are still on the device."""
        return [p for p, its_state in state.items() if its_state and p not in self.on_host]

    def mark_start(self, state: States) -> None:
        """Records in `paging.since` that the states belong in host memory from this step on."""
        if self.paging.since is None:
            steps = [its_state["step"].item() for its_state in state.values() if its_state]
            self.paging.since = 1 + int(max(steps, default=0))

    def move_to_host(self, state: States) -> int:
        """Moves all states to host memory; returns the number of bytes moved."""
        if self.mode == "never":
            raise ValueError(
                'page="never" keeps the states on the device: '
                'create the optimizer with page="on_oom" to move them'
            )
        self.mark_start(state)
        total = 0

        with self.paging.timed():
            for p in self.on_device(state):
                moved = {key: self._copy_to_host(p, state[p][key]) for key in MOMENTS}
                state[p].update(moved)
                self.on_host.add(p)

                nbytes = _local_bytes(moved)
                self.paging.bytes_out += nbytes
                total += nbytes

        return total

    def _copy_to_host(self, param: Tensor, moment: Tensor) -> Tensor:
        copy = self.transfer(param.device).empty_on_host(moment, moment.dtype)
        local(copy).copy_(local(moment))
        return copy

    def move_to_device(self, state: States) -> int:
        """Moves all states to the device, or none; returns the number of bytes moved."""
        if self.mode == "always":
            raise ValueError(
                'page="always" keeps the states on the host: '
                'create the optimizer with page="on_oom" to move them'
            )

        with self.paging.timed():
            try:
                moved = {p: _copies_on_device(p, state[p]) for p in self.on_host}
            except torch.OutOfMemoryError as error:
                raise torch.OutOfMemoryError(
                    f"{error}\nThe optimizer states stay on the host, and training can continue."
                ) from None
            for p, moments in moved.items():
                state[p].update(moments)

        self.on_host.clear()
        self.forget_transfers()
        self.paging.since = None

        total = sum(map(_local_bytes, moved.values()))
        self.paging.bytes_in += total
        return total


def _copies_on_device(param: Tensor, state: State) -> State:
    copies = {key: torch.empty_like(param, dtype=state[key].dtype) for key in MOMENTS}
    for key, copy in copies.items():
        local(copy).copy_(local(state[key]))
    return copies


def _local_bytes(moments: State) -> int:
    return sum(local(moment).nbytes for moment in moments.values())
