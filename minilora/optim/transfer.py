r"""Copies between host and device, and the memory at both ends.

`Transfer` is everything in this folder that depends on the kind of device: where host memory comes
from, how copies run, how much device memory is free. There are two of them:

* `BlockingTransfer` copies immediately, on any device. On the CPU, where "device" and "host" are
  the same memory, it makes the whole life of a page observable in a test.
* `CudaTransfer` uses pinned memory and a stream of its own, so that copies overlap with computing.

bitsandbytes uses CUDA's unified memory instead, where the driver decides what moves and when.
Explicit copies need this file, but every byte that moves is counted and nothing else is touched.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor

from minilora.optim.shards import local

# Bytes of both states: 2 ms at the peak of PCIe 4.0, next to which a kernel launch is negligible.
LARGEST_PAGE = 64 * 2**20

# Bytes of both states. A device with less than this free has other problems than the optimizer.
SMALLEST_PAGE = 2**16

# (target, source) of each copy.
Copies = Iterable[tuple[Tensor, Tensor]]


class Transfer(ABC):
    """Moves the states of one device's parameters between that device and host memory.

    Attributes:
        page_bytes: size of a page, both states together. Chosen at the first page, halved whenever
            the device runs out of memory again; 0 before the first page.
        scratch_bytes: scratch memory of an update whose states are on the device.
    """

    scratch_bytes: int

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.page_bytes = 0

    def choose_page_bytes(self) -> int:
        """Returns the page size, chosen at the first call.

        Two pages and the scratch memory, half a page, have to fit into what is free.
        """
        if not self.page_bytes:
            self.page_bytes = max(SMALLEST_PAGE, min(LARGEST_PAGE, self.free_bytes() // 4))
        return self.page_bytes

    def halve_page(self) -> bool:
        """Halves the page size; returns False if it is already at its minimum."""
        if self.page_bytes <= SMALLEST_PAGE:
            return False
        self.page_bytes //= 2
        return True

    def empty_on_host(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns uninitialized host memory for a dense copy of `like` in `dtype`.

        That of a sharded tensor is sharded alike; this process's part of it is in host memory.

        Raises:
            MemoryError: the host does not have enough memory.
        """
        try:
            return self._empty_on_host(like, dtype)
        except RuntimeError as error:
            nbytes = local(like).numel() * dtype.itemsize
            raise MemoryError(
                f"not enough host memory: cannot allocate {nbytes} bytes for a state of shape "
                f"{tuple(like.shape)}: {error}. States that have already moved stay on the host, "
                "the others on the device, and none is lost: free host memory and try again"
            ) from error

    @abstractmethod
    def _empty_on_host(self, like: Tensor, dtype: torch.dtype) -> Tensor: ...

    @abstractmethod
    def free_bytes(self) -> int:
        """Device memory that can still be allocated, in bytes."""

    @abstractmethod
    def release(self) -> None:
        """Returns memory cached by the device's allocator to the device."""

    @abstractmethod
    def in_use(self) -> str:
        """How much memory the device has in use, for an error message."""

    @abstractmethod
    def wait_for_compute(self) -> None:
        """Makes the copies that follow see everything computed so far."""

    @abstractmethod
    def copy_in(self, copies: Copies) -> Any:
        """Starts copies to the device; returns an event for `wait`."""

    @abstractmethod
    def wait(self, event: Any) -> None:
        """Makes the computations that follow see the copies of that `copy_in`."""

    @abstractmethod
    def copy_out(self, copies: Copies) -> None:
        """Starts copies to the host of what has been computed so far."""

    @abstractmethod
    def synchronize(self) -> None:
        """Returns when all copies are done."""


@final
class BlockingTransfer(Transfer):
    """Copies immediately, to and from pageable memory: for the CPU and any device but CUDA."""

    # Less would fit into the cache, but every page wakes all threads twice.
    scratch_bytes = 4 * 2**20

    def _empty_on_host(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(like, device="cpu", dtype=dtype)

    def free_bytes(self) -> int:
        return 4 * LARGEST_PAGE

    def release(self) -> None: ...

    def in_use(self) -> str:
        return f"{self.device}: not known"

    def wait_for_compute(self) -> None: ...

    def copy_in(self, copies: Copies) -> None:
        for target, source in copies:
            target.copy_(source)

    def wait(self, event: None) -> None: ...

    def copy_out(self, copies: Copies) -> None:
        self.copy_in(copies)

    def synchronize(self) -> None: ...


@final
class CudaTransfer(Transfer):
    """Pinned memory, and copies on a stream of their own.

    All copies run in order on that stream, so a buffer is only filled again after its previous
    contents were copied out.
    """

    # Large, because every page costs nine kernel launches.
    scratch_bytes = 64 * 2**20

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.side_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pinned = True

    def _empty_on_host(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        if self.pinned:
            try:
                return torch.empty_like(like, device="cpu", dtype=dtype, pin_memory=True)
            except RuntimeError as error:
                self.pinned = False
                warnings.warn(
                    f"no pinned memory for optimizer states ({error}): using pageable memory from "
                    "now on, whose copies are slower and do not overlap with the update. "
                    "Raise `ulimit -l`, or give the host more memory",
                    stacklevel=2,
                )
        return torch.empty_like(like, device="cpu", dtype=dtype)

    def free_bytes(self) -> int:
        allocated = torch.cuda.memory_allocated(self.device)
        cached = torch.cuda.memory_reserved(self.device) - allocated
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(free) + cached

    def release(self) -> None:
        torch.cuda.empty_cache()

    def in_use(self) -> str:
        allocated = torch.cuda.memory_allocated(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return (
            f"{self.device}: {allocated / 1e6:.1f} MB in tensors, "
            f"{reserved / 1e6:.1f} MB reserved by PyTorch, "
            f"{free / 1e6:.1f} of {total / 1e6:.1f} MB free"
        )

    def wait_for_compute(self) -> None:
        self.side_stream.wait_stream(torch.cuda.current_stream(self.device))

    def copy_in(self, copies: Copies) -> torch.cuda.Event:
        with torch.cuda.stream(self.side_stream):
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def copy_out(self, copies: Copies) -> None:
        self.wait_for_compute()
        self.copy_in(copies)

    def synchronize(self) -> None:
        # Afterwards the host may read the states, and the allocator may reuse the buffers.
        self.side_stream.synchronize()


TRANSFERS: dict[str, type[Transfer]] = {"cuda": CudaTransfer}


def transfer_for(device: torch.device) -> Transfer:
    """The transfer for this kind of device."""
    return TRANSFERS.get(device.type, BlockingTransfer)(device)
