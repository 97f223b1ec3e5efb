"""The skinny product: its orders of rows and columns, up to 64 rows of x, odd numbers of blocks.

Its rounding is tested in test_gpu_matmul.py with that of the other paths.
"""

from typing import Any

import pytest
import torch
from gpu import DEVICE, guarded
from helpers import gaussian
from torch import Tensor
from weights import packed_weight

from minilora.kernels.gpu import matmul, runtime, skinny
from minilora.kernels.gpu.runtime import LowRank, tl, triton
from minilora.kernels.reference import nf4 as reference
from minilora.kernels.reference.nf4 import PackedWeight

SKINNY = {"path": "skinny"}

# As if the GPU were of that compute capability: one for each order of the columns.
ORDERS = pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["k_width 4", "k_width 2"])


@triton.jit
def reorder(out, columns, KWIDTH: tl.constexpr):
    i = tl.arange(0, 64)
    numbers = i[:, None] * 64 + i[None, :]
    reordered = skinny._reorder_columns(skinny._reorder_rows(numbers), KWIDTH)
    tl.store(out + numbers, reordered)
    tl.store(columns + i, skinny._columns(KWIDTH))


@pytest.mark.parametrize("width", [2, 4])
def test_rows_and_columns_stand_where_the_docstring_says(width: int) -> None:
    out = torch.empty(64, 64, dtype=torch.int32, device=DEVICE)
    of_x = torch.empty(64, dtype=torch.int32, device=DEVICE)
    reorder[(1,)](out, of_x, KWIDTH=width)

    # Four threads have 16 columns each: the first of each, then the next.
    firsts = [16 * thread + first for first in range(0, 16, width) for thread in range(4)]
    columns = torch.tensor([first + k for first in firsts for k in range(width)])
    assert torch.equal(of_x.cpu(), columns.int())

    # Warp w owns rows 16w to 16w + 15 of the product.
    rows = [32 * h + 8 * w + row for w in range(4) for h in range(2) for row in range(8)]
    expected = 64 * torch.tensor(rows)[:, None] + columns
    assert torch.equal(out.cpu(), expected.int())


@pytest.mark.parametrize(
    ("capability", "width", "least"),
    [
        (None, 4, 8),
        ((7, 5), 4, 8),
        ((8, 0), 4, 8),
        ((8, 6), 4, 8),
        ((8, 9), 4, 8),
        ((9, 0), 2, 16),
        ((10, 0), 4, 8),
        ((10, 3), 4, 8),
        ((12, 0), 4, 8),
    ],
    ids=str,
)
def test_the_order_and_height_of_a_generation(
    capability: tuple[int, int] | None, width: int, least: int
) -> None:
    assert skinny.k_width(capability) == width
    found = [skinny.height(M, capability) for M in (1, 8, 9, 16, 17, 32, 33, 64)]
    assert found == [least, least, 16, 16, 32, 32, 64, 64]


def product(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None = None,
    low: LowRank | None = None,
    line: Any = SKINNY,
) -> Tensor:
    """The product in guarded memory, brought back to the CPU."""
    with guarded() as buffers:
        hold = buffers.hold
        term = LowRank(hold(low.left), hold(low.right), low.scale) if low else None
        return matmul.forward(hold(x), buffers.hold_weight(w), hold(bias), term, line).cpu()


def error_and_bound(
    found: Tensor, x: Tensor, w: PackedWeight, bias: Tensor, low: LowRank
) -> tuple[Tensor, Tensor]:
    """The distance from the float64 product, and what the roundings allow.

    Two roundings to x's dtype, of a level and of the result; sums in float32.
    """
    W = reference.dequantize(w, torch.float64)
    left, right = low.left.double(), low.right.double()
    expected = x.double() @ W.T + bias.double() + low.scale * left @ right.T
    magnitude = x.double().abs() @ W.abs().T + bias.double().abs()
    magnitude += low.scale * left.abs() @ right.abs().T

    info = torch.finfo(x.dtype)
    terms = W.shape[1] + left.shape[1] + 2
    bound = 1.01 / 2 * (2 * info.eps + terms * 2**-23) * magnitude
    denormal = info.eps * info.smallest_normal
    bound += denormal * (1 + x.double().abs().sum(1, keepdim=True))
    return (found.double() - expected).abs(), bound


@ORDERS
@pytest.mark.parametrize(
    ("M", "O", "I", "dtype", "double"),
    [
        (1, 65, 576, torch.bfloat16, True),
        (17, 64, 192, torch.float16, True),
        (31, 130, 64, torch.bfloat16, False),
        (33, 96, 320, torch.bfloat16, True),
        (64, 65, 576, torch.float16, False),
        (64, 17, 256, torch.bfloat16, True),
    ],
    ids=str,
)
def test_up_to_64_rows_and_odd_numbers_of_blocks_are_within_rounding_of_float64(
    capability: tuple[int, int],
    M: int,
    O: int,
    I: int,
    dtype: torch.dtype,
    double: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "capability_of", lambda device: capability)
    w = packed_weight(0.1 * gaussian(O, I), 64, double)
    x, bias = gaussian(M, I, dtype=dtype), gaussian(O, dtype=dtype)
    low = LowRank(gaussian(M, 5, dtype=dtype, seed=1), gaussian(O, 5, dtype=dtype, seed=2), 0.75)

    found = product(x, w, bias, low)
    error, bound = error_and_bound(found, x, w, bias, low)
    assert found.dtype == dtype and found.shape == (M, O)
    assert (error <= bound).all(), (error - bound).max()


def test_both_orders_give_the_sums_of_the_same_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    # One column of x at a time: a sum of one term has no rounding to hide an order behind.
    w, x = packed_weight(0.1 * gaussian(65, 64), 64, True), torch.eye(64).bfloat16()
    W = reference.dequantize(w, torch.float32)
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(runtime, "capability_of", lambda device, c=capability: c)
        found = product(x, w).T.float()
        assert torch.equal(found == 0, W == 0)
        assert ((found - W).abs() <= 2 * 2**-8 * W.abs()).all()


@ORDERS
def test_rows_of_x_at_any_distance(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Copied several at a time only where every row begins at a multiple of 16.
    monkeypatch.setattr(runtime, "capability_of", lambda device: capability)
    w, x = packed_weight(0.1 * gaussian(65, 192), 64, True), gaussian(33, 192).bfloat16()
    expected = product(x, w)
    for gap in (1, 2, 16):
        apart = torch.cat([x, x], dim=1)[:, : 192 + gap].contiguous()[:, :192]
        assert apart.stride(0) == 192 + gap
        assert torch.equal(product(apart, w), expected)


def in_strides(t: Tensor, layout: str) -> Tensor:
    """t [4, 3, N] or [3, N], equal in value, in other strides."""
    match layout:
        case "part of a row":
            return torch.cat([t, t], dim=-1)[..., : t.shape[-1]]
        case "last of several rows":
            return torch.stack([t, t], dim=-2)[..., 1, :]
        case "sequences inside":
            return t.transpose(0, -2).contiguous().transpose(0, -2)
        case "columns":
            return t.mT.contiguous().mT
    return t


@pytest.mark.parametrize(
    "layout",
    ["contiguous", "part of a row", "last of several rows", "sequences inside", "columns"],
)
@pytest.mark.parametrize("path", ["skinny", "tile", "dense"])
def test_x_in_any_shape_and_strides_gives_what_its_rows_give(path: str, layout: str) -> None:
    line = {"path": path, "BM": 16, "BO": 32, "BI": 64, "warps": 4, "stages": 2}
    w, right = packed_weight(0.1 * gaussian(65, 128), 64, True), gaussian(65, 5).bfloat16()
    x, left = gaussian(4, 3, 128).bfloat16(), gaussian(4, 3, 5, seed=1).bfloat16()
    for low in (None, left):
        of_rows = LowRank(low.view(12, 5), right, 0.5) if low is not None else None
        expected = product(x.view(12, 128), w, None, of_rows, line).view(4, 3, 65)

        term = LowRank(in_strides(low, layout), right, 0.5) if low is not None else None
        assert torch.equal(product(in_strides(x, layout), w, None, term, line), expected)
        term = LowRank(low[0, 0], right, 0.5) if low is not None else None
        alone = product(in_strides(x, layout)[0, 0], w, None, term, line)
        assert torch.equal(alone, product(x[0, :1], w, None, term, line)[0])
