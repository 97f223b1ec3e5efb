"""Tiny models that generate, and what is compared of them, for the tests of decoding as a graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import architectures
import torch
from helpers import randomize
from torch import Tensor, nn

import minilora

IDS = torch.tensor([[0, 0, *range(17, 31, 2)], [*range(11, 38, 3)]])
PROMPTS = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
ANSWER = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def tiny(name: str = "LlamaForCausalLM", quantized: bool = False) -> Any:
    model, _ = architectures.tiny_model(name)
    if quantized:
        minilora.quantize(model)
        minilora.inject(model, r=4)
        randomize(model, "default", size=0.3)
    return model.eval()


def generated(model: Any, **options: Any) -> Any:
    """What transformers' own generation returns of every step."""
    told = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    return model.generate(**PROMPTS, **ANSWER, **told, **options)


def logits(model: Any, **options: Any) -> Tensor:
    """The logits of every new token, [9, 2, V]."""
    steps = torch.stack(generated(model, **options).logits)
    # A step that was repeated with the values of another would show.
    assert (steps[1:] != steps[:-1]).flatten(1).any(1).all()
    return steps


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = {name: id(value) for name, value in vars(model).items()}
    yield
    assert {name: id(value) for name, value in vars(model).items()} == before
