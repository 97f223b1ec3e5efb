"""What the products move for 32 weights, counted by running their PTX for sm_80.

    python tests/tools/ptx_traffic.py              prints the table
    python tests/tools/ptx_traffic.py --record     writes traffic_budget.json: lower numbers only
    python tests/tools/ptx_traffic.py --json       prints the table as JSON, for the test

Shared wavefronts: how often the banks of shared memory are asked, at most once per clock and
multiprocessor. Global sectors: 32 bytes each, as the L1 cache is asked for them. It needs a process
of its own, without TRITON_INTERPRET.
"""

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from ptx_launch import Executed, emulated
from torch import Tensor

from minilora.kernels.gpu import choose, matmul, nf4
from minilora.kernels.reference import nf4 as reference
from minilora.kernels.reference.nf4 import PackedWeight

BUDGET = Path(__file__).with_name("traffic_budget.json")

# Large enough for every tile; the sums are long, so that a loop outweighs what surrounds it.
FORWARD, BACKWARD = (128, 1024), (1024, 128)
SKINNY_ROWS = (1, 9, 32, 64)

Row = dict[str, float]


def weight(shape: tuple[int, int]) -> PackedWeight:
    """Returns a random weight with double quantization."""
    generator = torch.Generator().manual_seed(0)
    packed, absmax = reference.quantize(torch.randn(shape, generator=generator), 64)
    return PackedWeight(packed, *reference.double_quantize(absmax), shape, 64)


def cases() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, call) of one product for every line of the tables of choices, and of dequantizing."""
    for direction, shape in (("forward", FORWARD), ("backward", BACKWARD)):
        w = weight(shape)
        for line in choose.lines(direction):
            if line["path"] == "tile":
                sides = "x".join(str(line[side]) for side in ("BM", "BO", "BI"))
                name = f"{direction} tile {sides}, {line['stages']} stages"
                yield name, _product(direction, line, line["BM"], w)
            elif line["path"] == "skinny":
                for M in SKINNY_ROWS:
                    if choose.takes(line, M, shape[1], w.block_size):
                        yield f"{direction} skinny M={M}", _product(direction, line, M, w)

    w = weight(FORWARD)
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        yield f"dequantize to {kind}", functools.partial(nf4.dequantize, w, dtype)


def _product(direction: str, line: dict[str, Any], M: int, w: PackedWeight) -> Callable[[], Tensor]:
    x = torch.ones(M, w.shape[1 if direction == "forward" else 0], dtype=torch.bfloat16)
    if direction == "forward":
        return lambda: matmul.forward(x, w, None, None, line)
    return lambda: matmul.backward(x, w, None, line)


def per_32_weights(launch: Executed) -> Row:
    """What a launch that decodes the weight once moves for 32 of its weights."""
    counts = launch.counts
    share = 32 / math.prod(FORWARD)
    wavefronts = sum(n for name, n in counts.items() if name.startswith("shared "))
    sectors = counts["global load sectors"] + counts["global store sectors"]
    instructions = sum(n for name, n in counts.items() if " " not in name)
    return {
        "shared wavefronts": round(share * wavefronts, 2),
        "global sectors": round(share * sectors, 2),
        "PTX instructions": round(share * instructions, 2),
    }


def table() -> dict[str, Row]:
    """Runs every case; the first launch of each is the one that decodes."""
    found = {}
    for name, call in cases():
        with emulated() as launches:
            call()
        found[name] = per_32_weights(launches[0])
    return found


def recorded() -> dict[str, dict[str, Row]]:
    budget: dict[str, dict[str, Row]] = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    return budget


def limits(found: dict[str, Row]) -> dict[str, Row]:
    """What the budget holds of a table; compile_gate.py counts the machine's instructions."""
    return {
        name: {what: n for what, n in row.items() if what != "PTX instructions"}
        for name, row in found.items()
    }


def lowered(found: dict[str, Row], held: dict[str, Row]) -> dict[str, Row]:
    """The new table with each number no higher than it was.

    One that may rise is changed by hand, where a reader of the change sees it.
    """
    return {
        name: {what: min(n, held.get(name, row).get(what, n)) for what, n in row.items()}
        for name, row in found.items()
    }


def main() -> None:
    found = table()
    if "--json" in sys.argv:
        print(json.dumps({"triton": triton.__version__, "table": found}))
    elif "--record" in sys.argv:
        budget = recorded()
        held = budget.get(triton.__version__, {})
        budget[triton.__version__] = lowered(limits(found), held)
        BUDGET.write_text(json.dumps(budget, indent=1) + "\n")
    else:
        columns = list(next(iter(found.values())))
        print(f"triton {triton.__version__}, sm_80, for 32 weights")
        print(f"{'':36}" + "".join(f"{column:>20}" for column in columns))
        for name, row in found.items():
            print(f"{name:36}" + "".join(f"{row[column]:20.2f}" for column in columns))


if __name__ == "__main__":
    main()
