"""An emulator of the few PTX instructions that the kernels use, on numpy arrays."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np


def prmt(a: Any, b: Any, selector: Any) -> Any:
    """Picks four bytes of b:a.

    Byte i of the result is byte (nibble i of the selector) & 7 of b:a, or its sign bit eight times
    where the nibble has bit 3.
    """
    a, b, selector = (np.asarray(v, np.uint32) for v in (a, b, selector))
    eight = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)

    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        shift = (nibble & np.uint32(7)) * np.uint32(8)
        byte = (eight >> shift.astype(np.uint64) & np.uint64(255)).astype(np.uint32)

        sign = (byte >> np.uint32(7)) * np.uint32(255)
        byte = np.where(nibble & np.uint32(8), sign, byte)
        result |= byte << np.uint32(8 * i)

    return result


INSTRUCTIONS: dict[str, Callable[..., Any]] = {
    "prmt.b32": prmt,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "shr.u32": np.right_shift,
}


def run_ptx(text: str, outputs: int, inputs: list[Any]) -> list[Any]:
    """Runs `{ .reg ...; op to, from, ...; }` on uint32 arrays.

    $0, $1, ... are the outputs, then come the inputs.
    """
    registers = {f"${outputs + i}": np.asarray(v, np.uint32) for i, v in enumerate(inputs)}

    def value(name: str) -> Any:
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for statement in re.sub(r"[{}]", " ", text).split(";"):
        words = statement.split(None, 1)
        if not words or words[0] == ".reg":
            continue

        operation = words[0]
        to, *operands = (operand.strip() for operand in words[1].split(","))
        if operation not in INSTRUCTIONS:
            known = ", ".join(INSTRUCTIONS)
            raise NotImplementedError(f"PTX {operation}: the emulator knows {known}")
        registers[to] = INSTRUCTIONS[operation](*map(value, operands))

    return [registers[f"${i}"] for i in range(outputs)]
