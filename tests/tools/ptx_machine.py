"""An emulator of the PTX that Triton makes for sm_80: a kernel runs on numpy, CTA by CTA.

All threads of a CTA go in lockstep, a register being an array with one element per thread. The
memory is that of CPU tensors, at their real addresses. What a GPU answers with a wrong result, an
error somewhere else or nothing at all is found here (ptx_global.py, ptx_shared.py) and raised as a
`KernelError` that names the instruction and the CTA. Branches must go the same way for all threads
of a CTA: the kernels have no other.

    program = parse(ptx)
    machine = Machine(program, arguments, tensors, shared=k.metadata.shared)
    machine.run(grid)
    machine.counts         # warp instructions by name, sectors, wavefronts

A program is resolved once into a list of functions, which all its CTAs and launches share.
"""

import collections
import functools
import itertools
from typing import Any

import numpy as np
from ptx_global import GlobalMemory
from ptx_operands import Registers
from ptx_program import Program
from ptx_shared import SharedMemory
from ptx_steps import State, Step, resolve, shared_grain
from ptx_values import DTYPES, UNSIGNED, Array, size_of
from torch import Tensor

WARP = 32

# Instructions in one CTA, after which a loop is taken for endless.
MOST_STEPS = 2_000_000


class KernelError(RuntimeError):
    """What a kernel does wrong; the message names the instruction and the CTA."""


@functools.lru_cache(maxsize=512)
def steps_of(program: Program) -> tuple[Step, ...]:
    """The functions of a program's instructions."""
    return tuple(resolve(instruction, program.body) for instruction in program.body.instructions)


class Machine:
    """One launch of a kernel.

    arguments: the values of the kernel's parameters in order, a pointer as its address; those that
        the compiler adds behind them are null pointers
    tensors: what the kernel may access
    shared: bytes of shared memory in a CTA
    """

    def __init__(
        self, program: Program, arguments: list[int | float], tensors: list[Tensor], shared: int
    ) -> None:
        self.program, self.shared = program, shared
        self.steps = steps_of(program)
        self.memory = GlobalMemory(tensors)
        self.parameters = _parameters(program, arguments)
        self.counts: collections.Counter[str] = collections.Counter()

    def run(self, grid: tuple[int, ...]) -> None:
        """Runs every CTA of a grid.

        Raises:
            KernelError: What a kernel does wrong.
            NotImplementedError: It has an instruction that the emulator does not know.
        """
        sizes = (*grid, 1, 1)[:3]
        with np.errstate(all="ignore"):
            for z, y, x in itertools.product(*(range(size) for size in reversed(sizes))):
                self._cta((x, y, z), sizes)
        self.counts += self.memory.counts

    def _cta(self, cta: tuple[int, int, int], grid: tuple[int, ...]) -> None:
        threads = self.program.threads
        shared = SharedMemory(self.shared, shared_grain(self.program.body))
        registers = self._special_registers(cta, grid)
        state = State(registers, self.parameters, self.memory, shared, threads)
        executed = [0] * len(self.steps)

        place = steps = 0
        try:
            while place < len(self.steps):
                executed[place] += 1
                target = self.steps[place](state)
                place = place + 1 if target is None else target
                steps += 1
                if steps > MOST_STEPS:
                    raise RuntimeError("endless loop")
        except (MemoryError, RuntimeError, KeyError) as error:
            if isinstance(error, NotImplementedError):
                raise
            text = self.program.body.instructions[place].text
            reason = str(error)
            if isinstance(error, KeyError):
                reason = f"{reason} is read before it is written"
            raise KernelError(f"{reason}: {text} (CTA {cta}, {self.program.name})") from error

        for instruction, times in zip(self.program.body.instructions, executed, strict=True):
            self.counts[instruction.name] += times * threads // WARP
        self.counts += shared.counts

    def _special_registers(self, cta: tuple[int, ...], grid: tuple[int, ...]) -> Registers:
        threads = np.arange(self.program.threads, dtype=np.uint32)
        found: dict[str, Any] = {"%tid.x": threads, "%laneid": threads % WARP}
        single = {"%ntid.x": self.program.threads, "%tid.y": 0, "%tid.z": 0}
        for axis, place, size in zip("xyz", cta, grid, strict=True):
            single |= {f"%ctaid.{axis}": place, f"%nctaid.{axis}": size}
        return found | {name: np.array([n], np.uint32) for name, n in single.items()}


def _parameters(program: Program, arguments: list[int | float]) -> dict[str, Array]:
    """The bits of each parameter."""
    missing = len(program.parameters) - len(arguments)
    if not 0 <= missing <= 2:
        raise ValueError(
            f"{program.name} has {len(program.parameters)} parameters, given are {len(arguments)}"
        )
    found = {}
    pairs = zip(program.parameters.items(), [*arguments, 0, 0], strict=False)
    for (name, kind), value in pairs:
        if kind.startswith("f") or isinstance(value, float):
            dtype: Any = DTYPES[kind] if kind.startswith("f") else np.float32
            found[name] = np.array([value], dtype).view(UNSIGNED[size_of(kind)])
        else:
            found[name] = np.array([value % 2 ** (8 * size_of(kind))], UNSIGNED[size_of(kind)])
    return found
