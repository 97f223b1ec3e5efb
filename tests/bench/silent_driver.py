"""A driver for Triton that has no GPU: kernels are compiled for an H100, and not launched.

With it, everything that Triton does on the host for a launch can be run, timed and compared; only
the function at its end, written in C, is left out.
"""

from typing import Any, ClassVar

import triton
from triton.backends.compiler import GPUTarget


class Launcher:
    """Stands for the function that hands a compiled kernel to the card; each kernel has its own.

    Attributes:
        last: the launcher that was called last, and its arguments: the grid, the stream, what
            belongs to the compiled kernel, hooks, and the arguments of the kernel.
    """

    last: ClassVar[tuple[Any, tuple[Any, ...]]]

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        Launcher.last = self, args


class Utilities:
    """Stands for what loads machine code."""

    @staticmethod
    def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        """Returns handles of the module and the function, registers, spills and threads at most."""
        return hash(kernel), hash(kernel), 32, 0, 1024

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


class SilentDriver:
    launcher_cls = Launcher
    utils = Utilities

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def activate() -> None:
    """Makes it Triton's driver, for the rest of the process."""
    triton.runtime.driver.set_active(SilentDriver())
