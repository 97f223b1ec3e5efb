"""Trainers, models and data for the tests of minilora's checkpoints under transformers and TRL."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

import minilora
from minilora.huggingface.trainer import AdapterCheckpoints


def adapter_trainer(base: Any = None) -> Any:
    """A Trainer, or another class of trainers, with AdapterCheckpoints mixed in."""
    import transformers

    return type("Trainer", (AdapterCheckpoints, base or transformers.Trainer), {})


def checkpointing() -> dict[str, bool]:
    """The argument that switches gradient checkpointing on, which was renamed in transformers 5."""
    import transformers

    known = transformers.TrainingArguments.__dataclass_fields__
    new = "activation_checkpointing"
    return {new if new in known else "gradient_checkpointing": True}


def arguments(folder: Path, kind: Any = None, **options: Any) -> Any:
    """Training arguments for a few quiet steps on the CPU."""
    import transformers

    quiet = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "seed": 3,
    }
    return (kind or transformers.TrainingArguments)(**quiet | options)


def rows(count: int = 12, length: int = 10, vocabulary: int = 128) -> list[dict[str, list[int]]]:
    """Sequences of random tokens with their labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (count, length), generator=generator).tolist()
    ones = [1] * length
    return [{"input_ids": row, "attention_mask": ones, "labels": row} for row in ids]


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what is trained, by name."""
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


class InterruptedRunError(Exception):
    """Raised inside a step, as a signal or a full disk would."""


def interrupted(trainer: Any, step: int) -> None:
    """Trains until an exception in the middle of this step (1, 2, ...)."""
    import transformers

    class Raises(transformers.TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step - 1:
                raise InterruptedRunError

    trainer.add_callback(Raises())
    with contextlib.suppress(InterruptedRunError):
        trainer.train()
        raise AssertionError("the run was not interrupted")


def losses(trainer: Any) -> list[float]:
    """The losses that a trainer with logging_steps=1 has logged."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def tiny(quantized: bool, make: Any, **options: Any) -> Any:
    """An injected Llama; the same for the same options."""
    model = make()
    if quantized:
        minilora.quantize(model)
    return minilora.inject(model, r=4, **options)
