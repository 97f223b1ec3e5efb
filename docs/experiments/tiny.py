r"""A tiny Llama that knows facts, more facts to learn, and the training loop of the experiments.

A fact is a key of two letters and a code of four letters, all drawn at random:

    k1 k2 -> c1 c2 c3 c4        k in 0 ... 31    c in 32 ... 63    1,024 keys

Nothing in a fact follows from another one, so each has to be stored: 4 log2(32) = 20 bits. A model
that knows none has a loss of ln 32 = 3.47 nats per letter of the code. The base is trained from
scratch on 512 facts until it knows them by heart; adapters then learn others. All is float32.
"""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minilora
from minilora.lora import LoRA

LETTERS = 32
KNOWN, NEW = 512, 256
WIDTH, LAYERS = 128, 2
UNKNOWN = math.log(LETTERS)


def new_model(seed: int) -> Any:
    """A Llama of two layers and 345,000 weights, drawn from the seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=2 * LETTERS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def facts(seed: int, short: bool = False) -> tuple[Tensor, Tensor]:
    """Facts that the base knows [512, 6], and facts to learn [256, 6]; no key is in both.

    An eighth of them if `short`.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randperm(LETTERS**2, generator=generator)
    codes = LETTERS + torch.randint(0, LETTERS, (LETTERS**2, 4), generator=generator)
    rows = torch.cat([torch.stack([keys // LETTERS, keys % LETTERS], 1), codes], 1)
    known, new = rows[:KNOWN], rows[KNOWN : KNOWN + NEW]
    return (known[: KNOWN // 8], new[: NEW // 8]) if short else (known, new)


def loss_of(model: Any, rows: Tensor) -> Tensor:
    """The mean loss of the four letters of the codes, in nats."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 2:].flatten())


@torch.no_grad()
def measure(model: Any, rows: Tensor) -> float:
    return loss_of(model.eval(), rows).item()


def train(
    model: Any,
    parameters: Iterable[nn.Parameter],
    rows: Tensor,
    steps: int,
    lr: float,
    seed: int,
    batch: int = 64,
) -> None:
    """AdamW without weight decay; ten steps of warm-up, then linear decay to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        rate = lr * min(1.0, (step + 1) / 10) * (1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, rows[torch.randint(0, len(rows), (batch,), generator=generator)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make_base(seed: int, short: bool = False) -> Any:
    """A model that knows the first facts of the seed."""
    model = new_model(seed)
    steps = 2 if short else 400
    train(model, model.parameters(), facts(seed)[0], steps, lr=3e-3, seed=seed)
    return model


def fine_tuned(
    base: Any, rows: Tensor, steps: int, lr: float, seed: int, r: int | None, **options: Any
) -> Any:
    """A copy of the base, trained on the rows: with adapters of rank r, or all of it (None)."""
    model = copy.deepcopy(base)
    if r is None:
        parameters = list(model.parameters())
    else:
        minilora.inject(model, r=r, seed=seed, **options)
        parameters = list(minilora.adapter_parameters(model))
    train(model, parameters, rows, steps, lr, seed)
    return model


class PaperLoRA(LoRA):
    r"""LoRA that starts as in the papers on learning rates: A uniform in +-1/sqrt(in_features).

    minilora's own start has the standard deviation 1/r, which falls with the rank; a paper about
    what the rank changes has to have a start that does not.
    """

    def reset_parameters(self) -> None:
        super().reset_parameters()
        generator = torch.Generator().manual_seed(self.seed)
        bound = self.A.shape[1] ** -0.5
        with torch.no_grad():
            self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
