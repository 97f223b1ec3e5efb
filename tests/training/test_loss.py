"""The loss on the learned tokens: against the full logits, and independent of the batch."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from made_up import random_examples

from minilora.training.batches import collate
from minilora.training.data import IGNORE
from minilora.training.loss import evaluate, token_losses


def test_the_head_sees_the_learned_tokens_alone_and_the_loss_is_the_same(tiny_llama: Any) -> None:
    model = tiny_llama().eval()
    batch = collate(random_examples([9, 4, 13]), 0)
    labels = batch["labels"][:, 1:]

    rows: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda _, args, out: rows.append(out.shape[0]))
    loss = token_losses(model, batch)
    handle.remove()
    assert rows == [int((labels != IGNORE).sum())]

    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits = model(**inputs).logits[:, :-1]
    full = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, full, rtol=1e-5, atol=0)


def test_a_model_without_an_output_head_has_the_same_loss(
    tiny_llama: Any, monkeypatch: Any
) -> None:
    model = tiny_llama().eval()
    batch = collate(random_examples([9, 4, 13]), 0)
    expected = token_losses(model, batch)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    torch.testing.assert_close(token_losses(model, batch), expected, rtol=1e-5, atol=0)


def test_the_evaluation_does_not_depend_on_the_batch(tiny_llama: Any) -> None:
    model = tiny_llama().train()
    data = random_examples([9, 4, 13, 6, 20])
    one, many = evaluate(model, data, batch_size=1), evaluate(model, data, batch_size=5)
    assert math.isclose(one, many, rel_tol=1e-5) and model.training
