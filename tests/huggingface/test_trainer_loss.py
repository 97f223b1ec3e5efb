"""ChunkedLoss under transformers' Trainer: the same training as with the model's own loss."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from trainers import arguments, checkpointing, losses, rows, trainable

import minilora
from minilora.huggingface.trainer import AdapterCheckpoints
from minilora.huggingface.trainer_loss import ChunkedLoss

transformers = pytest.importorskip("transformers")

Make = Callable[..., Any]


def trainer_of(model: Any, folder: Path, *mixins: type, **options: Any) -> Any:
    """A Trainer with these mixins, whose losses are logged at every step."""
    more = {k: options.pop(k) for k in ("compute_metrics", "compute_loss_func") if k in options}
    kind = type("Trained", (*mixins, transformers.Trainer), {})
    args = arguments(folder, logging_strategy="steps", logging_steps=1, **options)
    data = rows()
    for i, row in enumerate(data):
        # Not as many learned tokens in each.
        row["labels"] = [-100] * (i % 7) + row["labels"][i % 7 :]
    return kind(model=model, args=args, train_dataset=data, eval_dataset=data[:5], **more)


def adapted(tiny_llama: Make, targets: Any = ("q_proj", "down_proj", "lm_head")) -> Any:
    return minilora.inject(tiny_llama(), r=4, targets=list(targets))


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 3}, checkpointing()], ids=str
)
def test_the_training_is_that_with_the_models_own_loss(
    options: dict[str, Any], tiny_llama: Make, tmp_path: Path
) -> None:
    usual = trainer_of(adapted(tiny_llama), tmp_path, AdapterCheckpoints, **options)
    chunked = trainer_of(adapted(tiny_llama), tmp_path, AdapterCheckpoints, ChunkedLoss, **options)
    usual.train()
    rows_seen: list[int] = []
    chunked.model.lm_head.register_forward_hook(lambda _, args, out: rows_seen.append(out.dim()))
    chunked.train()

    assert losses(chunked) == pytest.approx(losses(usual), rel=1e-5)
    found, expected = trainable(chunked.model), trainable(usual.model)
    assert any("lm_head" in name for name in found)
    for name, tensor in found.items():
        # AdamW divides by a root of the gradient's square: small gradients are as good as large.
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    # [batch, length, V] in the one run of the whole model that looks at the head alone.
    assert rows_seen.count(3) == 1 and rows_seen.count(2) >= 4


def test_an_evaluation_holds_no_logits_unless_they_are_asked_for(
    tiny_llama: Make, tmp_path: Path
) -> None:
    usual = trainer_of(adapted(tiny_llama), tmp_path)
    chunked = trainer_of(adapted(tiny_llama), tmp_path, ChunkedLoss)
    expected = usual.evaluate()["eval_loss"]
    seen: list[int] = []
    chunked.evaluate()
    chunked.model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.dim()))
    assert chunked.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert set(seen) == {2}

    shapes: list[tuple[int, ...]] = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {}

    measured = trainer_of(adapted(tiny_llama), tmp_path, ChunkedLoss, compute_metrics=metrics)
    assert measured.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert shapes == [(5, 10, 128)]


@pytest.mark.filterwarnings("ignore:.* of the parameters are matrices outside:UserWarning")
def test_a_model_with_a_router_keeps_its_own_loss_and_is_warned_about(tmp_path: Path) -> None:
    options = ARCHITECTURES["MixtralForCausalLM"].options | {"vocab_size": 128}
    config = transformers.MixtralConfig(**options, output_router_logits=True)

    def model() -> Any:
        torch.manual_seed(0)
        return minilora.inject(transformers.MixtralForCausalLM(config), r=4)

    usual, chunked = trainer_of(model(), tmp_path), trainer_of(model(), tmp_path, ChunkedLoss)
    usual.train()
    with pytest.warns(UserWarning, match="MixtralForCausalLM computes its own loss") as caught:
        chunked.train()
    assert len([w for w in caught if "its own loss" in str(w.message)]) == 1
    assert losses(chunked) == losses(usual)


def test_a_loss_of_the_trainers_own_is_refused(tiny_llama: Make, tmp_path: Path) -> None:
    class Doubled(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(*args, **kwargs)

    class Trained(ChunkedLoss, Doubled):
        pass

    with pytest.raises(TypeError, match=r"replace Doubled\.compute_loss: leave ChunkedLoss out"):
        Trained(model=adapted(tiny_llama), args=arguments(tmp_path))
    with pytest.raises(ValueError, match="label_smoothing_factor need all logits"):
        trainer_of(adapted(tiny_llama), tmp_path, ChunkedLoss, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="compute_loss_func"):
        trainer_of(adapted(tiny_llama), tmp_path, ChunkedLoss, compute_loss_func=print)


def test_sft_trainer_has_a_loss_of_its_own() -> None:
    trl = pytest.importorskip("trl", reason="the trainer is TRL's")
    with pytest.raises(TypeError, match=r"replace SFTTrainer\.compute_loss"):
        type("Trained", (ChunkedLoss, trl.SFTTrainer), {})()


def test_labels_that_are_all_ignored_do_no_harm(tiny_llama: Make, tmp_path: Path) -> None:
    trainer = trainer_of(adapted(tiny_llama), tmp_path, ChunkedLoss, max_steps=1)
    for row in trainer.train_dataset:
        row["labels"] = [-100] * 10
    trainer.train()
    assert all(not t.isnan().any() for t in trainable(trainer.model).values())
    assert math.isfinite(sum(losses(trainer)))
