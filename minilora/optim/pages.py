r"""Pages: the parameters of a step, cut into units of bounded size.

An update works on one page at a time. Many small parameters share a page, and a parameter that is
larger than a page is cut into chunks:

    parameters   | a | b |           c              | d |
    pages        | a   b   c0 | c1        | c2   d |

Why pages and not tensors: copying thousands of small LoRA matrices one by one would cost a launch
each, and copying one large embedding at once would need as much device memory as paging was meant
to save. bitsandbytes pages whole tensors, and only those of at least 1e5 elements.

The same pages serve states that never leave the device; there a page only bounds the scratch
memory of an update. Cutting costs no copies: every chunk is a view.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# In elements: every chunk starts on a cache line and on a whole vector.
ALIGN = 64

# A parameter group as PyTorch keeps it: its parameters and its options.
Group = dict[str, Any]


class Update(NamedTuple):
    """One parameter in one step. Its states are dense tensors of the parameter's shape.

    Of a sharded parameter this is the part that this process has.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    # The number of the step being taken, from 1.
    step: float

    # Whether the two states are in host memory.
    on_host: bool

    @property
    def can_be_cut(self) -> bool:
        """Whether all four tensors have the same strides, without gaps.

        Only then is every run of elements in memory order a flat tensor in each of them.
        """
        return self.param.stride() == self.grad.stride() == self.exp_avg.stride()


class Chunk(NamedTuple):
    """Elements start ... start + length of a parameter, in memory order.

    In the flat memory of their page they start at `offset`.
    """

    update: Update
    start: int
    length: int
    offset: int

    def view_in_param(self, tensor: Tensor) -> Tensor:
        """The chunk as a view of `tensor`, one of the tensors of the update.

        A chunk that is the whole tensor keeps its shape, so that the operators traverse it as they
        would without pages.
        """
        if self.length == tensor.numel():
            return tensor
        return self.flat_view_in_param(tensor)

    def flat_view_in_param(self, tensor: Tensor) -> Tensor:
        """The chunk as a one-dimensional view of `tensor`, in memory order."""
        return tensor.as_strided((self.length,), (1,), tensor.storage_offset() + self.start)

    def view_in_page(self, page: Tensor) -> Tensor:
        """The chunk as a view of its page's flat memory, of the shape of `view_in_param`."""
        state = self.update.exp_avg
        if self.length == state.numel():
            return page.as_strided(state.shape, state.stride(), page.storage_offset() + self.offset)
        return page[self.offset : self.offset + self.length]


class Page(NamedTuple):
    """Chunks of one parameter group and one dtype; `size` in elements of one state, with gaps."""

    group: Group
    chunks: list[Chunk]
    size: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the states and of the arithmetic."""
        return self.chunks[0].update.exp_avg.dtype

    @property
    def is_wider(self) -> bool:
        """Whether the states are in a wider dtype than the parameters."""
        return self.dtype != self.chunks[0].update.param.dtype

    @property
    def state_bytes(self) -> int:
        """Bytes of one of the two states, gaps included."""
        return self.size * self.dtype.itemsize

    @property
    def host_bytes(self) -> int:
        """Bytes of both states that are in host memory, without gaps: what one copy moves."""
        elements = sum(chunk.length for chunk in self.chunks if chunk.update.on_host)
        return 2 * elements * self.dtype.itemsize


def cut_into_pages(group: Group, updates: list[Update], limit: int) -> Iterator[Page]:
    """Yields pages of at most `limit` elements (a multiple of ALIGN), in the order of the updates.

    A parameter that cannot be cut and is larger than the limit gets a page of its own, as large as
    it needs to be.
    """
    chunks: list[Chunk] = []
    used = 0

    for update in updates:
        numel = update.param.numel()
        longest = limit if numel > limit and update.can_be_cut else numel

        for start in range(0, numel, max(1, longest)):
            length = min(longest, numel - start)

            if chunks and used + length > limit:
                yield Page(group, chunks, used)
                chunks = []
                used = 0

            chunks.append(Chunk(update, start, length, offset=used))
            used += round_up(length)

    if chunks:
        yield Page(group, chunks, used)


def round_up(length: int) -> int:
    """The smallest multiple of ALIGN that is at least `length`."""
    return -(-length // ALIGN) * ALIGN


def round_down(length: int) -> int:
    """The largest multiple of ALIGN that is at most `length`, but at least ALIGN."""
    return max(ALIGN, length // ALIGN * ALIGN)
