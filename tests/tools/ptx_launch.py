"""Runs the library's own launches in the emulator: the PTX of a GPU that is not here.

    with emulated() as launches:
        y = matmul.forward(x, weight, bias, low)       # CPU tensors
    launches[-1].counts

`runtime.start` is replaced: a launch is compiled as the JIT would specialize it, for sm_80, and its
PTX runs on the tensors that it was given. It needs a process of its own, without TRITON_INTERPRET.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import compile_gate
import torch
from allocating import allocating_with, torch_empty
from ptx_machine import Machine
from ptx_program import parse
from torch import Tensor

from minilora.kernels.gpu import runtime

# Whose PTX runs where nothing else is said.
TARGET = "sm_80"

Change = Callable[[str], str]


class Executed(NamedTuple):
    """A launch that has run: the kernel's name, its grid and what was counted."""

    kernel: str
    grid: tuple[int, ...]
    counts: collections.Counter[str]


class Compiled(NamedTuple):
    """PTX, the bytes of shared memory it needs, and the launch's parameters that are constants."""

    ptx: str
    shared: int


_compiled: dict[Any, Compiled] = {}


def compiled(kernel: Any, args: tuple[Any, ...], settings: dict[str, Any], target: str) -> Compiled:
    """The PTX of a launch, compiled once for each specialization."""
    places = [(path, _specialization(value)) for path, value in compile_gate.leaves(args)]
    key = kernel.__name__, tuple(places), tuple(settings.items()), target
    if key not in _compiled:
        launch = compile_gate.Launch("", kernel, args, settings)
        k, _, _ = compile_gate.compiled(launch, target)
        _compiled[key] = Compiled(k.asm["ptx"], k.metadata.shared)
    return _compiled[key]


def _specialization(value: Any) -> Any:
    """What the compiler may know of an argument."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and value != 1:
        return "int", value % 16 == 0, -(2**31) <= value < 2**31
    return "float" if isinstance(value, float) else value


def arguments(
    kernel: Any, args: tuple[Any, ...], settings: dict[str, Any]
) -> tuple[list[int | float], list[Tensor]]:
    """The parameters that the compiled kernel has, and the tensors among them.

    Constants are none: constexpr parameters, None and 1.
    """
    names = kernel.arg_names
    given = dict(zip(names, args, strict=False)) | {k: v for k, v in settings.items() if k in names}
    constants = {names[i] for i in kernel.constexprs}

    values: list[int | float] = []
    tensors: list[Tensor] = []
    for name in names:
        if name in constants:
            continue
        for _, value in compile_gate.leaves(given[name]):
            if isinstance(value, Tensor):
                values.append(value.data_ptr())
                tensors.append(value)
            elif value is not None and not (isinstance(value, int) and value == 1):
                values.append(value)
    return values, tensors


@contextlib.contextmanager
def emulated(target: str = "", change: Change | None = None) -> Iterator[list[Executed]]:
    """Inside, kernels run in the emulator; yields the list of what has run.

    target: one of compile_gate's, of a generation with the instructions of sm_80: not sm_90
    change: a function of the PTX, to plant a fault
    """
    executed: list[Executed] = []

    def start(
        kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], settings: dict[str, Any]
    ) -> None:
        if 0 in grid:
            return
        found = compiled(kernel, args, settings, target or TARGET)
        program = parse(change(found.ptx) if change else found.ptx)
        machine = Machine(program, *arguments(kernel, args, settings), shared=found.shared)
        machine.run(grid)
        executed.append(Executed(kernel.__name__, grid, machine.counts))

    before = runtime.start, runtime.INTERPRETED
    runtime.start, runtime.INTERPRETED = start, True
    try:
        with allocating_with(_filled):
            yield executed
    finally:
        runtime.start, runtime.INTERPRETED = before


def _filled(*size: Any, **kinds: Any) -> Tensor:
    """As torch.empty, filled with 0xFF: what a kernel leaves out is NaN."""
    t = torch_empty(*size, **kinds)
    t.view(-1).view(torch.uint8).fill_(0xFF)
    return t
