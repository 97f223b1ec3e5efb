"""Global memory: the tensors of a launch at their real addresses, and every access checked.

An access must lie inside a tensor (gaps between its rows are outside), on a multiple of its width.
No address may get two different values from two stores of a launch, and none may be loaded after a
store: which comes first on a GPU is chance. Counted are requests (one per warp and instruction) and
sectors of 32 bytes, what memory is read and written in.
"""

import collections
import ctypes

import numpy as np
import torch
from ptx_values import Array
from torch import Tensor

SECTOR = 32
WARP = 32


class Region:
    """The memory of one tensor, from its first to its last byte."""

    def __init__(self, t: Tensor) -> None:
        steps = zip(t.shape, t.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in steps) if t.numel() else 0
        self.begin = t.data_ptr()
        self.end = self.begin + span * t.element_size()
        self.tensor = t

        bytes_ = ctypes.c_uint8 * (self.end - self.begin)
        self.memory: Array = np.ctypeslib.as_array(bytes_.from_address(self.begin))
        self.is_output = False
        self.stored = np.zeros(self.end - self.begin, np.bool_)
        self.owned = None if t.numel() == span else _owned(t, span)


def _owned(t: Tensor, span: int) -> Array:
    """Which bytes of a tensor's span are its own, and not gaps between its rows."""
    elements = torch.zeros(span, dtype=torch.uint8)
    # A row that is repeated lies in memory once.
    sizes = zip(t.shape, t.stride(), strict=True)
    once = [size if stride else 1 for size, stride in sizes]
    elements.as_strided(once, t.stride()).fill_(1)
    return np.repeat(elements.numpy().astype(np.bool_), t.element_size())


class GlobalMemory:
    """What the kernel of one launch may read and write."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.regions = [Region(t) for t in tensors]
        self.counts: collections.Counter[str] = collections.Counter()

    def load(self, addresses: Array, width: int, active: Array) -> Array:
        """Returns `width` bytes for each thread, zeros where it is not active: [threads, width]."""
        found = np.zeros((active.size, width), np.uint8)
        for region, inside in self._regions_of(addresses, width, active):
            offsets = _offsets(region, addresses[inside], width)
            if region.is_output and region.stored[offsets].any():
                raise MemoryError("load of a global address that this launch stores to")
            found[inside] = region.memory[offsets]
        self._count("load", addresses, width, active)
        return found

    def store(self, addresses: Array, values: Array, active: Array) -> None:
        """Stores values, uint8 [threads, width]."""
        width = values.shape[1]
        for region, inside in self._regions_of(addresses, width, active):
            offsets, given = _offsets(region, addresses[inside], width), values[inside]
            differs = region.stored[offsets] & (region.memory[offsets] != given)
            region.memory[offsets] = given
            region.stored[offsets] = region.is_output = True
            if differs.any() or (region.memory[offsets] != given).any():
                raise MemoryError("two stores of different values to one global address")
        self._count("store", addresses, width, active)

    def _regions_of(
        self, addresses: Array, width: int, active: Array
    ) -> list[tuple[Region, Array]]:
        """The regions that are accessed, each with the threads that access it."""
        if (addresses[active] % np.uint64(width)).any():
            raise MemoryError(f"misaligned global access of {width} bytes")

        found, left = [], active
        for region in self.regions:
            inside = left & (addresses >= region.begin) & (addresses + width <= region.end)
            if not inside.any():
                continue
            if region.owned is not None:
                own = region.owned[_offsets(region, addresses[inside], width)].all(1)
                inside[inside] = own
            found.append((region, inside))
            left = left & ~inside
            if not left.any():
                return found

        if left.any():
            thread = int(np.nonzero(left)[0][0])
            raise MemoryError(
                f"global access out of bounds: {width} bytes at "
                f"{self._nearest(int(addresses[thread]))}, thread {thread}"
            )
        return found

    def _nearest(self, address: int) -> str:
        """An address as a distance from the tensor that is nearest."""
        if not self.regions:
            return hex(address)

        def distance(region: Region) -> int:
            return max(region.begin - address, address - region.end)

        region = min(self.regions, key=distance)
        shape = "x".join(map(str, region.tensor.shape)) or "scalar"
        kind = str(region.tensor.dtype).removeprefix("torch.")
        return f"byte {address - region.begin} of {kind} {shape}"

    def _count(self, what: str, addresses: Array, width: int, active: Array) -> None:
        threads = np.nonzero(active)[0].astype(np.uint64)
        if threads.size:
            # A sector's address takes less than 59 bits; the warp stands above it.
            warps = threads // np.uint64(WARP) << np.uint64(59)
            sectors = warps | addresses[active] // np.uint64(SECTOR)
            self.counts[f"global {what} sectors"] += np.unique(sectors).size
            self.counts[f"global {what} requests"] += np.unique(warps).size
            self.counts[f"global {what} bytes"] += width * threads.size


def _offsets(region: Region, addresses: Array, width: int) -> Array:
    first = (addresses - np.uint64(region.begin)).astype(np.int64)
    return first[:, None] + np.arange(width)
