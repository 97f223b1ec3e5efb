"""Instructions as functions: what each does to a CTA's registers and memory.

`resolve` looks at an instruction once and returns a function of the state. It returns None, or the
place to go on from.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import ptx_tensor_core as tensor_core
from ptx_arithmetic import unknown
from ptx_global import GlobalMemory
from ptx_operands import Registers, active, arithmetic, move, read_bits, write, write_bits
from ptx_program import Body, Instruction, address, vector
from ptx_shared import SharedMemory
from ptx_values import DTYPES, UNSIGNED, Array, decode, is_kind, size_of


class State(NamedTuple):
    """What a CTA has: registers and shared memory of its own, parameters and global memory."""

    registers: Registers
    parameters: dict[str, Array]
    memory: GlobalMemory
    shared: SharedMemory
    threads: int


Step = Callable[[State], int | None]

ALL = np.ones(1, np.bool_)


def of_all(bits: Array, threads: int) -> Array:
    """One element for each thread, of what may be one for all."""
    return bits if bits.size == threads else np.full(threads, bits)


# What memory instructions say about caches, which do not change what is read.
HINTS = {"nc", "cg", "ca", "cs", "lu", "cv", "wb", "wt", "volatile", "relaxed", "gpu", "weak"}


def resolve(instruction: Instruction, body: Body) -> Step:
    """Returns the function of an instruction.

    Raises:
        NotImplementedError: The emulator does not know the instruction.
    """
    if instruction.parts[0] in TABLE:
        return TABLE[instruction.parts[0]](instruction, body)

    compute = arithmetic(instruction, body)
    return lambda state: compute(state.registers)


@functools.lru_cache(maxsize=512)
def shared_grain(body: Body) -> int:
    """The width of the narrowest access to shared memory."""
    found = [16]
    for instruction in body.instructions:
        if instruction.parts[:2] in (("ld", "shared"), ("st", "shared")):
            width, _ = _vector_of(instruction)
            found.append(width * size_of(instruction.parts[-1]))
        elif instruction.parts[3:5] == ("shared", "global"):
            found.append(int(instruction.operands[2], 0))
    return min(found)


def _move(instruction: Instruction, body: Body) -> Step:
    step = move(instruction, body)
    return lambda state: step(state.registers)


def _branch(instruction: Instruction, body: Body) -> Step:
    target = body.labels[instruction.operands[-1]]
    acting = active(instruction.guard)

    def step(state: State) -> int | None:
        threads = acting(state.registers)
        if threads is None or threads.all():
            return target
        if threads.any():
            raise RuntimeError("divergent branch")
        return None

    return step


def _return(instruction: Instruction, body: Body) -> Step:
    end = len(body.instructions)
    acting = active(instruction.guard)

    def step(state: State) -> int | None:
        threads = acting(state.registers)
        if threads is None or threads.all():
            return end
        if threads.any():
            raise RuntimeError("some of the threads return")
        return None

    return step


def _barrier(instruction: Instruction, body: Body) -> Step:
    if instruction.name == "bar.warp.sync":
        return lambda state: None
    if instruction.name not in ("bar.sync", "barrier.sync.aligned") or instruction.guard:
        raise unknown(instruction.name)
    if instruction.operands != ("0",):
        raise NotImplementedError(f"{instruction.text}: a barrier of some of the warps")
    return lambda state: state.shared.barrier()


def _vector_of(instruction: Instruction) -> tuple[int, list[str]]:
    """The number of registers of a load or store, and the parts of its name that are left."""
    count, left = 1, []
    for part in instruction.parts[2:-1]:
        if part in ("v2", "v4"):
            count = int(part[1])
        elif part not in HINTS and not part.startswith(("L1::", "L2::")):
            left.append(part)
    return count, left


def _address(operand: str, body: Body) -> Callable[[State], Array]:
    """Reads an address: uint64, one for each thread."""
    base, offset = address(operand)
    get = read_bits(base, "u64" if body.is_register(base) else "u32", body)
    added = np.uint64(offset % 2**64)

    def read(state: State) -> Array:
        found = get(state.registers).astype(np.uint64) + added
        return of_all(found, state.threads)

    return read


def _acting(instruction: Instruction) -> Callable[[State], Array]:
    """The threads in which an instruction acts, one bool for each."""
    acting = active(instruction.guard)

    def read(state: State) -> Array:
        threads = acting(state.registers)
        return of_all(ALL if threads is None else threads, state.threads)

    return read


def _check_access(instruction: Instruction) -> tuple[int, str]:
    """Returns the number of registers and the kind of a load or store of the known spaces."""
    count, left = _vector_of(instruction)
    kind = instruction.parts[-1]
    if left or instruction.parts[1] not in ("global", "shared") or kind not in DTYPES:
        raise unknown(instruction.name)
    return count, kind


def _load(instruction: Instruction, body: Body) -> Step:
    if instruction.parts[1] == "param":
        return _load_parameter(instruction, body)

    count, kind = _check_access(instruction)
    size, is_global = size_of(kind), instruction.parts[1] == "global"
    where, acting = _address(instruction.operands[1], body), _acting(instruction)
    puts = [write(r, kind, instruction.guard, body) for r in vector(instruction.operands[0])]

    def step(state: State) -> None:
        memory = state.memory if is_global else state.shared
        found = memory.load(where(state), count * size, acting(state))
        numbers = found.view(DTYPES[kind])
        for i, put in enumerate(puts):
            put(state.registers, np.ascontiguousarray(numbers[:, i]))

    return step


def _load_parameter(instruction: Instruction, body: Body) -> Step:
    to, source = instruction.operands
    name, offset = address(source)
    if offset:
        raise NotImplementedError(f"{instruction.text}: a part of a parameter")
    put = write_bits(to, instruction.guard, body)
    return lambda state: put(state.registers, state.parameters[name])


def _store(instruction: Instruction, body: Body) -> Step:
    count, kind = _check_access(instruction)
    size, is_global = size_of(kind), instruction.parts[1] == "global"
    where, acting = _address(instruction.operands[0], body), _acting(instruction)
    bits = f"b{8 * size}"
    reads = [read_bits(r, bits, body) for r in vector(instruction.operands[1])]
    assert len(reads) == count

    def step(state: State) -> None:
        memory = state.memory if is_global else state.shared
        values = np.empty((state.threads, count), UNSIGNED[size])
        for i, get in enumerate(reads):
            values[:, i] = get(state.registers)
        memory.store(where(state), values.view(np.uint8), acting(state))

    return step


def _copy(instruction: Instruction, body: Body) -> Step:
    """cp.async, from global to shared memory."""
    what = ".".join(instruction.parts[1:3])
    if what == "async.commit_group":
        return lambda state: state.shared.commit()
    if what == "async.wait_group":
        newest = int(instruction.operands[0])
        return lambda state: state.shared.wait(newest)
    if what == "async.wait_all":
        return lambda state: state.shared.wait_all()
    if instruction.parts[3:5] != ("shared", "global"):
        raise unknown(instruction.name)

    to, source, width, *read_bytes = instruction.operands
    size = int(width, 0)
    where, whence, acting = _address(to, body), _address(source, body), _acting(instruction)
    count = read_bits(read_bytes[0] if read_bytes else width, "u32", body)

    def step(state: State) -> None:
        # Bytes that are not read are zero. The kernels read all or none.
        present = of_all(count(state.registers), state.threads)
        if not ((present == 0) | (present == size)).all():
            raise NotImplementedError(f"{instruction.text}: a part of the bytes")
        threads = acting(state)
        values = state.memory.load(whence(state), size, threads & (present > 0))
        state.shared.copy(where(state), values, threads)

    return step


def _check_matrix(instruction: Instruction) -> None:
    known = {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "b16"}
    if not set(instruction.parts[1:]) <= known or instruction.guard:
        raise unknown(instruction.name)


def _load_matrix(instruction: Instruction, body: Body) -> Step:
    _check_matrix(instruction)
    registers = vector(instruction.operands[0])
    where = _address(instruction.operands[1], body)
    puts = [write_bits(register, None, body) for register in registers]
    transposed = "trans" in instruction.parts

    def step(state: State) -> None:
        addresses = where(state)
        for i, put in enumerate(puts):
            rows = state.shared.load(addresses, 16, tensor_core.gives_row(state.threads, i))
            put(state.registers, tensor_core.distribute(rows, i, transposed))

    return step


def _store_matrix(instruction: Instruction, body: Body) -> Step:
    _check_matrix(instruction)
    where = _address(instruction.operands[0], body)
    reads = [read_bits(r, "b32", body) for r in vector(instruction.operands[1])]
    transposed = "trans" in instruction.parts

    def step(state: State) -> None:
        addresses = where(state)
        for i, get in enumerate(reads):
            registers = of_all(get(state.registers), state.threads)
            rows = tensor_core.collect(registers, i, transposed)
            state.shared.store(addresses, rows, tensor_core.gives_row(state.threads, i))

    return step


MMA = {
    f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32": kind
    for depth in (8, 16)
    for kind in ("f16", "bf16")
}


def _multiply(instruction: Instruction, body: Body) -> Step:
    if instruction.name not in MMA or instruction.guard:
        raise unknown(instruction.name)
    kind = MMA[instruction.name]
    to, *sources = (vector(operand) for operand in instruction.operands)
    puts = [write_bits(register, None, body) for register in to]
    reads = [[read_bits(r, "b32", body) for r in registers] for registers in sources]

    def step(state: State) -> None:
        def values(gets: list[Callable[[Registers], Array]]) -> list[Array]:
            return [of_all(get(state.registers), state.threads) for get in gets]

        a, b, c = map(values, reads)
        for put, result in zip(puts, tensor_core.mma(a, b, c, kind), strict=True):
            put(state.registers, result)

    return step


def _shuffle(instruction: Instruction, body: Body) -> Step:
    if instruction.parts[1] != "sync" or instruction.parts[-1] != "b32" or instruction.guard:
        raise unknown(instruction.name)
    to, *sources = instruction.operands
    if "|" in to or sources[3] not in ("-1", "0xffffffff", "0xFFFFFFFF"):
        raise NotImplementedError(f"{instruction.text}: of some of the lanes")
    reads = [read_bits(source, "u32", body) for source in sources[:3]]
    put = write_bits(to, None, body)
    mode = instruction.parts[2]

    def step(state: State) -> None:
        found = [of_all(get(state.registers), state.threads) for get in reads]
        value, by, clamp = found
        put(state.registers, tensor_core.shuffle(value, mode, by, clamp.astype(np.int64)))

    return step


def _reduce(instruction: Instruction, body: Body) -> Step:
    _, sync, operation, kind = instruction.parts
    if sync != "sync" or operation not in tensor_core.REDUCTIONS or not is_kind(kind):
        raise unknown(instruction.name)
    to, source, mask = instruction.operands
    if mask not in ("-1", "0xffffffff", "0xFFFFFFFF"):
        raise NotImplementedError(f"{instruction.text}: of some of the lanes")
    get = read_bits(source, kind, body)
    put = write(to, kind, instruction.guard, body)

    def step(state: State) -> None:
        values = of_all(decode(get(state.registers), kind), state.threads)
        put(state.registers, tensor_core.reduce(values, operation))

    return step


def _cache_policy(instruction: Instruction, body: Body) -> Step:
    """createpolicy: a number that only cache hints take."""
    put = write_bits(instruction.operands[0], instruction.guard, body)
    return lambda state: put(state.registers, np.zeros(1, np.uint64))


TABLE: dict[str, Callable[[Instruction, Body], Step]] = {
    "mov": _move,
    "bra": _branch,
    "ret": _return,
    "exit": _return,
    "bar": _barrier,
    "barrier": _barrier,
    "ld": _load,
    "st": _store,
    "cp": _copy,
    "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix,
    "mma": _multiply,
    "shfl": _shuffle,
    "redux": _reduce,
    "createpolicy": _cache_policy,
}
