r"""Random products and conversions through executed PTX, against the reference in float64.

    python tests/tools/ptx_products.py --seed 0 --count 40        prints a result as JSON

Conversions must be what the reference gives, bit for bit. Of a product the error is bounded a
priori. With u the unit roundoff of x's dtype, each of its roundings (the weight's, the result's,
and on the dense path one between) is at most u of the sum of absolute values, and so is each
addition in float32 with 2^-24:

    |y - exact| <= (p u / (1 - p u) + n 2^-24) (|x| |W|^T + |s left| |right|^T + |bias|) + tiny

p roundings, n terms of a sum. It needs a process of its own, without TRITON_INTERPRET.
"""

import argparse
import collections
import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import ptx_launch
import torch
import triton
from ptx_launch import emulated
from torch import Tensor

from minilora.kernels.gpu import choose, dropout, matmul, nf4, skinny
from minilora.kernels.gpu.runtime import LowRank
from minilora.kernels.reference import dropout as reference_dropout
from minilora.kernels.reference import nf4 as reference
from minilora.kernels.reference.nf4 import PackedWeight

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALVES = DTYPES[:2]
OUT = (1, 17, 64, 65, 96, 130, 200)
INNER = (64, 128, 192, 256, 512)
RANKS = (0, 1, 5, 16, 20, 70)


class Source:
    """Random choices and tensors, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.choices = random.Random(seed)
        self.tensors = torch.Generator().manual_seed(seed)

    def pick(self, *values: Any) -> Any:
        return self.choices.choice(values)

    def gauss(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.tensors)

    def sparse(self, size: tuple[int, ...]) -> Tensor:
        """Returns zeros and ones, about one in 16: a product of few terms has a small bound."""
        return (torch.rand(size, generator=self.tensors) < 1 / 16).float()

    def place(self, t: Tensor, step: int = 1) -> Tensor:
        """Returns t, or the same values at an address that is a few elements further."""
        shift = step * self.pick(0, 0, 1, 3)
        return torch.cat([t.new_zeros(shift), t.flatten()])[shift:].view(t.shape)

    def rows(self, x: Tensor) -> Tensor:
        """Returns the matrix x in one of the layouts that the kernels are given."""
        layouts = "whole", "whole", "shifted", "odd stride", "even stride", "repeated"
        layout = self.pick(*layouts)
        if layout == "shifted":
            return self.place(x)
        if layout == "whole":
            return x
        if layout == "repeated":
            return x[:1].expand(x.shape)
        gap = x.new_zeros(x.shape[0], 3 if layout == "odd stride" else 8)
        return torch.cat([x, gap], 1)[:, : x.shape[1]]

    def weight(self, O: int, I: int, block_size: int, step: int) -> PackedWeight:
        """Returns a quantized weight whose tensors may be misaligned; packed by step bytes."""
        quant_type = self.pick("nf4", "nf4", "fp4")
        packed, absmax = reference.quantize(0.1 * self.gauss(O, I), block_size, quant_type)
        packed = self.place(packed, step)
        last = (O, I), block_size, quant_type
        if self.pick(True, True, False):
            codes, absmax2, offset = map(self.place, reference.double_quantize(absmax))
            return PackedWeight(packed, codes, absmax2, offset, *last)
        return PackedWeight(packed, self.place(absmax), None, None, *last)


def exact_weight(w: PackedWeight) -> Tensor:
    """The weight in float64: level times absmax, not rounded."""
    return reference.dequantize(w, torch.float32).double()


def product(source: Source) -> tuple[str, bool]:
    """Runs a random product; returns what it was and whether it is right."""
    direction = source.pick("forward", "backward")
    path = source.pick("skinny", "skinny", "tile") if direction == "forward" else "tile"
    path = "dense" if source.pick(*range(5)) == 0 else path
    dtype = source.pick(*DTYPES) if path == "dense" else source.pick(*HALVES)

    O, I = source.pick(*OUT), source.pick(*INNER)
    line: dict[str, Any] = {"path": path}
    if path == "dense":
        I = source.pick(I, I + 1, 33)
    if path == "tile":
        fitting = [
            tile for tile in choose.lines(direction) if tile["path"] == path and I % tile["BI"] == 0
        ]
        line = source.pick(*fitting)

    whole = [size for size in (64, 128, 256, 32) if I % size == 0]
    if path == "skinny":
        whole = [size for size in whole if size >= 64]
    block_size = source.pick(*whole) if whole else 64
    w = source.weight(O, I, block_size, 1 if path == "dense" else 4)
    rows = _rows_of(line, I, block_size)
    return multiply(source, direction, line, w, source.pick(*rows), dtype)


def _rows_of(line: dict[str, Any], I: int, block_size: int) -> list[int]:
    """Numbers of rows of x to try with a line."""
    if line["path"] == "tile":
        return [1, 3, 17, line["BM"], line["BM"] + 2]
    if line["path"] == "dense":
        return [1, 5, 33]
    return [M for M in (1, 3, 7, 8, 9, 16, 23, 32, 47, 64) if choose.takes(line, M, I, block_size)]


def multiply(
    source: Source, direction: str, line: dict[str, Any], w: PackedWeight, M: int, dtype: Any
) -> tuple[str, bool]:
    """Runs one product with a random term and bias."""
    (O, I), forward = w.shape, direction == "forward"
    wide, tall = (I, O) if forward else (O, I)
    x = source.gauss(M, wide)
    x = source.rows(source.pick(x, x * source.sparse((M, wide))).to(dtype))
    r = source.pick(*RANKS)
    low = None
    if r:
        right = source.gauss(tall, r).to(dtype)
        right = source.pick(right, right.T.contiguous().T)
        low = LowRank(source.gauss(M, r).to(dtype), right, 0.75)
    bias = source.gauss(O).to(dtype) if forward and source.pick(True, False) else None

    said = {k: v for k, v in line.items() if k not in ("rows", "weights")}
    name = (
        f"{direction} {said} M={M} {O}x{I} {dtype} r={r} bias={bias is not None} "
        f"{w.quant_type} blocks={w.block_size} double={w.double_quantized} "
        f"x {x.stride()} {x.data_ptr() % 16} packed {w.packed.data_ptr() % 16}"
    )
    # With few programs each has many steps to do.
    with emulated(), mock.patch.object(skinny, "PROGRAMS", source.pick(1, 4, 512)):
        y = matmul.forward(x, w, bias, low, line) if forward else matmul.backward(x, w, low, line)
    return name, within_bound(y, x, w, low, bias, forward, line["path"])


def within_bound(
    y: Tensor,
    x: Tensor,
    w: PackedWeight,
    low: LowRank | None,
    bias: Tensor | None,
    forward: bool,
    path: str,
) -> bool:
    """Whether the error of a product is within the bound at the head of this file."""
    W = exact_weight(w).T if forward else exact_weight(w)
    exact, magnitude = x.double() @ W, x.double().abs() @ W.abs()
    if low:
        left, right = low.scale * low.left.double(), low.right.double().T
        exact, magnitude = exact + left @ right, magnitude + left.abs() @ right.abs()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()

    info = torch.finfo(y.dtype)
    roundings = (3 if path == "dense" else 2) * info.eps / 2
    terms = x.shape[1] + 8 + (low.left.shape[1] if low else 0)
    bound = roundings / (1 - roundings) + terms * 2**-24
    error = (y.double() - exact).abs()
    return bool((error <= bound * magnitude + info.smallest_normal * info.eps).all())


def conversion(source: Source) -> tuple[str, bool]:
    """Runs a random conversion or dropout; returns what it was, and whether every bit is right."""
    kind = source.pick("quantize", "dequantize", "dequantize", "double", "dropout")
    n, dtype = source.pick(1, 63, 64, 65, 1000, 4096, 5001), source.pick(*DTYPES)
    block_size = source.pick(32, 64, 128, 4096)
    x = source.place(source.gauss(n).to(dtype))
    name = f"{kind} n={n} {dtype} blocks={block_size} at {x.data_ptr() % 16}"

    run: Callable[[], Any]
    if kind == "quantize":
        expected: Any = reference.quantize(x, block_size)
        run = lambda: nf4.quantize(x, block_size)  # noqa: E731
    elif kind == "dropout":
        seed = torch.tensor(source.choices.randrange(2**63))
        expected = reference_dropout.dropout(x, 0.3, seed)
        run = lambda: dropout.dropout(x, 0.3, seed)  # noqa: E731
    elif kind == "double":
        expected = reference.double_quantize(x.float().abs())
        run = lambda: nf4.double_quantize(x.float().abs())  # noqa: E731
    else:
        w = source.weight(1, n, block_size, 1)
        expected = reference.dequantize(w, dtype)
        run = lambda: nf4.dequantize(w, dtype)  # noqa: E731
        name += f" {w.quant_type} double={w.double_quantized} packed {w.packed.data_ptr() % 16}"

    with emulated():
        found = run()
    pairs = zip(_tuple(found), _tuple(expected), strict=True)
    right = all(torch.equal(a, b) for a, b in pairs)
    if kind == "double":
        with emulated():
            right = right and torch.equal(
                nf4.double_dequantize(*expected), reference.double_dequantize(*expected)
            )
    return name, right


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def run(seed: int, count: int, seconds: float) -> dict[str, Any]:
    """Runs `count` random cases, or as many as begin within a time."""
    began, kinds = time.monotonic(), collections.Counter[str]()
    wrong: list[str] = []
    faults: list[str] = []
    for i in range(count):
        if time.monotonic() - began > seconds:
            break
        source = Source(1000 * seed + i)
        what = product if i % 4 else conversion
        try:
            name, right = what(source)
        except Exception as error:
            name, right = f"case {1000 * seed + i}", True
            faults.append(f"{name}: {type(error).__name__}: {error}")
        kinds[_kind(name)] += 1
        if not right:
            wrong.append(name)

    return {
        "triton": triton.__version__,
        "ran": kinds.total(),
        "kinds": dict(kinds),
        "wrong": wrong,
        "faults": faults,
        "seconds": round(time.monotonic() - began, 1),
    }


def _kind(name: str) -> str:
    """ "forward tile" of a product's name, "quantize" of a conversion's."""
    words = name.replace("{'path': '", "").replace("'", "").replace("}", "").replace(",", "")
    return " ".join(words.split()[: 2 if words.startswith(("forward", "backward")) else 1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--target", default=ptx_launch.TARGET)
    options = parser.parse_args()
    ptx_launch.TARGET = options.target
    result = run(options.seed, options.count, options.seconds)
    print(json.dumps(result))
    sys.exit(bool(result["wrong"] or result["faults"]))


if __name__ == "__main__":
    main()
