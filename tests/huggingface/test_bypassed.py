"""A layer whose weight a model reads without calling the layer is named before any training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize, same_bits
from torch import Tensor, nn

import minilora
from minilora.huggingface.bypassed import refuse_bypassed

X = torch.linspace(-1, 1, 24).reshape(3, 8)

# Ways to use the values of a weight [8, 8] of the layer `a`.
READS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "F.linear": lambda a, x: F.linear(x, a.weight, a.bias),
    "x @ W.T": lambda a, x: x @ a.weight.T,
    "x @ W.t()": lambda a, x: x @ a.weight.t(),
    "W @ x": lambda a, x: (a.weight @ x.T).T,
    "einsum": lambda a, x: torch.einsum("oi,bi->bo", a.weight, x),
    "keyword": lambda a, x: F.linear(input=x, weight=a.weight),
    "after a conversion": lambda a, x: F.linear(x.double(), a.weight.double()).float(),
    "to": lambda a, x: F.linear(x.to(torch.bfloat16), a.weight.to(torch.bfloat16)).float(),
    "in a list": lambda a, x: torch.cat([x, a.weight])[: len(x)],
    "a product in place": lambda a, x: x * a.weight.detach().mul(2).sum(),
    "a part of it": lambda a, x: x * a.weight[0, 0],
    "data": lambda a, x: x @ a.weight.data,
}
# What takes no values, or takes them while the layer runs.
HARMLESS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a call": lambda a, x: a(x),
    "two calls": lambda a, x: a(a(x)),
    "dtype and device": lambda a, x: a(x.to(a.weight.dtype).to(a.weight.device)),
    "shape": lambda a, x: a(x) * a.weight.shape[0] * a.weight.dtype.itemsize,
    "like": lambda a, x: a(x) + torch.zeros_like(a.weight)[: len(x)] + a.weight.new_zeros(8),
    "x.to(W)": lambda a, x: a(x.to(a.weight)) + x.type_as(a.weight),
    "a conversion alone": lambda a, x: a.to(torch.float32)(x),
    "numel": lambda a, x: a(x) / a.weight.numel(),
    "sizes": lambda a, x: a(x) / a.weight.dim() / a.weight.size(0) * a.weight.is_contiguous(),
}


class Reader(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block["b"](self.use(self.block["a"], x))
        return y


@pytest.mark.parametrize("case", READS)
def test_a_read_is_named_with_its_way_out(case: str) -> None:
    model = minilora.inject(Reader(READS[case]), r=2)
    with (
        pytest.raises(TypeError, match=r"Reader reads the weight of block\.a .*exclude=\('a',\)"),
        refuse_bypassed(model),
    ):
        model(X)
    minilora.eject(model)
    minilora.inject(model, r=2, exclude=["a"])
    with refuse_bypassed(model):
        model(X)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("case", HARMLESS)
def test_what_reads_no_values_is_let_through(case: str, quantized: bool) -> None:
    if quantized and case in ("like", "x.to(W)", "sizes"):
        pytest.skip("a 4-bit weight is no tensor and has no such method")
    model = Reader(HARMLESS[case])
    if quantized:
        minilora.quantize(model)
    randomize(minilora.inject(model, r=2))
    expected = model(X)
    with refuse_bypassed(model):
        found = model(X)
    assert same_bits(found, expected)


@pytest.mark.parametrize("case", ["F.linear", "x @ W.T", "x @ W.t()", "W @ x"])
def test_a_read_of_a_quantized_weight_is_named(case: str) -> None:
    model = minilora.quantize(Reader(READS[case]))
    with (
        pytest.raises(TypeError, match=r"the weight of block\.a without calling"),
        refuse_bypassed(model),
    ):
        model(X)


def test_other_errors_are_not_changed() -> None:
    def wrong(a: Any, x: Tensor) -> Tensor:
        raise TypeError("something else")

    for error, use in ((TypeError, wrong), (RuntimeError, lambda a, x: a(x[:, :3]))):
        model = minilora.inject(Reader(use), r=2)
        with pytest.raises(error) as found, refuse_bypassed(model):
            model(X)
        assert "reads the weight" not in str(found.value)


def test_nothing_is_left_behind() -> None:
    model = minilora.inject(Reader(READS["F.linear"]), r=2)
    with pytest.raises(TypeError), refuse_bypassed(model):
        model(X)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    model(X)


class Many(nn.Module):
    """Reads `value` and calls `key`, in blocks; one more layer called `value` is called."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"mix": nn.ModuleDict({"value": nn.Linear(8, 8), "key": nn.Linear(8, 8)})}
            )
            for _ in range(10)
        )
        self.value = nn.Linear(8, 8)
        self.embedding = nn.Embedding(8, 8)
        if tied:
            self.value.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            mix: Any = block["mix"]
            x = mix["key"](F.linear(x, mix["value"].weight))
        y: Tensor = self.value(x + self.embedding(torch.arange(3)))
        return y


def test_the_way_out_leaves_out_no_layer_that_is_called() -> None:
    model = minilora.inject(Many(), r=2)
    with pytest.raises(TypeError) as found, refuse_bypassed(model):
        model(X)
    assert "exclude=('mix.value',)" in str(found.value)
    assert "blocks.7.mix.value and 2 more" in str(found.value)
    minilora.eject(model)
    minilora.inject(model, r=2, exclude=["mix.value"])
    assert "value" in {
        name for name, m in model.named_modules() if isinstance(m, minilora.LoRALinear)
    }
    with refuse_bypassed(model):
        model(X)


def test_an_embedding_that_is_tied_to_an_adapted_head_is_no_read_of_it() -> None:
    model = minilora.inject(Many(tied=True), r=2, targets=["value"], exclude=["mix.value"])
    with refuse_bypassed(model):
        model(X)


def test_under_checkpointing_the_recomputed_calls_are_calls() -> None:
    from torch.utils.checkpoint import checkpoint

    model = minilora.inject(
        Reader(lambda a, x: checkpoint(a, x, use_reentrant=False)),
        r=2,  # type: ignore[arg-type]
    )
    with refuse_bypassed(model):
        model(X).sum().backward()
    assert minilora.audit(model) == []
