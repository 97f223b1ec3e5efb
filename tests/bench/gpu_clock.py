"""Times on a GPU: n calls in a CUDA graph, the L2 cache emptied before each.

The cache is emptied by *reading* a buffer that is larger than it. Writing would fill it as well,
but with lines that are newer than memory: they have to be written back, and that happens as the
timed kernel takes their place, at its expense. A kernel of a few microseconds that reads 8 MB would
pay for writing back up to 50 MB of zeros. Lines that were only read are dropped for nothing. The
time of a graph that only reads is subtracted.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import gpu_checks
import torch

CALLS, REPEATS = 20, 15

Sides = dict[str, Callable[[], Any]]

# Microseconds by side; None where nothing was measured.
Times = dict[str, float | None]


class Clock:
    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(gpu_checks.DEVICE).L2_cache_size
        size = max(256 << 20, 4 * cache)
        self.buffer = torch.zeros(size // 4, device=gpu_checks.DEVICE)
        self.sum = torch.zeros((), device=gpu_checks.DEVICE)
        self.empty = self._graph(lambda: None)

    def empty_cache(self) -> None:
        torch.sum(self.buffer, 0, out=self.sum)

    def _graph(self, call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        # Once before: a first call allocates, and may load a kernel.
        self.empty_cache()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                self.empty_cache()
                call()
        return graph

    def _milliseconds(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)  # type: ignore[no-any-return]

    def microseconds(self, sides: Sides) -> Times:
        """Median time of a call of each side; the sides take turns."""
        graphs = {}
        for name, call in sides.items():
            # Compiles, and fills the caches.
            call()
            torch.cuda.synchronize()
            graphs[name] = self._graph(call)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(REPEATS):
            for name, graph in graphs.items():
                milliseconds = self._milliseconds(graph) - self._milliseconds(self.empty)
                times[name].append(1000 * milliseconds / CALLS)
        return {name: statistics.median(found) for name, found in times.items()}


class StoppedClock:
    """The clock of a dry run: it calls every side once, and measures nothing."""

    def microseconds(self, sides: Sides) -> Times:
        for call in sides.values():
            call()
        return dict.fromkeys(sides)


def clock() -> Clock | StoppedClock:
    return StoppedClock() if gpu_checks.DRY_RUN else Clock()


def capture(call: Callable[[], Any]) -> Callable[[], Any]:
    """Returns what replays the call's kernels as a CUDA graph; in a dry run, the call itself."""
    if gpu_checks.DRY_RUN:
        return call

    # Once before, on another stream, as PyTorch's documentation asks: what is compiled or allocated
    # at a first call is not captured.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def seconds(call: Callable[[], Any]) -> float | None:
    """Wall time of a call and of the work that it starts on the GPU; None in a dry run."""
    if gpu_checks.DRY_RUN:
        call()
        return None
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def limits(clock: Clock) -> tuple[float, float]:
    """The card's bytes per second (a copy) and bfloat16 operations per second (a large product)."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=gpu_checks.DEVICE)
    target, square = torch.empty_like(source), gpu_checks.gaussian(8192, 8192)
    found = clock.microseconds(
        {"copy": lambda: target.copy_(source), "product": lambda: square @ square}
    )
    copy, product = found["copy"], found["product"]
    assert copy and product, "a clock that measures"
    return 2 * source.nbytes / copy * 1e6, 2 * 8192**3 / product * 1e6
