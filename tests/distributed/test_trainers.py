"""transformers' Trainer and TRL's SFTTrainer with DDP, as torchrun starts them.

The adapters are saved once, and the losses are those of one process.
"""

from pathlib import Path
from typing import Any

import pytest
from processes import run
from trainers import adapter_trainer, arguments, checkpointing, losses, rows

import minilora
import minilora.huggingface.trainer as ours

pytest.importorskip("transformers", reason="the trainer is transformers' own")
pytest.importorskip("trl", reason="the trainer is TRL's")

# Here, and not in a function: the processes are forked when all has been imported.
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

KINDS = {"Trainer": (Trainer, TrainingArguments), "SFTTrainer": (SFTTrainer, SFTConfig)}


def train_both(rank: int, folder: str, model_folder: str, batch_size: int) -> dict[str, Any]:
    """What each trainer did in this process, by its name."""
    written: list[Path] = []
    save = ours.save_adapter

    def watched(model: Any, path: Path, name: str) -> Path:
        written.append(path)
        return save(model, path, name)

    ours.save_adapter = watched
    try:
        found = {kind: train(kind, Path(folder), model_folder, batch_size) for kind in KINDS}
    finally:
        ours.save_adapter = save
    return {**found, "written": [str(path.relative_to(folder)) for path in written]}


def train(kind: str, folder: Path, model_folder: str, batch_size: int) -> dict[str, Any]:
    """Trains two steps: losses, the class of what was trained, and its parameters' sums."""
    trainer, config = KINDS[kind]
    own: dict[str, Any] = {"bf16": False, **checkpointing()} if config is SFTConfig else {}
    model = minilora.quantize(LlamaForCausalLM.from_pretrained(model_folder))
    running = adapter_trainer(trainer)(
        model=minilora.inject(model, r=4),
        args=arguments(
            folder / kind,
            config,
            per_device_train_batch_size=batch_size,
            max_steps=2,
            save_strategy="steps",
            save_steps=2,
            logging_strategy="steps",
            logging_steps=1,
            **own,
        ),
        train_dataset=Dataset.from_list(rows()),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )
    running.train()
    return {
        "losses": losses(running),
        "class": type(running.model_wrapped).__name__,
        "sums": sums(model),
    }


def sums(model: Any) -> list[float]:
    """Of the absolute values of each parameter that is trained."""
    return [p.detach().double().abs().sum().item() for p in minilora.adapter_parameters(model)]


def test_two_processes_train_as_one_and_save_once(folder: Path, tmp_path: Path) -> None:
    one = train_both(0, str(tmp_path / "one"), str(folder), 2)
    two = run(2, train_both, tmp_path / "two", folder, 1)
    assert [process["written"] for process in two] == [[f"{k}/checkpoint-2" for k in KINDS], []]

    for kind in KINDS:
        first, second = (process[kind] for process in two)
        assert first["class"] == second["class"] == "DistributedDataParallel"
        assert first["sums"] == second["sums"]

        # The second process logs nothing.
        expected = one[kind]["losses"]
        assert len(expected) == 2 and second["losses"] in ([], first["losses"])
        assert first["losses"] == pytest.approx(expected, abs=1e-5)

        base = minilora.quantize(LlamaForCausalLM.from_pretrained(folder))
        loaded = minilora.load_adapter(base, tmp_path / "two" / kind / "checkpoint-2")
        assert sums(loaded) == first["sums"]
