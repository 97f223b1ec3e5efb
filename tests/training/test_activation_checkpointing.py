"""Gradient checkpointing in training: bit-identical results, fewer bytes saved for the backward."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from made_up import random_examples
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import minilora
from minilora.huggingface.activation_checkpointing import gradient_checkpointing
from minilora.training import FinetuneConfig
from minilora.training.batches import collate
from minilora.training.loop import train
from minilora.training.loss import token_losses

EXAMPLES = random_examples([40, 39, 38, 37, 36, 35, 34, 33])
CONFIG = FinetuneConfig("m", "d", "o", steps=3, batch_size=2, grad_accum=2, lr=1e-2)


def adapted(model: Any, *, quantize: bool = True, dropout: float = 0.0) -> Any:
    """With adapters whose B is not zero: at zero, A's gradient would be zero too."""
    torch.manual_seed(0)
    if quantize:
        minilora.quantize(model)
    minilora.inject(model, r=4, dropout=dropout)
    for p in minilora.adapter_parameters(model):
        nn.init.normal_(p, std=0.1)
    return model.train()


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_gradients_and_random_states_are_bit_identical(
    quantize: bool, dropout: float, dtype: torch.dtype, tiny_llama: Any
) -> None:
    def outcome(checkpointing: bool) -> tuple[list[Tensor], list[Tensor]]:
        model = adapted(tiny_llama().to(dtype), quantize=quantize, dropout=dropout)
        with gradient_checkpointing(model) if checkpointing else nullcontext():
            loss = token_losses(model, collate(EXAMPLES, 0))
            loss.backward()
            gradients = [p.grad.clone() for p in minilora.adapter_parameters(model)]
            after_one = torch.get_rng_state()
            model.zero_grad()
            steps = list(train(model, EXAMPLES, CONFIG, pad=0))

        metrics = torch.tensor([(s.loss, s.grad_norm) for s in steps])
        parameters = minilora.adapter_parameters(model)
        rest = [loss.detach(), after_one, metrics, *parameters, torch.get_rng_state()]
        return gradients, rest

    (expected, rest), (found, rest_found) = outcome(False), outcome(True)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert len(rest_found) == len(rest) and all(map(torch.equal, rest_found, rest))

    # Those of the first layer too.
    assert all(bool(gradient.any()) for gradient in expected)


def test_fewer_bytes_are_saved_for_the_backward(tiny_llama: Any) -> None:
    def bytes_saved(model: Any) -> int:
        storages: dict[int, int] = {}
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            loss = token_losses(model, collate(EXAMPLES, 0))

        # Everything that was saved is alive until here: no address is counted for two tensors.
        assert loss.requires_grad
        return sum(storages.values())

    model = adapted(tiny_llama())
    everything = bytes_saved(model)
    with gradient_checkpointing(model):
        inputs_alone = bytes_saved(model)

    # The input of each of two blocks: batch, length, width, float32. The hooks did see them.
    assert inputs_alone >= 2 * (8 * 40 * 64 * 4)
    assert inputs_alone < everything / 3


def test_the_model_is_as_it_was_afterwards_and_nothing_is_cast(tiny_llama: Any) -> None:
    model = adapted(tiny_llama().to(torch.bfloat16))

    def parameters_and_hooks() -> tuple[Any, ...]:
        parameters = [(n, p.dtype, p.requires_grad) for n, p in model.named_parameters()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        return parameters, hooks

    def is_on() -> bool:
        return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())

    before, cache = parameters_and_hooks(), model.config.use_cache
    with gradient_checkpointing(model):
        # No hook that makes the embeddings need a gradient: torch.compile cannot trace it.
        assert is_on() and parameters_and_hooks() == before
    assert not is_on() and parameters_and_hooks() == before
    assert model.config.use_cache == cache


def test_a_model_that_has_none_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    message = "Sequential does not support gradient checkpointing: "
    with pytest.raises(ValueError, match=message), gradient_checkpointing(model):
        pass
