"""Multiplies the identity by packed weights in the emulator, and counts the weights that differ.

    python tests/tools/ptx_weights.py

A product with the identity is the weight itself, so every weight that a tile decodes is compared
with what `dequantize` gives. Prints JSON; a process of its own, without TRITON_INTERPRET.
"""

import json

import torch
from ptx_launch import emulated

from minilora.kernels.gpu import matmul
from minilora.kernels.reference import nf4 as reference
from minilora.kernels.reference.nf4 import PackedWeight

SIDES = {"BM": 64, "BO": 64, "BI": 64, "warps": 4, "stages": 3}
TILE = {"path": "tile", **SIDES}

# direction, dtype, block size, quantization type, double quantization
CASES = (
    ("forward", torch.bfloat16, 64, "nf4", True),
    ("forward", torch.float16, 32, "fp4", False),
    ("backward", torch.bfloat16, 128, "nf4", True),
    ("backward", torch.float16, 64, "nf4", True),
)


def differing(
    direction: str, dtype: torch.dtype, block_size: int, quant_type: str, double: bool
) -> int:
    O, I = 40, 128
    dense = 0.1 * torch.randn(O, I, generator=torch.Generator().manual_seed(0))
    packed, absmax = reference.quantize(dense, block_size, quant_type)
    scales = reference.double_quantize(absmax) if double else (absmax, None, None)
    w = PackedWeight(packed, *scales, (O, I), block_size, quant_type)
    W = reference.dequantize(w, dtype)

    with emulated():
        if direction == "forward":
            found = matmul.forward(torch.eye(I).to(dtype), w, None, None, TILE).T
        else:
            found = matmul.backward(torch.eye(O).to(dtype), w, None, TILE)
    return int((found != W).sum())


if __name__ == "__main__":
    results = []
    for direction, dtype, block_size, quant_type, double in CASES:
        differ = differing(direction, dtype, block_size, quant_type, double)
        name = f"{direction} {dtype} {block_size} {quant_type}"
        results.append({"case": name, "differ": differ})
    print(json.dumps(results))
