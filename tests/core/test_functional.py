"""The differentiable products against float64, gradcheck and the closed forms.

In every shape and stride; tile by tile; with dropout, under autocast and compiled.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import gaussian
from torch import Tensor

import minilora
from minilora import ops
from minilora.kernels.cpu import matmul, nf4
from minilora.kernels.reference import dropout as reference_dropout
from minilora.kernels.reference import lora

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The blocks of the second cross its rows.
WEIGHTS = [((33, 128), 64), ((33, 70), 64), ((50, 96), 32), ((1, 64), 64)]
LEADING = [(), (0,), (1,), (2,), (17,), (2, 3), (2, 1, 4), (3, 0)]
LAYOUTS = ("contiguous", "transposed", "expanded", "strided")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
weights = pytest.mark.parametrize(("shape", "block_size"), WEIGHTS, ids=str)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """A tensor of t's shape in other strides."""
    match layout:
        case "transposed":
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        case "expanded":
            return t[..., :1].expand(t.shape)
        case "strided":
            return torch.stack([t, t], dim=-1)[..., 0]
    return t


def inputs(width: int, dtype: torch.dtype, seed: int = 0) -> Iterator[Tensor]:
    for leading in LEADING:
        for layout in LAYOUTS:
            yield laid_out(gaussian(*leading, width, dtype=dtype, seed=seed), layout)


def assert_close(
    found: Tensor, exact: Tensor, magnitude: Tensor, roundings: int, terms: int
) -> None:
    """Holds `found` to the error that rounding can make.

    `roundings` are those to its dtype, `terms` those of the sums, which are in float32 at least. A
    rounding to a dtype errs by at most eps / 2 of what it rounds, which is at most `magnitude`: the
    same sums of products, of absolute values. 1 % is for products of errors.
    """
    wide = min(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps)
    relative = 1.01 / 2 * (roundings * torch.finfo(found.dtype).eps + terms * wide)
    error = (found.double() - exact).abs()
    assert found.shape == exact.shape
    assert (error <= relative * magnitude).all(), (error - relative * magnitude).max()


@weights
@dtypes
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_nf4_linear_and_its_gradients_are_within_rounding_of_float64(
    shape: tuple[int, int], block_size: int, dtype: torch.dtype, double_quant: bool
) -> None:
    O, I = shape
    w = minilora.quantize_nf4(gaussian(O, I), block_size, double_quant)
    W = w.dequantize(torch.float64)
    for x in inputs(I, dtype):
        for bias in (None, gaussian(O, dtype=dtype, seed=1).requires_grad_()):
            x = x.detach().requires_grad_()
            y = minilora.nf4_linear(x, w, bias)
            b = torch.zeros(O, dtype=torch.float64) if bias is None else bias.detach().double()
            X = x.detach().double()
            # To y's dtype: W, the product, and the sum with the bias. The sums' terms: I products
            # and the bias.
            assert y.dtype == dtype
            assert_close(y.detach(), X @ W.T + b, X.abs() @ W.abs().T + b.abs(), 3, I + 2)
            for layout in LAYOUTS:
                dy = laid_out(gaussian(*y.shape, dtype=dtype, seed=2), layout)
                dx, *dbias = torch.autograd.grad(
                    y, [x] if bias is None else [x, bias], dy, retain_graph=True
                )
                D = dy.double()
                assert dx.dtype == dtype
                assert_close(dx, D @ W, D.abs() @ W.abs(), 2, O)
                for found in dbias:
                    rows = D.reshape(-1, O)
                    assert_close(found, rows.sum(0), rows.abs().sum(0), 1, len(rows))


@weights
@dtypes
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_lora_linear_and_its_gradients_are_within_rounding_of_the_closed_form(
    shape: tuple[int, int], block_size: int, dtype: torch.dtype, quantized: bool
) -> None:
    (O, I), r, scale = shape, 5, 1.75
    base: Any = gaussian(O, I, dtype=dtype)
    base = minilora.quantize_nf4(base, block_size) if quantized else base
    W = base.dequantize(torch.float64) if quantized else base.double()
    # An adapter is float32 whatever the base is.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    A = gaussian(r, I, dtype=wide, seed=3).requires_grad_()
    B = gaussian(O, r, dtype=wide, seed=4).requires_grad_()
    double = W, A.detach().double(), B.detach().double(), scale
    magnitude = W.abs(), double[1].abs(), double[2].abs(), scale

    for x in inputs(I, dtype):
        x = x.detach().requires_grad_()
        X = x.detach().double().reshape(-1, I)
        y = minilora.lora_linear(x, base, A, B, scale)
        assert y.dtype == dtype and y.shape == (*x.shape[:-1], O)

        # To the dtype: W, A and B, x A^T or dy B, its multiple, a product, a sum of two. Terms: of
        # the longest chain of sums.
        terms = I + O + r + len(X) + 4
        exact_y, size = lora.forward(X, *double), lora.forward(X.abs(), *magnitude)
        assert_close(y.detach().view(-1, O), exact_y, size, 6, terms)

        dy = gaussian(*y.shape, dtype=dtype, seed=5)
        D = dy.double().view(-1, O)
        exact, sizes = lora.gradients(X, *double, D), lora.gradients(X.abs(), *magnitude, D.abs())
        dx, dA, dB = torch.autograd.grad(y, [x, A, B], dy)
        assert dx.dtype == dtype and dA.dtype == dB.dtype == wide
        gradients = dx.reshape(-1, I), dA.to(dtype), dB.to(dtype)
        for found, a, b in zip(gradients, exact, sizes, strict=True):
            assert_close(found, a, b, 7, terms)


@pytest.mark.parametrize("shape", [(7, 64), (5, 70)], ids=str)
@pytest.mark.parametrize("leading", [(), (1,), (2, 3)], ids=str)
def test_gradcheck_in_float64(shape: tuple[int, int], leading: tuple[int, ...]) -> None:
    (O, I), r = shape, 3

    def leaf(*size: int, seed: int) -> Tensor:
        return gaussian(*size, dtype=torch.float64, seed=seed).requires_grad_()

    w = minilora.quantize_nf4(gaussian(O, I))
    x, bias = leaf(*leading, I, seed=1), leaf(O, seed=2)
    W, A, B = leaf(O, I, seed=3), leaf(r, I, seed=4), leaf(O, r, seed=5)
    assert torch.autograd.gradcheck(lambda x, bias: minilora.nf4_linear(x, w, bias), (x, bias))
    assert torch.autograd.gradcheck(
        lambda x, A, B, bias: minilora.lora_linear(x, w, A, B, 1.5, bias), (x, A, B, bias)
    )
    assert torch.autograd.gradcheck(
        lambda x, W, A, B, bias: minilora.lora_linear(x, W, A, B, 1.5, bias), (x, W, A, B, bias)
    )


def test_the_merged_weight_behaves_as_the_layer() -> None:
    sizes = ((9, 70), (33, 70), (4, 70), (33, 4))
    tensors = [gaussian(*size, dtype=torch.float64, seed=i) for i, size in enumerate(sizes)]
    x, *factors = tensors
    merged = x @ lora.merged_weight(*factors, 0.5).T
    magnitude = lora.forward(*(t.abs() for t in tensors), 0.5)
    assert_close(merged, lora.forward(*tensors, 0.5), magnitude, 6, 2 * (70 + 4))


@dtypes
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_with_b_zero_changes_no_bit(
    dtype: torch.dtype, quantized: bool, layout: str
) -> None:
    for (O, I), block_size in WEIGHTS:
        dense = gaussian(O, I, dtype=dtype)
        base = minilora.quantize_nf4(dense, block_size) if quantized else dense
        A, B = gaussian(3, I, seed=3), torch.zeros(O, 3)
        for leading in LEADING:
            x = laid_out(gaussian(*leading, I, dtype=dtype), layout)
            for bias in (None, gaussian(O, dtype=dtype, seed=1)):
                y = base_product(x, base, bias)
                for dropout in (0.0, 0.5):
                    z = minilora.lora_linear(x, base, A, B, 2.0, bias, dropout)
                    assert torch.equal(z, y), f"W {O, I}, x {tuple(x.shape)}, bias {bias}"


def base_product(x: Tensor, base: Tensor | minilora.NF4Weight, bias: Tensor | None) -> Tensor:
    if isinstance(base, minilora.NF4Weight):
        return minilora.nf4_linear(x, base, bias)
    return F.linear(x, base, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scratch", [1, 1 << 12, 40_000])
def test_a_weight_larger_than_the_scratch_is_multiplied_tile_by_tile(
    dtype: torch.dtype, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    O, I = 67, 192
    # Small integers: every product and every sum is exact, in whatever order and in however many
    # tiles.
    generator = torch.Generator().manual_seed(0)
    sizes = ((O, I), (33, I), (33, O))
    W, x, dy = (torch.randint(-1, 2, size, generator=generator).to(dtype) for size in sizes)
    # Each block's absmax.
    W[:, ::64] = 1
    w = minilora.quantize_nf4(W, double_quant=False)
    tiles: list[tuple[Any, ...]] = []

    def spy(*args: Any) -> None:
        tiles.append(args[-2:])
        original(*args)

    original = nf4.dequantize_tile
    monkeypatch.setattr(nf4, "dequantize_tile", spy)
    monkeypatch.setattr(matmul, "_SCRATCH_BYTES", scratch)

    assert torch.equal(minilora.nf4_linear(x, w), x @ W.T)
    forward = len(tiles)
    dx = ops.nf4_linear_backward(dy, w)
    assert torch.equal(dx, dy @ W)
    rows = max(1, scratch // (I * dtype.itemsize))
    columns = max(1, scratch // (O * 64 * dtype.itemsize))
    assert forward == -(-O // rows)
    assert len(tiles) - forward == -(-(I // 64) // columns)


def test_dropout_acts_on_the_adapters_path_alone_and_keeps_its_mean() -> None:
    draws, p = 4000, 0.25
    w = minilora.quantize_nf4(gaussian(6, 64))
    A, B = gaussian(3, 64, seed=1).double(), gaussian(6, 3, seed=2).double()
    x = gaussian(64, dtype=torch.float64, seed=3).expand(draws, 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y = minilora.lora_linear(x, w, A, B, 0.5, dropout=p)
        torch.manual_seed(0)
        dropped = reference_dropout.dropout(x, p, torch.randint(1 << 62, ()))

    W = w.dequantize(torch.float64)
    size = x.abs() @ W.T.abs() + dropped.abs() @ A.T.abs() @ B.T.abs()
    assert_close(y, x @ W.T + 0.5 * dropped @ A.T @ B.T, size, 6, 2 * (64 + 3))

    # The mean of the draws is normal about the mean without dropout: 6 standard errors.
    error = (y.mean(0) - minilora.lora_linear(x[0], w, A, B, 0.5)).abs()
    assert (y.std(0) > 0).all() and (error <= 6 * y.std(0) / draws**0.5).all()
    gradient = torch.autograd.functional.jacobian(
        lambda x: minilora.lora_linear(x, w, A, 0 * B, 0.5, dropout=p), x[:2]
    )
    assert torch.equal(gradient[0, :, 0], W), "the base's path keeps every element of x"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_autocast_computes_in_its_dtype_as_linear_does(
    dtype: torch.dtype, to: torch.dtype, rows: int
) -> None:
    w, bias = minilora.quantize_nf4(gaussian(33, 128)), gaussian(33, dtype=dtype, seed=1)
    x = gaussian(rows, 128, dtype=dtype, seed=2).requires_grad_()
    A, B = gaussian(4, 128, seed=3).requires_grad_(), gaussian(33, 4, seed=4).requires_grad_()
    with torch.autocast("cpu", dtype=to):
        expected = F.linear(x, x.new_ones(33, 128)).dtype
        y, z = minilora.nf4_linear(x, w, bias), minilora.lora_linear(x, w, A, B, 2.0, bias)
        over_dense = minilora.lora_linear(x, w.dequantize(dtype), A, B, 2.0)
    assert expected == (torch.float64 if dtype == torch.float64 else to)
    assert {y.dtype, z.dtype, over_dense.dtype} == {expected}
    assert torch.equal(y, minilora.nf4_linear(x.to(expected), w, bias.to(expected)))
    assert torch.equal(z, minilora.lora_linear(x.to(expected), w, A, B, 2.0, bias.to(expected)))
    (y.sum() + z.sum()).backward()
    for t in (x, A, B):
        assert t.grad is not None and t.grad.dtype == t.dtype


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        ((3, 63), (8, 64)),
        ((64, 3), (8, 64)),
        ((), (8, 64)),
        ((3, 64), (512,)),
        ((3, 64), (2, 4, 64)),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_named(x: tuple[int, ...], shape: tuple[int, ...]) -> None:
    w = minilora.quantize_nf4(torch.ones(shape))
    with pytest.raises(ValueError, match=re.escape(f"x {x} does not fit an NF4 weight {shape}")):
        minilora.nf4_linear(torch.ones(x), w)
    if x:
        with pytest.raises(ValueError, match=re.escape(f"does not fit an NF4 weight {shape}")):
            minilora.lora_linear(torch.ones(x), w, torch.ones(2, 64), torch.ones(8, 2), 1.0)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_an_integer_input_is_refused(autocast: bool) -> None:
    w, x = minilora.quantize_nf4(torch.ones(8, 64)), torch.ones(3, 64, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with pytest.raises(TypeError, match="int64"):
            minilora.nf4_linear(x, w)
        with pytest.raises(TypeError, match="int64"):
            minilora.lora_linear(x, w, torch.ones(2, 64), torch.ones(8, 2), 1.0)


# The compiler's own warnings: of torch.jit, and of a Function that dynamo traces.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_takes_the_whole_product_and_keeps_no_dense_weight() -> None:
    w = minilora.quantize_nf4(gaussian(72, 256))
    dy = gaussian(3, 72, seed=2)
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.nbytes)
        return t

    def run(function: Any) -> tuple[Tensor, Tensor]:
        x = gaussian(3, 256, seed=1).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = function(x)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    expected = run(lambda x: minilora.nf4_linear(x, w))
    saved.clear()
    found = run(torch.compile(lambda x: minilora.nf4_linear(x, w), fullgraph=True))
    assert all(map(torch.equal, found, expected)), "the same operators"
    assert max(saved, default=0) <= w.nbytes, "no more than the packed weight"
    run(lambda x: F.linear(x, w.dequantize()))
    assert max(saved) >= 4 * w.numel(), "a dense weight that is kept would have been seen"


@pytest.mark.parametrize("adapter", [False, True])
def test_backward_under_an_autocast_that_the_forward_did_not_have(adapter: bool) -> None:
    w, x = minilora.quantize_nf4(gaussian(33, 128)), gaussian(5, 128)
    A, B = gaussian(4, 128), gaussian(33, 4)
    gradients = []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        y = minilora.lora_linear(leaf, w, A, B, 2.0) if adapter else minilora.nf4_linear(leaf, w)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y.backward(torch.ones_like(y))
        gradients.append(leaf.grad)
    assert gradients[0] is not None and torch.equal(gradients[0], gradients[1])


def test_a_gradient_of_a_gradient_is_refused_and_not_left_out() -> None:
    w, x = minilora.quantize_nf4(gaussian(33, 128)), gaussian(5, 128).requires_grad_()
    A, B = gaussian(4, 128).requires_grad_(), gaussian(33, 4)
    for y in (minilora.nf4_linear(x, w), minilora.lora_linear(x, w, A, B, 2.0)):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()
