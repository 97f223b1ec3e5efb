"""linear_cross_entropy against the whole logits, in float64 where it is about precision."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minilora
from minilora.losses import cross_entropy, linear_cross_entropy
from minilora.losses.heads import WeightHead

# Tokens, hidden size, words: none is a power of two.
N, H, V = 150, 44, 1003
LABELS = torch.arange(N) * 379 % V

# What the issue of this function asks for in float32. Its rounding is 6e-8, and errors of products
# with 44 and 1003 terms grow with the root of that number: 2e-6 is never reached, 1e-6 is kept.
FLOAT32 = 1e-6


@pytest.fixture
def labels() -> Tensor:
    """Every third token is left out."""
    return LABELS.where(torch.arange(N) % 3 != 0, -100)


def inputs(dtype: torch.dtype = torch.float32, bias: bool = True) -> list[Tensor]:
    """hidden, weight and bias, of which all require gradients."""
    made = [gaussian(N, H), 0.3 * gaussian(V, H).flip(0), gaussian(V)]
    return [t.to(dtype).requires_grad_() for t in made[: 3 if bias else 2]]


def whole(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss as it is usually computed."""
    z = scale * F.linear(hidden, weight, bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z, labels, reduction=reduction)


def in_float64(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def distance(found: Tensor | None, exact: Tensor | None) -> float:
    """The error of a tensor, relative to its norm."""
    assert found is not None and exact is not None
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("chunk", [None, 17])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options", [{}, {"scale": 0.0625}, {"softcap": 4.0}, {"scale": 1.7, "softcap": 3.0}], ids=str
)
def test_value_and_gradients_against_float64(
    options: dict[str, float], reduction: str, chunk: int | None, labels: Tensor
) -> None:
    given_ = inputs()
    hidden, weight, bias = given_
    loss = linear_cross_entropy(
        hidden, weight, labels, bias=bias, reduction=reduction, chunk=chunk, **options
    )
    loss.backward()

    exact = in_float64(given_)
    expected = whole(*exact, labels, **options, reduction=reduction)
    expected.backward()

    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) <= FLOAT32 * expected.item()
    for found, true in zip(given_, exact, strict=True):
        assert distance(found.grad, true.grad) <= FLOAT32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_errors_are_no_larger_than_those_of_the_whole_logits(
    dtype: torch.dtype, labels: Tensor
) -> None:
    ours, theirs = inputs(dtype), inputs(dtype)
    exact = in_float64(ours)
    whole(*exact, labels).backward()

    loss = linear_cross_entropy(ours[0], ours[1], labels, bias=ours[2], chunk=40)
    loss.backward()
    usual = F.cross_entropy(F.linear(*theirs).float(), labels)
    usual.backward()

    assert loss.dtype == torch.float32
    assert torch.allclose(loss, usual, rtol=1e-5)
    for a, b, true in zip(ours, theirs, exact, strict=True):
        assert a.grad is not None and a.grad.dtype == dtype
        # Rounded are z, its gradient and the product, and here once more the product times the
        # factor of the backward: three roundings of a gradient in place of two.
        assert distance(a.grad, true.grad) <= math.sqrt(3 / 2) * distance(b.grad, true.grad)


def test_the_sums_over_chunks_are_in_float32() -> None:
    # With 150 chunks, a sum in bfloat16 would have an error ten times as large.
    hidden, weight = inputs(torch.bfloat16, bias=False)
    exact = in_float64([hidden, weight])
    whole(*exact, None, LABELS).backward()
    linear_cross_entropy(hidden, weight, LABELS, chunk=1).backward()
    assert distance(weight.grad, exact[1].grad) <= 2**-8


def test_float64_stays_float64(labels: Tensor) -> None:
    given_ = inputs(torch.float64)
    exact = in_float64(given_)
    loss = linear_cross_entropy(given_[0], given_[1], labels, bias=given_[2])
    loss.backward()
    whole(*exact, labels).backward()
    assert loss.dtype == torch.float64
    for found, true in zip(given_, exact, strict=True):
        assert distance(found.grad, true.grad) <= 1e-14


def test_of_two_dtypes_the_product_is_in_the_wider_one(labels: Tensor) -> None:
    hidden, weight = inputs(bias=False)
    narrow = hidden.detach().bfloat16().requires_grad_()
    loss = linear_cross_entropy(narrow, weight, labels)
    loss.backward()
    expected = linear_cross_entropy(narrow.detach().float(), weight.detach(), labels)
    assert torch.equal(loss, expected)
    assert narrow.grad is not None and narrow.grad.dtype == torch.bfloat16


def test_under_autocast_the_products_are_in_its_dtype(labels: Tensor) -> None:
    hidden, weight = inputs(bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    short = [t.detach().bfloat16() for t in (hidden, weight)]
    assert loss.dtype == torch.float32
    assert torch.equal(loss, linear_cross_entropy(*short, labels))
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32


@settings(max_examples=30)
@given(
    shape=st.lists(st.integers(1, 7), min_size=0, max_size=3),
    words=st.integers(1, 40),
    chunk=st.integers(1, 100),
    ignored=st.floats(0, 1),
)
def test_any_shape_and_chunk(shape: list[int], words: int, chunk: int, ignored: float) -> None:
    hidden = gaussian(*shape, 5).requires_grad_()
    weight = gaussian(words, 5).flip(0).requires_grad_()
    random = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    labels = (torch.arange(random.numel()).reshape(shape) % words).where(random >= ignored, -7)

    loss = linear_cross_entropy(
        hidden, weight, labels, ignore_index=-7, reduction="sum", chunk=chunk
    )
    loss.backward()
    found = [hidden.grad, weight.grad]

    hidden.grad = weight.grad = None
    rows, flat = hidden.reshape(-1, 5), labels.reshape(-1)
    expected = F.cross_entropy(rows @ weight.T, flat, ignore_index=-7, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, [hidden.grad, weight.grad], rtol=1e-4, atol=1e-5)


def test_one_loss_per_token(labels: Tensor) -> None:
    hidden, weight = inputs(bias=False)
    weight.requires_grad_(False)
    losses = linear_cross_entropy(
        hidden.view(10, 15, H), weight, labels.view(10, 15), reduction="none"
    )
    share = torch.linspace(0, 1, N).view(10, 15)
    (losses * share).sum().backward()

    rows = hidden.detach().double().requires_grad_()
    expected = whole(rows, weight.double(), None, labels, reduction="none")
    (expected * share.flatten()).sum().backward()
    assert losses.shape == (10, 15) and torch.all(losses.view(-1)[::3] == 0)
    assert distance(losses.flatten(), expected) <= FLOAT32
    assert distance(hidden.grad, rows.grad) <= FLOAT32


def test_tokens_that_are_left_out_never_reach_the_head(labels: Tensor) -> None:
    hidden, weight = inputs(bias=False)
    expected = linear_cross_entropy(hidden, weight, labels)
    poisoned = hidden.detach().clone()
    poisoned[::3] = torch.nan
    poisoned.requires_grad_()
    loss = linear_cross_entropy(poisoned, weight, labels)
    loss.backward()
    assert torch.equal(loss, expected)
    assert poisoned.grad is not None and torch.all(poisoned.grad[::3] == 0)
    assert poisoned.grad.isfinite().all()


def test_with_no_token_at_all() -> None:
    hidden, weight = inputs(bias=False)
    none = torch.full((N,), -100)
    assert linear_cross_entropy(hidden, weight, none, reduction="sum") == 0
    loss = linear_cross_entropy(hidden, weight, none)
    loss.backward()
    # As F.cross_entropy: a mean of nothing, and no gradient.
    assert math.isnan(loss.item()) and math.isnan(whole(hidden, weight, None, none).item())
    for t in (hidden, weight):
        assert t.grad is not None and torch.all(t.grad == 0)


def test_without_gradients_none_is_computed(
    labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight = inputs(bias=False)
    expected = linear_cross_entropy(hidden, weight, labels)

    def fail(*_: Any) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(WeightHead, "backward", fail)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels), expected)
    frozen = linear_cross_entropy(hidden.detach(), weight.detach(), labels)
    assert torch.equal(frozen, expected) and not frozen.requires_grad


def test_the_gradient_of_a_frozen_weight_is_not_computed(labels: Tensor) -> None:
    hidden, weight = inputs(bias=False)
    linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert weight.grad is None and hidden.grad is not None


def test_backward_twice_and_no_second_derivative(labels: Tensor) -> None:
    hidden, weight = inputs(bias=False)
    loss = 3 * linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    once = weight.grad
    assert once is not None
    once = once.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)

    squared = linear_cross_entropy(hidden, weight, labels).square()
    (first,) = torch.autograd.grad(squared, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# Heads that are more than a weight


def lora_head(bias: bool) -> nn.Module:
    head = minilora.inject(nn.Sequential(nn.Linear(H, V, bias=bias)), r=3, targets="0")[0]
    with torch.no_grad():
        head.adapters["default"].B.normal_(generator=torch.Generator().manual_seed(1))
    return head  # type: ignore[no-any-return]


def qlora_head(bias: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(H, V, bias=bias))
    minilora.quantize(model, targets="0")
    minilora.inject(model, r=3, targets="0")
    with torch.no_grad():
        model[0].adapters["default"].B.normal_(generator=torch.Generator().manual_seed(1))
    return model[0]


class Deep(nn.Module):
    """A head of several layers, whose backward needs its own output."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.dense, self.decoder = nn.Linear(H, H), nn.Linear(H, V, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.dense(x).tanh()).tanh()  # type: ignore[no-any-return]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("make", [lora_head, qlora_head, Deep, nn.Linear])
def test_all_parameters_of_a_module_get_their_gradients(
    make: Callable[..., nn.Module], bias: bool, labels: Tensor
) -> None:
    torch.manual_seed(0)
    head = make(H, V, bias=bias) if make is nn.Linear else make(bias)
    hidden = inputs()[0]
    trained = [p for p in head.parameters() if p.requires_grad]
    loss = linear_cross_entropy(hidden, head, labels, chunk=40)
    found = torch.autograd.grad(loss, [hidden, *trained])

    expected = F.cross_entropy(head(hidden), labels)
    exact = torch.autograd.grad(expected, [hidden, *trained])
    torch.testing.assert_close(loss, expected)
    assert len(trained) >= 1 + bias
    for a, b in zip(found, exact, strict=True):
        # Two float32 results; each is as near to the exact one.
        assert distance(a, b.double()) <= 2 * FLOAT32


def test_the_hooks_of_a_head_take_part(labels: Tensor) -> None:
    hidden, weight = inputs(bias=False)
    head = nn.Linear(H, V, bias=False)
    head.weight = nn.Parameter(weight.detach())
    rows: list[int] = []
    head.register_forward_hook(lambda _, args, out: rows.append(len(out)) or 0.5 * out)
    loss = linear_cross_entropy(hidden, head, labels, chunk=30)
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, labels, scale=0.5))
    assert sum(rows) == 100 and max(rows) <= 30


def test_a_weight_in_4_bits(labels: Tensor) -> None:
    hidden, weight, bias = inputs()
    packed = minilora.quantize_nf4(weight.detach())
    loss = linear_cross_entropy(hidden, packed, labels, bias=bias)
    found = torch.autograd.grad(loss, [hidden, bias])
    expected = whole(hidden, packed.dequantize(), bias, labels)
    torch.testing.assert_close(loss, expected)
    exact = torch.autograd.grad(expected, [hidden, bias])
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-7)


def test_a_head_that_detaches_its_output_gives_no_gradient(labels: Tensor) -> None:
    head = nn.Linear(H, V)
    head.register_forward_hook(lambda _, args, out: out.detach())
    assert not linear_cross_entropy(inputs()[0], head, labels).requires_grad


# torch.compile


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_a_weight_compiles_to_one_graph(labels: Tensor) -> None:
    hidden, weight, bias = inputs()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return 2 * linear_cross_entropy(hidden, weight, labels, bias=bias, chunk=40)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(hidden, weight, bias), [hidden, weight, bias])
    expected = torch.autograd.grad(loss(hidden, weight, bias), [hidden, weight, bias])
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # after a break of the graph
def test_a_module_breaks_the_graph_and_says_so(labels: Tensor) -> None:
    head, hidden = lora_head(False), inputs()[0]

    def loss(hidden: Tensor) -> Tensor:
        return 2 * linear_cross_entropy(hidden, head, labels)

    with pytest.raises(Exception, match="calls an output head chunk by chunk"):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(hidden)
    found = torch.compile(loss, backend="aot_eager")(hidden)
    torch.testing.assert_close(found, loss(hidden))


# Memory


@pytest.mark.parametrize("through", ["weight", "module"])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(through: str) -> None:
    tokens, words, chunk = 600, 5000, 25
    hidden = gaussian(tokens, 8).requires_grad_()
    weight = gaussian(words, 8)
    layer = nn.Sequential(nn.Linear(8, words, bias=False))
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                largest = max(largest, t.numel() if isinstance(t, Tensor) else 0)
            return out

    labels = torch.arange(tokens)
    with Sizes():
        if through == "module":
            linear_cross_entropy(hidden, layer, labels, chunk=chunk).backward()
        else:
            # What the operator runs, into which a mode cannot look.
            function = cross_entropy._weight_losses._init_fn
            with torch.no_grad():
                function(hidden, weight, None, labels, [True, False, False], -100, 1.0, None, chunk)
    assert 0 < largest <= chunk * words


def test_the_chunk_has_few_logits_and_not_too_few_tokens() -> None:
    weights = [torch.empty(V, 1, device="meta") for V in (1, 32_000, 49_152, 262_144, 10**8)]
    assert [cross_entropy._default_chunk(w) for w in weights] == [512, 512, 341, 64, 64]
    modules = (lora_head(False), nn.Linear(1, 49_152, device="meta"), Deep(False))
    assert [cross_entropy._default_chunk(m) for m in modules] == [512, 341, 512]


# What is refused, and what is not


class Returning(nn.Module):
    """A head that changes its logits."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(x.new_ones(len(x), V))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_rows_or_features_it_is_what_pytorch_says(reduction: str) -> None:
    weight = gaussian(V, H)
    for rows, features in ((0, H), (5, 0), (0, 0)):
        hidden, W, labels = torch.ones(rows, features), weight[:, :features], LABELS[:rows]
        loss = linear_cross_entropy(hidden, W, labels, reduction=reduction)
        expected = F.cross_entropy(hidden @ W.T, labels, reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["hidden", "bias", "bias of a label"])
def test_nan_and_infinity_come_out_as_of_pytorch(value: float, where: str) -> None:
    hidden, weight, bias = (t.detach() for t in inputs())
    if where == "hidden":
        hidden[3, 5] = value
    else:
        bias[LABELS[4] if where == "bias of a label" else V - 1] = value
    hidden.requires_grad_()
    losses = linear_cross_entropy(hidden, weight, LABELS, bias=bias, reduction="none")
    (found,) = torch.autograd.grad(losses.sum(), hidden)
    usual = F.cross_entropy(F.linear(hidden, weight, bias), LABELS, reduction="none")
    (expected,) = torch.autograd.grad(usual.sum(), hidden)
    torch.testing.assert_close(losses, usual, equal_nan=True)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_single_losses_of_a_trained_head_are_refused_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cross_entropy, "losses_in_chunks", lambda *_: pytest.fail("computed"))
    for weight in (inputs()[1], lora_head(False)):
        with pytest.raises(ValueError, match="or freeze the head"):
            linear_cross_entropy(inputs()[0], weight, LABELS, reduction="none")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(N, H, dtype=torch.int64)}, TypeError, "hidden is torch.int64"),
        ({"hidden": [[0.0] * H]}, TypeError, "hidden is a list: it must be a tensor"),
        ({"labels": None}, TypeError, "labels is a NoneType: it must be a tensor"),
        ({"labels": torch.zeros(N)}, TypeError, "labels are torch.float32"),
        ({"labels": LABELS.int()}, TypeError, r"labels are torch.int32.*labels\.long\(\)"),
        ({"labels": LABELS.to("meta")}, ValueError, "labels on meta, hidden on cpu"),
        ({"labels": LABELS[1:]}, ValueError, r"labels \(149,\) do not fit hidden \(150, 44\)"),
        ({"weight": torch.zeros(V, 7)}, ValueError, r"does not fit weight \(1003, 7\)"),
        ({"weight": torch.zeros(V, H).int()}, TypeError, "weight is torch.int32"),
        ({"weight": lambda x: x}, TypeError, "weight is a function"),
        ({"weight": nn.Linear(7, V)}, ValueError, r"does not fit weight \(1003, 7\)"),
        # The kernel would read through its pointer, which is none.
        ({"weight": torch.zeros(V, H, device="meta")}, ValueError, "weight on meta, hidden on cpu"),
        ({"bias": [0.0] * V}, TypeError, "bias is a list"),
        ({"bias": torch.zeros(V).long()}, TypeError, "bias is torch.int64"),
        ({"bias": torch.zeros(V, device="meta")}, ValueError, "bias on meta, hidden on cpu"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias \(7,\) must be \[V\] = \[1003\]"),
        ({"weight": nn.Linear(H, V), "bias": torch.zeros(V)}, ValueError, "has its own"),
        ({"reduction": "max"}, ValueError, "reduction='max'.* mean, sum, none"),
        ({"reduction": "none"}, ValueError, "is a sum over tokens"),
        ({"softcap": 0.0}, ValueError, r"softcap=0\.0"),
        ({"softcap": math.inf}, ValueError, "softcap=inf: must be a positive number"),
        ({"softcap": "30"}, ValueError, "softcap='30'"),
        ({"scale": math.nan}, ValueError, "scale=nan: must be a finite number"),
        ({"scale": None}, ValueError, "scale=None"),
        ({"chunk": 0}, ValueError, "chunk=0"),
        ({"chunk": 1.5}, ValueError, r"chunk=1\.5: must be a whole number"),
        ({"chunk": 2**63}, ValueError, "chunk=9223372036854775808"),
        ({"ignore_index": None}, ValueError, "ignore_index=None"),
        ({"ignore_index": 2**63}, ValueError, "whole number of 64 bits"),
        ({"weight": Returning(lambda z: (z,))}, TypeError, "Returning returned tuple"),
        ({"weight": Returning(Tensor.int)}, TypeError, "Returning returned torch.int32"),
        ({"weight": Returning(Tensor.sum)}, ValueError, r"returned \(\) for \(150, 44\)"),
        ({"weight": Returning(lambda z: z[1:])}, ValueError, r"logits \[n, V\] = \[150, V\]"),
        (
            {"labels": torch.full((N,), V)},
            ValueError,
            "label 1003 is outside the vocabulary of 1003",
        ),
        ({"labels": LABELS - 1}, ValueError, "label -1 is outside"),
        ({"labels": LABELS - 1, "weight": lora_head(True)}, ValueError, "label -1 is outside"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    hidden, weight = inputs(bias=False)
    arguments = {"hidden": hidden, "weight": weight, "labels": LABELS}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments | change)
