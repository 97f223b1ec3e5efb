"""Operands of an instruction, resolved once: how to read its sources and write its result.

Registers live in a dict from name to bits, see ptx_values. An instruction becomes a `Step`, a
function of the state that it changes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from ptx_arithmetic import signature
from ptx_program import Body, Guard, Instruction, vector
from ptx_values import UNSIGNED, Array, decode, encode, immediate, resize, size_of

Registers = dict[str, Array]
Read = Callable[[Registers], Array]
Write = Callable[[Registers, Array], None]

# Where a register is written for the first time by some of the threads, the others hold this.
NEVER_WRITTEN = 0xCDCDCDCDCDCDCDCD

# The address of shared memory, and what cannot be read here.
SYMBOLS = {"global_smem": 0}


def active(guard: Guard | None) -> Callable[[Registers], Array | None]:
    """The threads in which an instruction acts: a function of the registers; None is all."""
    if guard is None:
        return lambda registers: None

    name = guard.register
    if guard.negated:
        return lambda registers: ~registers[name]
    return lambda registers: registers[name]


def read_bits(operand: str, kind: str, body: Body) -> Read:
    """Reads an operand as bits of a kind."""
    size = size_of(kind)
    if operand.startswith("%") or body.is_register(operand):

        def read(registers: Registers) -> Array:
            bits = registers[operand]
            return bits if bits.dtype == np.bool_ else resize(bits, size)

        return read

    text = str(SYMBOLS[operand]) if operand in SYMBOLS else operand
    constant = immediate(text, kind)
    return lambda registers: constant


def read(operand: str, kind: str, body: Body) -> Read:
    """Reads an operand as numbers of a kind."""
    bits = read_bits(operand, kind, body)
    if operand.startswith("%") or body.is_register(operand):
        return lambda registers: decode(bits(registers), kind)

    constant = decode(bits({}), kind)
    return lambda registers: constant


def write_bits(register: str, guard: Guard | None, body: Body) -> Write:
    """Writes bits, in the threads in which the instruction acts, to a register of any width."""
    width = body.width(register)
    acting = active(guard)

    def write(registers: Registers, bits: Array) -> None:
        if width:
            bits = resize(bits, width)
        threads = acting(registers)
        if threads is not None and not threads.all():
            old = registers.get(register, _never_written(bits))
            bits = np.where(threads, bits, old)
        registers[register] = bits

    return write


def _never_written(like: Array) -> Array:
    if like.dtype == np.bool_:
        return np.zeros(1, np.bool_)
    return np.array([NEVER_WRITTEN], np.uint64).astype(like.dtype)


def write(register: str, kind: str, guard: Guard | None, body: Body) -> Write:
    """Writes numbers of a kind to a register."""
    size = body.width(register)
    bits = write_bits(register, guard, body)
    return lambda registers, numbers: bits(registers, encode(numbers, kind, size))


def arithmetic(instruction: Instruction, body: Body) -> Callable[[Registers], None]:
    """Resolves an instruction of the table in ptx_arithmetic."""
    found = signature(instruction.name)
    to, *sources = instruction.operands
    kinds = found.sources
    if instruction.parts[0] in ("min", "max") and len(sources) == 3:
        kinds = (found.result,) * 3
    if len(sources) != len(kinds):
        raise NotImplementedError(f"{instruction.text}: {len(sources)} sources")

    pairs = zip(sources, kinds, strict=True)
    reads = [read(source, kind, body) for source, kind in pairs]
    put = write(to, found.result, instruction.guard, body)
    compute = found.compute

    def step(registers: Registers) -> None:
        put(registers, compute(*[get(registers) for get in reads]))

    return step


def move(instruction: Instruction, body: Body) -> Callable[[Registers], None]:
    """mov: also of several registers into one, `mov.b32 %r1, {%rs1, %rs2}`, and apart again."""
    to, source = instruction.operands
    kind = instruction.parts[-1]
    if source.startswith("{"):
        return _join(instruction, body)
    if to.startswith("{"):
        return _split(instruction, body)

    get = read_bits(source, kind, body)
    put = write_bits(to, instruction.guard, body)
    return lambda registers: put(registers, get(registers))


def _join(instruction: Instruction, body: Body) -> Callable[[Registers], None]:
    to, source = instruction.operands
    parts = vector(source)
    size = size_of(instruction.parts[-1])
    kind = f"b{8 * size // len(parts)}"
    reads = [_read_or_never_written(part, kind, body) for part in parts]
    put = write_bits(to, instruction.guard, body)
    joined = UNSIGNED[size]

    def step(registers: Registers) -> None:
        found = np.broadcast_arrays(*[get(registers) for get in reads])
        put(registers, np.stack(found, -1).view(joined)[..., 0])

    return step


def _read_or_never_written(part: str, kind: str, body: Body) -> Read:
    """Reads a register of a pair, which the compiler leaves unwritten if only the other is used."""
    get = read_bits(part, kind, body)
    never = _never_written(np.zeros(1, UNSIGNED[size_of(kind)]))
    return lambda registers: (
        never if body.is_register(part) and part not in registers else get(registers)
    )


def _split(instruction: Instruction, body: Body) -> Callable[[Registers], None]:
    to, source = instruction.operands
    kind = instruction.parts[-1]
    parts = vector(to)
    get = read_bits(source, kind, body)
    part_type: Any = UNSIGNED[size_of(kind) // len(parts)]
    puts = [None if p == "_" else write_bits(p, instruction.guard, body) for p in parts]

    def step(registers: Registers) -> None:
        found = np.ascontiguousarray(get(registers))
        pieces = found.view(part_type).reshape(*found.shape, len(parts))
        for i, put in enumerate(puts):
            if put:
                put(registers, np.ascontiguousarray(pieces[..., i]))

    return step
