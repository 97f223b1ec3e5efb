"""What paging has done so far: the record behind `PagedAdamW.paging`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(repr=False)
class Paging:
    """What paging has done so far.

    Attributes:
        since: the optimizer step in which the states moved to host memory, counted from 1;
            None while they live on the device.
        pages: number of pages that were copied in, updated and copied out.
        page_bytes: current size of a page, both states together; 0 before the first page.
        bytes_in, bytes_out: bytes copied to the device and to the host, including the initial move
            to the host.
        milliseconds: wall time of moves and of paged updates.
    """

    since: int | None = None
    pages: int = 0
    page_bytes: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    milliseconds: float = 0.0

    @contextmanager
    def timed(self, enabled: bool = True) -> Iterator[None]:
        """Adds the time spent in the block to `milliseconds`, unless the block raises."""
        start = time.perf_counter()
        yield
        if enabled:
            self.milliseconds += 1e3 * (time.perf_counter() - start)

    def __repr__(self) -> str:
        if self.since is None:
            where = "states on the device"
        else:
            where = f"states on the host since step {self.since}"

        pages = f"{self.pages} pages of up to {self.page_bytes / 1e6:.1f} MB"
        moved = f"{self.bytes_in / 1e6:.1f} MB in, {self.bytes_out / 1e6:.1f} MB out"
        return f"Paging({where}; {pages}; {moved}, {self.milliseconds:.0f} ms)"
