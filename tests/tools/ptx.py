"""Inline PTX for Triton's interpreter: the arithmetic instructions of the emulator, on any arrays.

The other files named ptx_ are the emulator of whole kernels; ptx_machine.py is where to begin.
"""

from typing import Any

import numpy as np
from ptx_operands import arithmetic, move
from ptx_program import Body, parse_body


def run_ptx(text: str, outputs: int, inputs: list[Any]) -> list[Any]:
    """Runs `{ .reg ...; op to, from, ...; }` on uint32 arrays.

    $0, $1, ... are the outputs, then come the inputs.
    """
    body = parse_body(text)
    places = {f"${i}": 4 for i in range(outputs + len(inputs))}
    body = Body(body.instructions, body.labels, body.widths | places)
    given = [np.asarray(v, np.uint32) for v in inputs]
    registers = {f"${outputs + i}": np.atleast_1d(v) for i, v in enumerate(given)}

    with np.errstate(all="ignore"):
        for instruction in body.instructions:
            resolved = move if instruction.parts[0] == "mov" else arithmetic
            resolved(instruction, body)(registers)

    shape = np.broadcast_shapes(*(v.shape for v in given))
    found = [registers[f"${i}"] for i in range(outputs)]
    return [np.broadcast_to(v, shape or 1).reshape(shape) for v in found]
