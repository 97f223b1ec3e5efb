r"""The products with a 4-bit weight on a GPU, with Triton: the functions of reference/matmul.py.

    y = x W^T + bias    [M, O]        dx = dy W    [M, I]        W [O, I] stays packed

There are three paths, and `choose.py` says which for how many rows of x, and on which GPU:

* **skinny**, M <= 64 (decoding): the time is that of reading W's packed bytes. See `skinny.py`.
* **tile**, up to some hundreds of rows: W is dequantized tile by tile on its way into the product.
  See `tile.py`.
* **dense**, all else: W is dequantized once into a scratch and cuBLAS multiplies. See `dense.py`.

A low-rank term s z B^T is added in the same pass over y where that pays (see `lora.py`).

Dimension letters: M rows of x, I in_features, O out_features, r rank.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..reference.nf4 import PackedWeight
from .choose import DENSE, choose, give_up, takes, warn_of
from .dense import dense_backward, dense_forward
from .runtime import FLOATS, HALVES, LowRank, OutOfResources, check, checked
from .skinny import skinny_forward
from .tile import tile_backward, tile_forward
from .tuned import Line


def nf4_linear(x: Tensor, w: PackedWeight, bias: Tensor | None) -> Tensor:
    """Returns x W^T + bias, [.., O], in x's dtype."""
    return forward(x, w, bias, None)


def nf4_linear_backward(dy: Tensor, w: PackedWeight) -> Tensor:
    """Returns dx = dy W, [.., I], in dy's dtype."""
    return backward(dy, w, None)


def forward(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None,
    low: LowRank | None,
    choice: Line | None = None,
) -> Tensor:
    """Returns x W^T + bias + s left right^T, [.., O], on the path of the table or of `choice`."""
    w = checked(w)
    rows, M = _rows("x", x, w, 1)
    O = w.shape[0]
    low = _checked_term(low, x, M, O)
    bias = _checked_bias(bias, x, w)

    def run(line: Line) -> Tensor:
        if line["path"] == "skinny":
            return skinny_forward(rows, w, bias, low)
        matrix, term = _matrices(rows, low, M)
        if line["path"] == "tile":
            return tile_forward(matrix, w, bias, term, line)
        return dense_forward(matrix, w, bias, term)

    y = _on_the_path("forward", run, M, rows, w, choice)
    return y if y.ndim == x.ndim else y.view(*x.shape[:-1], O)


def backward(
    dy: Tensor, w: PackedWeight, low: LowRank | None, choice: Line | None = None
) -> Tensor:
    """Returns dy W + s left right^T, [.., I], on the path of the table or of `choice`."""
    w = checked(w)
    rows, M = _rows("dy", dy, w, 0)
    I = w.shape[1]
    matrix, term = _matrices(rows, _checked_term(low, dy, M, I), M)

    def run(line: Line) -> Tensor:
        if line["path"] == "tile":
            return tile_backward(matrix, w, term, line)
        return dense_backward(matrix, w, term)

    dx = _on_the_path("backward", run, M, rows, w, choice)
    return dx if dy.ndim == 2 else dx.view(*dy.shape[:-1], I)


def _on_the_path(
    direction: str,
    run: Callable[[Line], Tensor],
    M: int,
    x: Tensor,
    w: PackedWeight,
    choice: Line | None,
) -> Tensor:
    """Computes a product on the path of the table, or on that of `choice` and no other.

    Where the table's needs more than the GPU has, the next smaller one is tried, with one warning.
    """
    line = first = _choice(direction, M, x, w, choice)
    too_large: Exception | None = None
    while True:
        try:
            y = run(line)
            break
        except OutOfResources as error:
            if choice is not None or line == DENSE:
                raise
            too_large = error
            give_up(direction, line, x.device)
            line = _choice(direction, M, x, w, None)

    if too_large:
        warn_of(direction, first, line, x.device, too_large)
    return y


def _rows(name: str, x: Tensor, w: PackedWeight, dim: int) -> tuple[Tensor, int]:
    """Returns x without gaps inside a row, and the number of rows. Their width is a side of W.

    x stays as it is if it is contiguous, and is a matrix otherwise: a view takes as long as a check
    of all arguments, and generation multiplies x [1, 1, I].
    """
    check(name, x, FLOATS, w.device)
    if len(w.shape) != 2:
        raise ValueError(f"a product takes a weight [out, in], not {tuple(w.shape)}")
    if x.ndim == 0 or x.shape[-1] != w.shape[dim]:
        raise ValueError(
            f"{name} {tuple(x.shape)} does not fit a weight {tuple(w.shape)}: "
            f"its last size must be {w.shape[dim]}"
        )
    width = w.shape[dim]
    if x.ndim != 2 and width and x.is_contiguous():
        return x, x.numel() // width

    rows = x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), width)
    return rows if rows.stride(1) == 1 else rows.contiguous(), rows.shape[0]


def _checked_term(low: LowRank | None, x: Tensor, M: int, N: int) -> LowRank | None:
    """Returns the term for a result of M rows and N columns, with its left factor contiguous."""
    if low is None:
        return None

    left, right, _ = low
    r, device = left.shape[-1], x.device
    fits = left.numel() == M * r and right.shape == (N, r)
    same_dtype = left.dtype == right.dtype == x.dtype
    if not (fits and same_dtype and left.device == device and right.device == device):
        _check_factor("left", torch.atleast_2d(left).flatten(0, -2), (M, r), x)
        _check_factor("right", right, (N, r), x)
    return low if left.is_contiguous() else low._replace(left=left.contiguous())


def _matrices(rows: Tensor, low: LowRank | None, M: int) -> tuple[Tensor, LowRank | None]:
    """Returns the rows, and those of the term, as matrices."""
    low = low and low._replace(left=low.left.view(M, low.left.shape[-1]))
    return rows.view(M, rows.shape[-1]), low


def _check_factor(factor: str, t: Tensor, shape: tuple[int, int], x: Tensor) -> None:
    check(f"the low-rank term's {factor} factor", t, (x.dtype,), x.device)
    if t.shape != shape:
        raise ValueError(f"the low-rank term's {factor} factor is {tuple(t.shape)}, not {shape}")


def _checked_bias(bias: Tensor | None, x: Tensor, w: PackedWeight) -> Tensor | None:
    if bias is None:
        return None

    check("bias", bias, (x.dtype,), x.device)
    if bias.shape != w.shape[:1]:
        raise ValueError(
            f"bias is {tuple(bias.shape)}: a weight {tuple(w.shape)} takes one of {w.shape[:1]}"
        )
    return bias.contiguous()


def _choice(direction: str, M: int, x: Tensor, w: PackedWeight, given: Line | None) -> Line:
    """Returns the path to take: the given one, if the product fits it, or that of the table."""
    O, I = w.shape

    # On tensor cores float32 would lose bits; words are loaded from addresses that 4 divides.
    fusable = x.dtype in HALVES and x.numel() > 0 and w.packed.data_ptr() % 4 == 0
    if given is None:
        return choose(direction, M, O, I, w.block_size, x.device) if fusable else DENSE

    fits = takes(given, M, I, w.block_size) and (fusable or given["path"] == "dense")
    if not fits:
        raise ValueError(
            f"{given} does not take {M} rows of {x.dtype} and a weight {tuple(w.shape)} "
            f"in blocks of {w.block_size}"
        )
    return given
