"""What the GPU's scripts share: weights, paths, and the checks that come before a clock.

A wrong result is not timed. `check` is the one place that says so; a dry run, where launches do
nothing and there are no results, sets `DRY_RUN`.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import minilora
from minilora import ops
from minilora.kernels.gpu import choose, matmul
from minilora.kernels.reference import nf4 as reference

DEVICE = "cuda"
DRY_RUN = False
R = 16

Line = dict[str, Any]


class WrongResultError(Exception):
    """A result that differs from the reference by more than rounding."""


def check(name: str, right: Callable[[], bool]) -> None:
    """Raises WrongResultError unless `right()`, which a dry run does not ask."""
    if not DRY_RUN and not right():
        raise WrongResultError(f"{name}: the result is wrong, so it is not timed")


def check_product(name: str, y: Tensor, x: Tensor, W: Tensor) -> None:
    """Compares a bfloat16 product with float64.

    The result is rounded once, by 2^-8 at most; W or its levels once each, by some 2^-9, errors
    that add up as their squares do: eight standard deviations of them.
    """

    def right() -> bool:
        exact = x.double() @ W.double().T
        spread = (x.double().square() @ W.double().square().T).sqrt()
        if y.shape != exact.shape:
            return False
        bound = 2**-8 * exact.abs() + 8 * 2**-9 * spread
        return bool(((y.double() - exact).abs() <= bound).all())

    check(name, right)


def check_quantization(W: Tensor) -> None:
    """Both ways against the reference, bit for bit; bitsandbytes too, where it is installed."""
    packed, absmax = reference.quantize(W, 64)
    for double in (False, True):
        w = minilora.quantize_nf4(W, double_quant=double)
        constants = reference.double_quantize(absmax) if double else (absmax, None, None)
        expected = reference.PackedWeight(packed, *constants, tuple(W.shape), 64)
        for found, part in zip(w.tensors, expected.tensors, strict=True):
            check("quantize", functools.partial(_same, found, part))
        found, dense = w.dequantize(), reference.dequantize(expected, W.dtype)
        check("dequantize", functools.partial(_same, found, dense))

    bnb = bitsandbytes()
    if bnb:
        theirs, state = bnb.functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
        # Its CUDA build codes a block of zeros as 0.
        zero = absmax.repeat_interleave(32)[: packed.numel()] == 0
        check("bitsandbytes' bytes", lambda: bool(((theirs.view(-1) == packed) | zero).all()))
        check("bitsandbytes' absmax", lambda: torch.equal(state.absmax, absmax))


def _same(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return torch.equal(found, expected)


def check_products(O: int, I: int, rows: tuple[int, ...]) -> None:
    """The products as a user calls them, on the paths that the table of choices gives."""
    w = minilora.quantize_nf4(gaussian(O, I))
    W = w.dequantize(torch.float32)
    A, B = gaussian(R, I), gaussian(O, R)
    for M in rows:
        x, dy = gaussian(M, I), gaussian(M, O)
        check_product(f"forward M={M}", minilora.nf4_linear(x, w), x, W)
        check_product(f"backward M={M}", ops.nf4_linear_backward(dy, w), dy, W.T)
        both = torch.cat([x, x @ A.T], 1), torch.cat([W, 2 * B.float()], 1)
        check_product(f"LoRA M={M}", minilora.lora_linear(x, w, A, B, 2.0), *both)


def bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError:
        return None
    return bitsandbytes


def gaussian(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(rows << 16 | columns)
    return (0.02 * torch.randn(rows, columns, generator=generator)).to(DEVICE, dtype)


def packed_weight(O: int, I: int) -> tuple[reference.PackedWeight, Tensor]:
    """Returns a weight [O, I] as the kernels take it, and what it decodes to in float32."""
    w = minilora.quantize_nf4(gaussian(O, I))
    packed = reference.PackedWeight(*w.tensors, tuple(w.shape), w.block_size, w.quant_type)
    return packed, w.dequantize(torch.float32)


def generation() -> str:
    """Returns whose table of choices the GPU at hand has."""
    return choose.generation(torch.device(DEVICE))


def paths(
    direction: str, M: int, w: reference.PackedWeight, more: Sequence[Line] = ()
) -> list[Line]:
    """Every way to compute a product of M rows on the GPU at hand, dense first.

    `more`: tiles beside those of the table of choices.
    """
    found: list[Line] = [choose.DENSE]
    if direction == "forward":
        found.append({"path": "skinny"})
    for line in [*choose.lines(direction, generation()), *more]:
        sides = {k: v for k, v in line.items() if k not in ("rows", "weights")}
        if sides["path"] == "tile" and sides not in found:
            found.append(sides)
    return [line for line in found if choose.takes(line, M, w.shape[1], w.block_size)]


def name_of(line: Line) -> str:
    """A path as a table shows it: "tile 64x64x64, 4 warps, 3 stages"."""
    if line["path"] != "tile":
        return str(line["path"])
    sides = "x".join(str(line[side]) for side in ("BM", "BO", "BI"))
    return f"tile {sides}, {line['warps']} warps, {line['stages']} stages"


def forced(
    direction: str, x: Tensor, w: reference.PackedWeight, lines: list[Line]
) -> Iterator[tuple[Line, Callable[[], Tensor]]]:
    """(line, call) for each line: the product on its path and no other."""
    for line in lines:
        if direction == "forward":
            yield line, functools.partial(matmul.forward, x, w, None, None, line)
        else:
            yield line, functools.partial(matmul.backward, x, w, None, line)


def stop(error: WrongResultError) -> None:
    """Ends a script over a wrong result."""
    sys.exit(str(error))
