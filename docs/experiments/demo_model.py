"""The demo's model, SmolLM2-135M-Instruct, and the demo's two tasks, in fewer steps."""

from collections.abc import Sequence
from typing import Any

import torch

import minilora
from minilora.demo.tasks import make_task
from minilora.huggingface import efficient_training, load_dense
from minilora.training.batches import collate
from minilora.training.data import Example, encode_records
from minilora.training.loss import evaluate

STEPS, BATCH, LR, HELD_OUT = 36, 4, 1e-3, 24


def load() -> tuple[Any, Any]:
    """The model in bfloat16, as it is distributed, and its tokenizer."""
    return load_dense("smollm2")


def examples(tokenizer: Any, task: str, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, hold-out) of a task of the demo, made or split with the seed."""
    found = make_task(task, seed)

    def encoded(records: Sequence[Any]) -> list[Example]:
        named = [(f"record {i}", record) for i, record in enumerate(records)]
        return encode_records(named, tokenizer, 512)

    return encoded(found.training), encoded(found.held_out[:HELD_OUT])


def hold_out_loss(model: Any, rows: list[Example]) -> float:
    """In nats per completion token."""
    return evaluate(model, rows, batch_size=8)


def fine_tune(
    model: Any, rows: list[Example], r: int, seed: int, steps: int = STEPS, lr: float = LR
) -> None:
    """Adapters of rank r on all linear layers; AdamW, three steps of warm-up, linear decay."""
    minilora.inject(model, r=r, seed=seed)
    optimizer = torch.optim.AdamW(minilora.adapter_parameters(model), lr=lr, weight_decay=0.0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    with efficient_training(model.train()):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 3) * (1 - step / steps)
            picked = order[BATCH * step : BATCH * (step + 1)]
            loss = model(**collate([rows[i] for i in picked], pad_id=0)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(minilora.adapter_parameters(model)), 1.0)
            optimizer.step()
            optimizer.zero_grad()
