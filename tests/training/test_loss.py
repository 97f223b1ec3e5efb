"""The loss on the learned tokens: against the full logits, and independent of the batch."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES
from made_up import random_examples

from minilora.training.batches import collate
from minilora.training.data import IGNORE
from minilora.training.loss import evaluate, explain_loss, token_losses


def test_the_head_sees_the_learned_tokens_alone_and_the_loss_is_the_same(tiny_llama: Any) -> None:
    model = tiny_llama().eval()
    batch = collate(random_examples([9, 4, 13]), 0)
    labels = batch["labels"][:, 1:]
    assert explain_loss(model) is None

    rows: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda _, args, out: rows.append(out.shape[0]))
    loss = token_losses(model, batch)
    handle.remove()
    assert rows == [int((labels != IGNORE).sum())]
    torch.testing.assert_close(loss, full_loss(model, batch), rtol=1e-6, atol=0)


def full_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits, labels = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


@pytest.mark.parametrize("other_terms", [True, False])
def test_a_model_without_an_output_head_has_the_same_loss(
    other_terms: bool, tiny_llama: Any, monkeypatch: Any
) -> None:
    model = tiny_llama().eval()
    batch = collate(random_examples([9, 4, 13]), 0)
    expected = token_losses(model, batch)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    found = token_losses(model, batch, other_terms=other_terms)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_whatever_a_batch_holds_is_passed_to_the_model(tiny_llama: Any) -> None:
    model = tiny_llama().eval()
    model.config.use_cache = False
    one, two = random_examples([9, 5])
    apart = token_losses(model, collate([one], 0)) + token_losses(model, collate([two], 0))

    # Two examples in a row, as their positions say.
    packed = {
        "input_ids": torch.tensor([[*one.ids, *two.ids]]),
        "position_ids": torch.tensor([[*range(9), *range(5)]]),
        "labels": torch.tensor([[IGNORE, *one.labels[1:], IGNORE, *two.labels[1:]]]),
    }
    torch.testing.assert_close(token_losses(model, packed), apart, rtol=1e-5, atol=0)


def test_the_routers_term_is_trained_and_no_part_of_an_evaluation() -> None:
    transformers = pytest.importorskip("transformers")
    asked = {"output_router_logits": True, "vocab_size": 128}
    options = ARCHITECTURES["MixtralForCausalLM"].options | asked
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**options)).eval()
    examples = random_examples([9, 4, 13])
    batch = collate(examples, 0)
    learned = int((batch["labels"][:, 1:] != IGNORE).sum())

    assert "add a term of its router" in str(explain_loss(model))
    own = model(**batch).loss * learned
    torch.testing.assert_close(token_losses(model, batch), own, rtol=1e-6, atol=0)

    alone = token_losses(model, batch, other_terms=False)
    torch.testing.assert_close(alone, full_loss(model, batch), rtol=1e-6, atol=0)
    assert own > alone * (1 + 1e-5)
    assert evaluate(model, examples) == pytest.approx(alone.item() / learned, rel=1e-6)


def test_the_evaluation_does_not_depend_on_the_batch(tiny_llama: Any) -> None:
    model = tiny_llama().train()
    data = random_examples([9, 4, 13, 6, 20])
    one, many = evaluate(model, data, batch_size=1), evaluate(model, data, batch_size=5)
    assert math.isclose(one, many, rel_tol=1e-5) and model.training
