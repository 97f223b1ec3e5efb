r"""Pages: optimizer states that live in host memory and visit the device a page at a time.

The unit of work is a page, of which two fit on the device: while one is updated, the next is copied in and the last one out.

    side stream   in 0 | in 1 | out 0, in 2 | out 1, in 3 | ...
    main stream          update 0 | update 1    | update 2    | ...

`cut` packs the parameters of a step into pages: many small ones share a page, one that is larger than a page is cut. The same
pages serve states that never leave the device; then a page is only a bound on the scratch memory of an update.

`Lane` is the one seam between this and a device: where host memory comes from and how copies travel. `PlainLane` copies at once,
on any device, so the whole life of a page can be watched on the CPU; `CudaLane` has pinned memory and a stream of its own.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

ALIGN = 64  # elements: every piece starts on a cache line and on a whole vector
LARGEST_PAGE = (
    64 * 2**20
)  # bytes of both states: 2 ms of PCIe 4.0 at its peak, next to which a launch is nothing
SMALLEST_PAGE = 2**16  # below this a device has other troubles than the optimizer

Pairs = Iterable[tuple[Tensor, Tensor]]  # (target, source) of copies


@dataclass(repr=False)
class Paging:
    """What paging has done so far.

    Attributes:
        since: the optimizer step in which the states moved to the host, counted from 1; None: they live on the device.
        pages: pages that were brought in, updated and sent back.
        page_bytes: size of a page now, both states together; 0 before the first.
        bytes_in, bytes_out: moved to the device, and to the host, the moving out itself included.
        milliseconds: wall time of moves and of paged updates.
    """

    since: int | None = None
    pages: int = 0
    page_bytes: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    milliseconds: float = 0.0

    def __repr__(self) -> str:
        where = (
            "states on the device"
            if self.since is None
            else f"states on the host since step {self.since}"
        )
        moved = f"{self.bytes_in / 1e6:.1f} MB in, {self.bytes_out / 1e6:.1f} MB out, {self.milliseconds:.0f} ms"
        return (
            f"Paging({where}; {self.pages} pages of up to {self.page_bytes / 1e6:.1f} MB; {moved})"
        )


class Update(NamedTuple):
    """One parameter of one step. The states are dense; `away`: they are on the host."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: float  # the number of the step being taken, from 1
    away: bool

    @property
    def can_be_cut(self) -> bool:
        """Whether the four tensors run through memory in the same order without gaps, so that any stretch is a flat tensor."""
        return self.param.stride() == self.grad.stride() == self.exp_avg.stride()


class Piece(NamedTuple):
    """Elements start ... start + length of a parameter in memory order, which stand at `offset` of their page."""

    update: Update
    start: int
    length: int
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """A view of the piece in a tensor of the update: the tensor itself, or a flat stretch of it."""
        if self.length == tensor.numel():
            return (
                tensor  # in its own shape: the operators then walk it as they would without pages
            )
        return self.flat(tensor)

    def flat(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided((self.length,), (1,), tensor.storage_offset() + self.start)

    def within(self, page: Tensor) -> Tensor:
        """A view of the piece in a flat page, shaped as `of` shapes it."""
        state = self.update.exp_avg
        if self.length == state.numel():
            return page.as_strided(state.shape, state.stride(), page.storage_offset() + self.offset)
        return page[self.offset : self.offset + self.length]


class Page(NamedTuple):
    """Pieces of one parameter group and one dtype; `size` in elements of one state, gaps included."""

    group: dict[str, Any]
    pieces: list[Piece]
    size: int


def cut(updates: list[Update], limit: int) -> Iterator[tuple[list[Piece], int]]:
    """Yields (pieces, size) of pages of at most `limit` elements, a multiple of ALIGN, in the order of the updates.

    What cannot be cut and is larger than the limit has a page of its own, as large as it needs.
    """
    pieces: list[Piece] = []
    used = 0
    for update in updates:
        n = update.param.numel()
        longest = n if n <= limit or not update.can_be_cut else limit
        for start in range(0, n, max(1, longest)):
            length = min(longest, n - start)
            if pieces and used + length > limit:
                yield pieces, used
                pieces, used = [], 0
            pieces.append(Piece(update, start, length, used))
            used += -(-length // ALIGN) * ALIGN
    if pieces:
        yield pieces, used


class Lane(ABC):
    """Where the states of one device's parameters live on the host, and how they travel."""

    scratch_bytes: int  # of an update whose states are on the device

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.page_bytes = 0  # chosen at the first page, halved when memory runs out

    def choose_page(self) -> int:
        """Returns the bytes of a page: two of them and the scratch, half a page, have to fit in what is free."""
        self.page_bytes = self.page_bytes or max(
            SMALLEST_PAGE, min(LARGEST_PAGE, self.free_bytes() // 4)
        )
        return self.page_bytes

    def halve_page(self) -> bool:
        """Returns False where the page is as small as it gets."""
        if self.page_bytes <= SMALLEST_PAGE:
            return False
        self.page_bytes //= 2
        return True

    def host_like(self, like: Tensor) -> Tensor:
        """Returns host memory, not yet filled, for a dense copy of `like`.

        Raises:
            MemoryError: the host has none.
        """
        try:
            return self._host_like(like)
        except RuntimeError as error:
            raise MemoryError(
                f"the host has no {like.numel() * like.element_size()} bytes for a state of {tuple(like.shape)}: {error}. States "
                "that have moved stay on the host, the others on the device, and nothing is lost: free host memory and go on"
            ) from error

    @abstractmethod
    def _host_like(self, like: Tensor) -> Tensor: ...

    @abstractmethod
    def free_bytes(self) -> int: ...

    @abstractmethod
    def release(self) -> None:
        """Gives memory that the allocator caches back."""

    @abstractmethod
    def in_use(self) -> str:
        """What the device holds, for an error."""

    @abstractmethod
    def start(self) -> None:
        """Copies that follow see what the device has computed so far."""

    @abstractmethod
    def bring(self, pairs: Pairs) -> Any:
        """Begins to copy to the device; what it returns is for `arrive`."""

    @abstractmethod
    def arrive(self, ticket: Any) -> None:
        """What is computed from now on sees the copies of that `bring`."""

    @abstractmethod
    def send(self, pairs: Pairs) -> None:
        """Begins to copy to the host what was computed so far."""

    @abstractmethod
    def finish(self) -> None:
        """Returns when all copies are done."""


@final
class PlainLane(Lane):
    """Copies at once, to and from pageable memory: the CPU, and devices that have no lane of their own."""

    scratch_bytes = 4 * 2**20  # smaller would stay in cache, but each page starts all threads twice

    def _host_like(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, device="cpu")

    def free_bytes(self) -> int:
        return 4 * LARGEST_PAGE

    def release(self) -> None: ...

    def in_use(self) -> str:
        return f"{self.device}: no figures"

    def start(self) -> None: ...

    def bring(self, pairs: Pairs) -> None:
        for target, source in pairs:
            target.copy_(source)

    def arrive(self, ticket: None) -> None: ...

    def send(self, pairs: Pairs) -> None:
        self.bring(pairs)

    def finish(self) -> None: ...


@final
class CudaLane(Lane):
    """Pinned memory, and copies on a stream of their own. Everything runs in order on that stream: a buffer is filled again
    only after what it held was sent back."""

    scratch_bytes = 64 * 2**20  # large: each piece costs nine launches

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pinned = True

    def _host_like(self, like: Tensor) -> Tensor:
        if self.pinned:
            try:
                return torch.empty_like(like, device="cpu", pin_memory=True)
            except RuntimeError as error:
                self.pinned = False
                warnings.warn(
                    f"no pinned memory for optimizer states ({error}): pageable memory from here on, whose copies are slower and "
                    "do not overlap with the update. Raise `ulimit -l`, or give the host more memory",
                    stacklevel=2,
                )
        return torch.empty_like(like, device="cpu")

    def free_bytes(self) -> int:
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0]) + cached

    def release(self) -> None:
        torch.cuda.empty_cache()

    def in_use(self) -> str:
        held, kept = (
            torch.cuda.memory_allocated(self.device),
            torch.cuda.memory_reserved(self.device),
        )
        free, total = torch.cuda.mem_get_info(self.device)
        return (
            f"{self.device}: {held / 1e6:.1f} MB in tensors, {kept / 1e6:.1f} MB kept by PyTorch, "
            f"{free / 1e6:.1f} of {total / 1e6:.1f} MB free"
        )

    def start(self) -> None:
        self.side.wait_stream(torch.cuda.current_stream(self.device))

    def bring(self, pairs: Pairs) -> torch.cuda.Event:
        with torch.cuda.stream(self.side):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            ticket = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ticket.record()
        return ticket

    def arrive(self, ticket: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(ticket)

    def send(self, pairs: Pairs) -> None:
        self.start()
        self.bring(pairs)

    def finish(self) -> None:
        self.side.synchronize()  # the host may read the states, and the buffers may go back to the allocator


LANES: dict[str, type[PlainLane] | type[CudaLane]] = {"cuda": CudaLane}


def lane_for(device: torch.device) -> Lane:
    return LANES.get(device.type, PlainLane)(device)


class Operands(NamedTuple):
    """What the update of a page works on: lists of tensors, one a piece, of the same shapes; `flat`: all scratch, with its gaps."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    scratch: list[Tensor]
    steps: list[float]
    flat: Tensor


Compute = Callable[[dict[str, Any], Operands], None]


class Desk:
    """One device's share of a step, with all the memory that it needs. Making it may run out of memory; `run` allocates nothing.

    `todo` lists (group, updates of one dtype); `paged`: there are buffers for states that are away.
    """

    def __init__(
        self, lane: Lane, todo: list[tuple[dict[str, Any], list[Update]]], paged: bool
    ) -> None:
        self.lane = lane
        self.pages: list[Page] = []
        scratch = 0  # bytes, of the largest page
        for group, updates in todo:
            itemsize = updates[0].param.element_size()
            limit = (lane.choose_page() // 2 if paged else lane.scratch_bytes) // itemsize
            for pieces, size in cut(updates, max(ALIGN, limit // ALIGN * ALIGN)):
                self.pages.append(Page(group, pieces, size))
                scratch = max(scratch, size * itemsize)
        self.scratch = torch.empty(scratch, dtype=torch.uint8, device=lane.device)
        away = any(update.away for _, updates in todo for update in updates)
        self.buffers = [
            torch.empty(2 * scratch, dtype=torch.uint8, device=lane.device)
            for _ in range(2 if away else 0)
        ]

    def run(self, compute: Compute, report: Paging) -> None:
        if not self.buffers:
            for page in self.pages:
                self._update(page, None, compute)
            return
        self.lane.start()
        ahead = self._bring(0)
        for i, page in enumerate(self.pages):
            here, ahead = ahead, self._bring(i + 1)
            self.lane.arrive(here)
            self._update(page, self._states(i), compute)
            self.lane.send((host, device) for device, host in self._pairs(i))
            self._count(page, report)
        self.lane.finish()

    def _bring(self, i: int) -> Any:
        return self.lane.bring(self._pairs(i)) if i < len(self.pages) else None

    def _states(self, i: int) -> tuple[Tensor, Tensor]:
        """The two states of page i, flat, in its buffer."""
        page = self.pages[i]
        dtype, itemsize = _dtype(page)
        flat = self.buffers[i % 2][: 2 * page.size * itemsize].view(dtype)
        return flat[: page.size], flat[page.size :]

    def _pairs(self, i: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(on the device, on the host) for the states of page i that are away."""
        m, v = self._states(i)
        for piece in self.pages[i].pieces:
            if piece.update.away:
                stretch = slice(piece.offset, piece.offset + piece.length)
                yield m[stretch], piece.flat(piece.update.exp_avg)
                yield v[stretch], piece.flat(piece.update.exp_avg_sq)

    def _update(self, page: Page, states: tuple[Tensor, Tensor] | None, compute: Compute) -> None:
        dtype, itemsize = _dtype(page)
        flat = self.scratch[: page.size * itemsize].view(dtype)
        operands = Operands([], [], [], [], [], [], flat)
        for piece in page.pieces:
            update = piece.update
            if states and update.away:
                m, v = (piece.within(state) for state in states)
            else:
                m, v = piece.of(update.exp_avg), piece.of(update.exp_avg_sq)
            operands.params.append(piece.of(update.param))
            operands.grads.append(piece.of(update.grad))
            operands.exp_avgs.append(m)
            operands.exp_avg_sqs.append(v)
            operands.scratch.append(piece.within(flat))
            operands.steps.append(update.step)
        compute(page.group, operands)

    def _count(self, page: Page, report: Paging) -> None:
        moved = 2 * sum(p.length for p in page.pieces if p.update.away) * _dtype(page)[1]
        report.bytes_in += moved
        report.bytes_out += moved
        report.pages += bool(moved)
        report.page_bytes = self.lane.page_bytes


def _dtype(page: Page) -> tuple[torch.dtype, int]:
    param = page.pieces[0].update.param
    return param.dtype, param.element_size()
