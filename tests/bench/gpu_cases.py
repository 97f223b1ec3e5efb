"""What is compared on a GPU: minilora, bitsandbytes, dequantize + cuBLAS, and cuBLAS alone."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from gpu_checks import R, bitsandbytes, gaussian
from gpu_clock import Sides

import minilora
from minilora import ops

# (out, in): a 7B Llama's attention and MLP.
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))

OTHERS = "bitsandbytes", "dequantize + cuBLAS", "cuBLAS"

# A case: its name, the bytes that must move, the operations, and the sides.
Case = tuple[str, int, int, Sides]


def cases(O: int, I: int, rows: tuple[int, ...]) -> Iterator[Case]:
    """Everything that is compared for one weight."""
    bnb = bitsandbytes()
    dense = gaussian(O, I)
    w = minilora.quantize_nf4(dense)

    sides: Sides = {"minilora": lambda: ops.quantize(dense, 64)}
    if bnb:
        sides["bitsandbytes"] = lambda: bnb.functional.quantize_4bit(
            dense, blocksize=64, quant_type="nf4"
        )
    yield "quantize", dense.nbytes + w.packed.nbytes + 4 * w.absmax.numel(), 0, sides

    q = state = None
    sides = {"minilora": lambda: w.dequantize()}
    if bnb:
        q, state = bnb.functional.quantize_4bit(
            dense, blocksize=64, quant_type="nf4", compress_statistics=True
        )
        sides["bitsandbytes"] = lambda: bnb.functional.dequantize_4bit(q, state)
    yield "dequantize, double", dense.nbytes + w.nbytes, 0, sides

    for M in rows:
        yield from products(M, dense, w, (bnb, q, state))


def products(
    M: int, dense: torch.Tensor, w: minilora.NF4Weight, theirs: tuple[Any, Any, Any]
) -> Iterator[Case]:
    """The products of M rows. `theirs`: bitsandbytes with its weight, or None thrice."""
    bnb, q, state = theirs
    O, I = w.shape
    x, dy = gaussian(M, I), gaussian(M, O)
    A, B = gaussian(R, I), gaussian(O, R)
    z = x @ A.T
    moved, work = w.nbytes + x.nbytes + dy.nbytes, 2 * M * O * I

    sides: Sides = {
        "minilora": lambda: minilora.nf4_linear(x, w),
        "cuBLAS": lambda: F.linear(x, dense),
        "dequantize + cuBLAS": lambda: F.linear(x, w.dequantize()),
    }
    if bnb:
        sides["bitsandbytes"] = lambda: bnb.matmul_4bit(x, q.t(), quant_state=state)
    yield f"forward, M={M}", moved, work, sides

    sides = {
        "minilora": lambda: ops.nf4_linear_backward(dy, w),
        "cuBLAS": lambda: dy @ dense,
        "dequantize + cuBLAS": lambda: dy @ w.dequantize(),
    }
    if bnb:
        sides["bitsandbytes"] = lambda: dy @ bnb.functional.dequantize_4bit(q, state)
    yield f"backward, M={M}", moved, work, sides

    def after(y: torch.Tensor) -> torch.Tensor:
        return y.addmm_(z, B.T, alpha=2.0)

    sides = {
        "minilora": lambda: ops.nf4_lora_linear(x, w, None, z, B, 2.0),
        "cuBLAS": lambda: after(F.linear(x, dense)),
        "dequantize + cuBLAS": lambda: after(F.linear(x, w.dequantize())),
    }
    yield f"forward + LoRA, M={M}", moved + z.nbytes + B.nbytes, work + 2 * M * O * R, sides
