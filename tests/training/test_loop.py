"""The training loop: accumulation, and a loss that is not finite."""

import math
from typing import Any

import pytest
import torch
from made_up import random_examples
from torch import Tensor, nn

import minilora
from minilora.training import FinetuneConfig, loop
from minilora.training.loop import schedule, train


def test_accumulation_weighs_every_learned_token_alike(tiny_llama: Any) -> None:
    """Batches of 8 x 1, 4 x 2 and 2 x 4 give one gradient.

    Their micro-batches hold different numbers of learned tokens.
    """
    found = []
    for size, accum in ((8, 1), (4, 2), (2, 4)):
        model = minilora.inject(tiny_llama(), r=4)
        for p in minilora.adapter_parameters(model):
            generator = torch.Generator().manual_seed(p.numel())
            p.data.normal_(std=0.1, generator=generator)
        config = FinetuneConfig("m", "d", "o", steps=1, batch_size=size, grad_accum=accum, clip=1e9)
        found.append(next(train(model, random_examples([3, 30, 5, 17] * 2), config, pad=0)))

    # float32 sums in another order: of the order of 2^-24 times the number of terms, about 100.
    assert all(math.isclose(s.loss, found[0].loss, rel_tol=1e-5) for s in found)
    assert all(math.isclose(s.grad_norm, found[0].grad_norm, rel_tol=1e-5) for s in found)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = minilora.inject(tiny_llama(), r=2)
    parameters = minilora.adapter_parameters(model)
    before = [p.clone() for p in parameters]

    def nan_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return sum(p.sum() for p in parameters) * math.nan

    monkeypatch.setattr(loop, "token_losses", nan_loss)
    config = FinetuneConfig("m", "d", "o", steps=1, batch_size=2)
    message = r"step 1: the loss is nan.*parameters are those after step 0"
    with pytest.raises(FloatingPointError, match=message):
        next(train(model, random_examples([5, 6]), config, pad=0))
    assert all(p.equal(q) for p, q in zip(before, parameters, strict=True))


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and max(rates) == 1.0
    assert rates[3:] == sorted(rates[3:], reverse=True) and 0 < rates[-1] < 1e-3
    assert schedule(100, 100) == pytest.approx(0.0, abs=1e-12)


class Reads(nn.Module):
    """Calls a layer for the first token, and reads its weight for the rest."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.read = nn.Linear(64, 64, bias=False)

    def forward(self, **inputs: Any) -> Any:
        embeddings = self.model.get_input_embeddings()(inputs.pop("input_ids"))
        first, rest = self.read(embeddings[:, :1]), embeddings[:, 1:] @ self.read.weight.T
        return self.model(inputs_embeds=torch.cat([first, rest], dim=1), **inputs)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_weight_that_the_model_reads_itself_is_named_in_the_first_step(
    quantized: bool, tiny_llama: Any
) -> None:
    """It is called too, so that its adapter has a gradient: that of a part of the data."""
    model = Reads(tiny_llama())
    if quantized:
        minilora.quantize(model, targets="read")
    minilora.inject(model, r=2, targets=["read", "q_proj"])
    before = [p.clone() for p in minilora.adapter_parameters(model)]
    config = FinetuneConfig("m", "d", "o", steps=1, batch_size=2)
    with pytest.raises(TypeError, match=r"Reads reads the weight of read.*exclude=\('read',\)"):
        next(train(model, random_examples([5, 6]), config, pad=0))
    assert all(p.equal(q) for p, q in zip(before, minilora.adapter_parameters(model), strict=True))
