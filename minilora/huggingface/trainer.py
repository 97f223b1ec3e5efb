"""Checkpoints of transformers' Trainer, TRL and accelerate that hold the adapters alone.

A Trainer saves the whole model at every checkpoint: for a 7B model gigabytes that never changed,
beside a few megabytes that did. A folder with the whole of a model that carries adapters would also
look like an ordinary one, and reload without them. Here a checkpoint holds the adapters, in the
files that `minilora.load_adapter` and PEFT read, and whatever the trainer needs to go on: a resumed
run is bit-identical to one that was not interrupted.

`AdapterCheckpoints` is mixed into a Trainer; `checkpoint_adapters` is for a loop of one's own with
accelerate. Nothing is imported from either library. The hooks are accelerate's own. Trainer has no
hook for loading, so the mixin overrides the methods that save and load its model; a Trainer without
these methods would raise, since `save_pretrained` of a model with adapters does.
"""

import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.files.adapters import load_adapter, save_adapter
from minilora.files.names import canonical_names
from minilora.files.peft_config import CONFIG, read_config
from minilora.files.peft_values import ConfigReader
from minilora.huggingface.bypassed import check_gradients, refuse_bypassed
from minilora.lora import LoRA
from minilora.targets import adapted_layers, adapter_names

_WAY_OUT = (
    "Leave these layers out with exclude=, or set check_first_step = False if later batches will "
    "reach them"
)

# Where each process keeps its parameters to itself, and none has the whole of an adapter.
_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


class AdapterCheckpoints:
    """Mixed in before a Trainer: its checkpoints hold the adapters, and none is left untrained.

    * `save_model` and every checkpoint write the adapters in PEFT's layout, the tokenizer, and
      with a checkpoint the states of the optimizer, the schedule and the random generators.
    * `train(resume_from_checkpoint=...)` goes on bit for bit, and refuses a checkpoint in which one
      of these states is missing or truncated. `load_best_model_at_end` loads the best adapters.
    * In the first step, before a parameter has changed, adapters that would never learn raise an
      error with their names: of layers whose weight is read without calling them, and of layers
      that got no gradient (`minilora.audit`).

    It works with `transformers.Trainer` and its subclasses, such as `trl.SFTTrainer`, and with any
    model that `minilora.inject` made, dense or quantized.

    Attributes:
        check_first_step: set it to False in a subclass if the first batch need not reach all
            adapters, as with experts that no token is routed to.

    Raises:
        ValueError: the model has no adapter; an adapter got no gradient in the first step; a
            checkpoint does not fit, or is not complete; parameters are sharded (FSDP, DeepSpeed).
        TypeError: the weight of a layer with an adapter is read without calling the layer.

    Example:
        >>> import transformers
        >>> class Trainer(AdapterCheckpoints, transformers.Trainer):
        ...     pass
        >>> Trainer.check_first_step
        True
    """

    # transformers' own, of which nothing is imported here.
    model: Any
    args: Any
    state: Any
    accelerator: Any
    processing_class: Any

    check_first_step = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.model is not None:
            adapted_layers(self.model)
        _check_not_sharded(self.accelerator)
        self._first_step_checked = False

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's loss; raises if no adapter takes part in it."""
        computed = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        loss = computed[0] if isinstance(computed, tuple) else computed
        if self.check_first_step and torch.is_grad_enabled() and not loss.requires_grad:
            # The error of `backward` would name no layer.
            check_gradients(self.model, _WAY_OUT)
        return computed

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's forward and backward pass; checks those of the first step."""
        if self._first_step_checked or not self.check_first_step:
            return super().training_step(*args, **kwargs)  # type: ignore[misc]

        # A compiled model is not watched: watching would break its graph.
        watched = nullcontext() if self.args.torch_compile else refuse_bypassed(self.model)
        with watched:
            loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        # Not before the last of the micro-batches whose gradients are accumulated.
        if self.accelerator.sync_gradients:
            check_gradients(self.model, _WAY_OUT)
            self._first_step_checked = True
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        save_adapters(self.accelerator.unwrap_model(self.model), folder)

        collator = getattr(self, "data_collator", None)
        tokenizer = self.processing_class or getattr(collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        several = self.args.world_size > 1
        random = f"rng_state_{self.args.process_index}.pth" if several else "rng_state.pth"
        for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", random):
            if not (folder / name).is_file():
                # transformers would start these states anew, and say nothing.
                raise ValueError(
                    f"{folder} cannot be resumed: it has no {name}. It was saved with "
                    "save_only_model=True, or saving was interrupted: resume from another "
                    "checkpoint, or minilora.load_adapter it and start a new run"
                )
            # What torch.save writes is a zip archive, whose table of contents is at its end.
            if not name.endswith(".json") and not zipfile.is_zipfile(folder / name):
                raise ValueError(
                    f"{folder} cannot be resumed: {folder / name} is damaged or incomplete. "
                    "Resume from another checkpoint"
                )
        load_adapters(self.accelerator.unwrap_model(self.model), folder)

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint)
        load_adapters(self.accelerator.unwrap_model(self.model), folder)


def checkpoint_adapters(accelerator: Any) -> None:
    """Makes `accelerator.save_state` and `load_state` save and load the adapters alone.

    Models without adapters are saved as before. Optimizers, schedulers, samplers and random states
    are saved and loaded by accelerate: a resumed run is bit-identical.

    Args:
        accelerator: an `accelerate.Accelerator`. A state's folder gets a folder `adapters` for the
            first model that was prepared, `adapters_1` for the second.

    Raises:
        ValueError: parameters are sharded (FSDP, DeepSpeed).

    Example:
        >>> import accelerate
        >>> model = minilora.inject(torch.nn.Sequential(torch.nn.Linear(64, 8)), r=4)
        >>> accelerator = accelerate.Accelerator(cpu=True)
        >>> checkpoint_adapters(accelerator)
        >>> model = accelerator.prepare(model)
        >>> folder = accelerator.save_state(str(tmp / "state"))
        >>> sorted(p.name for p in (tmp / "state").iterdir())
        ['adapters', 'random_states_0.pkl']
    """
    _check_not_sharded(accelerator)

    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        for index, model in reversed(list(enumerate(models))):
            bare = accelerator.unwrap_model(model)
            if adapter_names(bare):
                del weights[index]
                if accelerator.is_main_process:
                    save_adapters(bare, _state_folder(output_dir, index))

    def load(models: list[Any], input_dir: str) -> None:
        for index, model in reversed(list(enumerate(models))):
            bare = accelerator.unwrap_model(model)
            if adapter_names(bare):
                load_adapters(bare, _state_folder(input_dir, index))
                del models[index]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_adapters(model: nn.Module, folder: Path) -> None:
    """Saves all adapters of a model: a single one in the folder, several each in one of its own.

    Raises:
        ValueError, OSError: as `minilora.save_adapter`.
    """
    adapted_layers(model)
    for name, path in _folders(model, folder).items():
        save_adapter(model, path, name)


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Gives the adapters of a model the values that `save_adapters` saved of the same ones.

    Raises:
        FileNotFoundError, ValueError: as `minilora.load_adapter`; or rank, alpha or dropout of a
            layer is another one, so that a run would go on differently.
    """
    for name, path in _folders(model, folder).items():
        layers: dict[str, Any] = dict(adapted_layers(model, name))
        adapters: dict[str, LoRA] = {at: layer.adapters[name] for at, layer in layers.items()}
        kind = type(next(iter(adapters.values())))
        _check_settings(model, adapters, path, kind(1, 1, r=1).config())
        load_adapter(model, path, name, allow_zero=True, adapter=kind)


def _check_settings(
    model: nn.Module, adapters: Mapping[str, LoRA], folder: Path, own_options: Mapping[str, Any]
) -> None:
    saved = ConfigReader(read_config(folder / CONFIG, own_options), folder / CONFIG)
    names = canonical_names(model)
    for path, adapter in adapters.items():
        here = {"r": adapter.r, "alpha": adapter.alpha, "dropout": adapter.dropout}
        layer = names[path]
        there = {"r": saved.rank(layer), "alpha": saved.alpha(layer), "dropout": saved.dropout}
        for option, value in here.items():
            if value != there[option]:
                raise ValueError(
                    f"{folder} holds an adapter with {option}={there[option]} for {path}, where "
                    f"the model has {option}={value}: inject with the settings of that run"
                )


def _folders(model: nn.Module, folder: Path) -> dict[str, Path]:
    names = adapter_names(model)
    return {name: folder / name if len(names) > 1 else folder for name in names}


def _state_folder(folder: str, index: int) -> Path:
    return Path(folder) / (f"adapters_{index}" if index else "adapters")


def _check_not_sharded(accelerator: Any) -> None:
    kind = accelerator.distributed_type
    if getattr(kind, "name", str(kind)) in _SHARDED:
        raise ValueError(
            f"{kind}: adapters of a model with sharded parameters cannot be saved by this trainer. "
            "Run it with DDP (torchrun or accelerate launch without FSDP or DeepSpeed)"
        )
