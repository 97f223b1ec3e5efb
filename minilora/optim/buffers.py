r"""All the memory of a step, and the loop over its pages.

`StepBuffers` is what makes a step safe to repeat: creating it allocates everything that the update
on one device needs and changes nothing; `run` then updates in place and allocates nothing. Running
out of memory can therefore only happen while every parameter is still as it was.

States in host memory visit the device one page at a time. Two pages fit: while one is updated, the
next one is copied in and the previous one is copied out.

    side stream   in 0 | in 1 | out 0, in 2 | out 1, in 3 | ...
    main stream          update 0 | update 1    | update 2    | ...

It costs two pages and half a page of scratch memory on the device (160 MiB with the largest pages),
and every byte of states over the bus twice per step. torchao's CPU offload copies gradients out and
parameters in instead, in every step, and updates on the CPU.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minilora.optim.pages import Chunk, Group, Page, Update, cut_into_pages, round_down
from minilora.optim.paging import Paging
from minilora.optim.transfer import Transfer

# The updates of one parameter group that share a dtype.
GroupUpdates = tuple[Group, list[Update]]


class Operands(NamedTuple):
    """What the update of a page works on: lists with one tensor per chunk.

    `scratch` are views of `flat_scratch`, which has gaps between them.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    scratch: list[Tensor]
    steps: list[float]
    flat_scratch: Tensor


UpdatePage = Callable[[Group, Operands], None]


class StepBuffers:
    """The memory of one step on one device. Creating it may run out of memory, `run` cannot.

    Args:
        transfer: of the device.
        work: what to update there.
        paged: whether states belong in host memory; pages then have the size that the transfer
            chooses, else that of its scratch memory.
    """

    def __init__(self, transfer: Transfer, work: list[GroupUpdates], paged: bool) -> None:
        self.transfer = transfer
        self.pages: list[Page] = []

        for group, updates in work:
            limit = transfer.choose_page_bytes() // 2 if paged else transfer.scratch_bytes
            limit = round_down(limit // updates[0].exp_avg.itemsize)
            self.pages += cut_into_pages(group, updates, limit)

        largest = max((page.state_bytes for page in self.pages), default=0)
        self.scratch = self._empty_on_device(largest)

        # Parameters and gradients in the dtype of wider states, side by side.
        wider = max((page.state_bytes for page in self.pages if page.is_wider), default=0)
        self.widened = [self._empty_on_device(wider) for _ in range(2)] if wider else []

        self.page_buffers: list[Tensor] = []
        if any(update.on_host for _, updates in work for update in updates):
            self.page_buffers = [self._empty_on_device(2 * largest) for _ in range(2)]

    def _empty_on_device(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.transfer.device)

    def run(self, update: UpdatePage, paging: Paging) -> None:
        """Updates page after page, and counts in `paging` what was copied."""
        if not self.page_buffers:
            for page in self.pages:
                self._update(update, page)
            return

        self.transfer.wait_for_compute()
        next_event = self._copy_in(0)

        for i, page in enumerate(self.pages):
            event = next_event
            next_event = self._copy_in(i + 1)

            self.transfer.wait(event)
            self._update(update, page, self._states_on_device(i))

            self.transfer.copy_out((host, device) for device, host in self._state_pairs(i))
            self._count(page, paging)

        self.transfer.synchronize()

    def _copy_in(self, i: int) -> Any:
        if i < len(self.pages):
            return self.transfer.copy_in(self._state_pairs(i))
        return None

    def _states_on_device(self, i: int) -> tuple[Tensor, Tensor]:
        """Both states of page i, flat, in the buffer that page i uses."""
        page = self.pages[i]
        flat = self.page_buffers[i % 2][: 2 * page.state_bytes].view(page.dtype)
        return flat[: page.size], flat[page.size :]

    def _state_pairs(self, i: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(view in the page buffer, view in host memory) of each state of page i on the host."""
        exp_avg, exp_avg_sq = self._states_on_device(i)

        for chunk in self.pages[i].chunks:
            if chunk.update.on_host:
                elements = slice(chunk.offset, chunk.offset + chunk.length)
                yield exp_avg[elements], chunk.flat_view_in_param(chunk.update.exp_avg)
                yield exp_avg_sq[elements], chunk.flat_view_in_param(chunk.update.exp_avg_sq)

    def _update(
        self, update: UpdatePage, page: Page, paged: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Updates a page. Under wider states the parameters are widened, and rounded once."""
        operands = self._operands(page, paged)
        if not page.is_wider:
            update(page.group, operands)
            return

        flat = [buffer[: page.state_bytes].view(page.dtype) for buffer in self.widened]
        params, grads = ([chunk.view_in_page(wide) for chunk in page.chunks] for wide in flat)
        torch._foreach_copy_(params, operands.params)
        torch._foreach_copy_(grads, operands.grads)
        update(page.group, operands._replace(params=params, grads=grads))
        torch._foreach_copy_(operands.params, params)

    def _operands(self, page: Page, paged: tuple[Tensor, Tensor] | None = None) -> Operands:
        """`paged`: both states of the page in its buffer, for the chunks that are on the host."""
        scratch = self.scratch[: page.state_bytes].view(page.dtype)
        operands = Operands([], [], [], [], [], [], scratch)

        for chunk in page.chunks:
            exp_avg, exp_avg_sq = _states_of(chunk, paged)
            operands.params.append(chunk.view_in_param(chunk.update.param))
            operands.grads.append(chunk.view_in_param(chunk.update.grad))
            operands.exp_avgs.append(exp_avg)
            operands.exp_avg_sqs.append(exp_avg_sq)
            operands.scratch.append(chunk.view_in_page(scratch))
            operands.steps.append(chunk.update.step)

        return operands

    def _count(self, page: Page, paging: Paging) -> None:
        moved = page.host_bytes
        paging.bytes_in += moved
        paging.bytes_out += moved
        paging.pages += moved > 0
        paging.page_bytes = self.transfer.page_bytes


def _states_of(chunk: Chunk, paged: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The chunk's two states on the device: in the page buffer, or where they live."""
    update = chunk.update
    if paged is not None and update.on_host:
        exp_avg, exp_avg_sq = paged
        return chunk.view_in_page(exp_avg), chunk.view_in_page(exp_avg_sq)
    return chunk.view_in_param(update.exp_avg), chunk.view_in_param(update.exp_avg_sq)
