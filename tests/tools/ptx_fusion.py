"""Runs what promises the reference's weights on an absmax that only a fused multiply-add sees.

    python tests/tools/ptx_fusion.py               prints a result as JSON

The weights are those of `cancelling_weight`: each must decode to 0, and every product with it is 0.
So it is for two roundings; with `enable_fp_fusion`, which no launch here has, it is not. Both are
run, and the numbers are counted that are not 0. The skinny product is left out: it promises an
error bound and no bits, and fuses on purpose.

It needs a process of its own, without TRITON_INTERPRET.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from cancelling import cancelling_weight
from ptx_launch import emulated
from torch import Tensor

from minilora.kernels.gpu import matmul, nf4, runtime
from minilora.kernels.gpu.runtime import LowRank
from minilora.kernels.reference.nf4 import PackedWeight

HALVES = (torch.bfloat16, torch.float16)
SIDES = {"BM": 64, "BO": 64, "BI": 64, "warps": 4, "stages": 3}
TILE, DENSE = {"path": "tile", **SIDES}, {"path": "dense"}

# Statements that the assembler may fuse, as those with `.rn` may not be; and fused ones.
FUSIBLE = re.compile(r"\b(?:(?:mul|add|sub)\.(?:ftz\.)?f32|fma\.\w+\.f32)\b")

Case = tuple[str, Callable[[], Tensor]]


def cases() -> Iterator[Case]:
    """(name, call) of everything that decodes a weight bit for bit."""
    w = cancelling_weight((40, 128))
    codes, absmax2, offset = w.absmax, w.absmax2, w.offset
    assert absmax2 is not None and offset is not None
    yield "double_dequantize", lambda: nf4.double_dequantize(codes, absmax2, offset)

    for dtype in (torch.float32, *HALVES):
        yield f"dequantize {dtype}", lambda dtype=dtype: nf4.dequantize(w, dtype)
    odd = cancelling_weight((33, 7), block_size=32, quant_type="fp4", code=90)
    yield "dequantize 33 x 7", lambda: nf4.dequantize(odd, torch.bfloat16)

    # A tile's row has one block, or two.
    narrow = cancelling_weight((40, 128), block_size=32, quant_type="fp4", code=20)
    for direction in ("forward", "backward"):
        yield product(direction, TILE, w, torch.bfloat16)
        yield product(direction, TILE, narrow, torch.float16)

    # With a term, W is decoded with a gap behind each row.
    wide = cancelling_weight((136, 128), code=5)
    yield product("forward", DENSE, wide, torch.bfloat16, rank=4)
    yield product("backward", DENSE, w, torch.bfloat16)


def product(
    direction: str, line: dict[str, Any], w: PackedWeight, dtype: torch.dtype, rank: int = 0
) -> Case:
    """The product with three rows of random numbers, and with a low-rank term of 0."""
    (O, I), forward = w.shape, direction == "forward"
    x = torch.randn(3, I if forward else O, generator=torch.Generator().manual_seed(0)).to(dtype)
    low = LowRank(x.new_zeros(3, rank), x.new_ones(O if forward else I, rank), 1.0)

    def call() -> Tensor:
        term = low if rank else None
        if forward:
            return matmul.forward(x, w, None, term, line)
        return matmul.backward(x, w, term, line)

    return f"{direction} {line['path']} blocks of {w.block_size} {dtype}", call


@contextlib.contextmanager
def fused() -> Iterator[None]:
    """Inside, launches in the emulator have multiply-adds fused."""
    start = runtime.start

    def start_fused(kernel: Any, grid: Any, args: Any, settings: dict[str, Any]) -> None:
        start(kernel, grid, args, settings | {"enable_fp_fusion": True})

    with mock.patch.object(runtime, "start", start_fused):
        yield


def examine(name: str, call: Callable[[], Tensor]) -> dict[str, Any]:
    """Runs a call as it is, then fused, and counts what is not 0."""
    fusible: list[str] = []

    def look(ptx: str) -> str:
        fusible.extend(FUSIBLE.findall(ptx))
        return ptx

    with emulated(change=look) as launches:
        y = call()
    with emulated(), fused():
        y_fused = call()
    return {
        "case": name.replace("torch.", ""),
        "kernels": [launch.kernel for launch in launches],
        "fusible": fusible,
        "not 0": int((y != 0).sum()),
        "not 0 if fused": int((y_fused != 0).sum()),
        "of": y.numel(),
    }


if __name__ == "__main__":
    rows = [examine(name, call) for name, call in cases()]
    print(json.dumps({"triton": triton.__version__, "rows": rows}))
