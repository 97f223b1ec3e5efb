"""The model that a run trains: its base, in 4 bits or dense, with adapters, and sharded."""

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from minilora.distributed.processes import Processes
from minilora.files.text import shown
from minilora.huggingface.base_model import check_not_4bit, load_base, local_folder, stored_in_4bit
from minilora.huggingface.loading import best_dtype, empty_model, recorded_name
from minilora.reports.planning import Plan, plan
from minilora.surgery import inject
from minilora.training.config import FinetuneConfig
from minilora.training.one_of_many import own_device
from minilora.training.progress import announce

# In OUT: the base of a sharded run, if its model is dense and is to be quantized.
QUANTIZED = "base-4bit"


def prepare(config: FinetuneConfig, processes: Processes) -> tuple[nn.Module, Any, Plan]:
    """Loads the base, quantized if it is to be, and injects the adapters.

    Returns:
        The model, its tokenizer, and the plan of what was added.

    Raises:
        ValueError: see `load_base` and `load_sharded`.
        OSError: the 4-bit base of a sharded run could not be written.
    """
    announce(f"loading {shown(config.model)}")
    stored = stored_in_4bit(config.model, trust_remote_code=config.trust_remote_code)
    if not config.quantize:
        check_not_4bit(config.model, stored)
    if stored:
        announce("it is in 4 bits already")
    if config.shard:
        return _prepare_sharded(config, processes, stored)

    if config.quantize and not stored:
        announce("quantizing it to 4 bits")
    model, tokenizer = load_base(
        config.model,
        quantize={} if config.quantize else None,
        device=own_device(config.device),
        trust_remote_code=config.trust_remote_code,
    )
    planned = _plan(model, config)
    inject(model, **_adapter(config))
    return model, tokenizer, planned


def _prepare_sharded(
    config: FinetuneConfig, processes: Processes, stored: bool
) -> tuple[nn.Module, Any, Plan]:
    # They take a second to import.
    from minilora.distributed import all_processes
    from minilora.huggingface.sharded_folder import load_sharded

    device = own_device(config.device)
    processes.on_first("the model is on this machine", lambda: local_folder(config.model))
    folder = local_folder(config.model)
    if config.quantize and not stored:
        folder = _quantized_folder(config, processes, folder)
    dtype = best_dtype(device)
    with processes.explained("the model is loaded"):
        model, tokenizer = load_sharded(
            folder, all_processes(device.type), adapter=_adapter(config), dtype=dtype
        )
    if tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer: copy that of the model it was made of")
    named: Any = model.config
    named._name_or_path = recorded_name(config.model)
    return model, tokenizer, _plan(empty_model(folder, allow_4bit=True).to(dtype), config)


def _quantized_folder(config: FinetuneConfig, processes: Processes, dense: Path) -> Path:
    """The model in 4 bits, which no process could hold; a resumed run has written it before."""
    from minilora.huggingface.dense_folder import quantize_folder

    target = Path(config.out) / QUANTIZED

    def write() -> None:
        if config.resume and target.is_dir():
            announce(f"in 4 bits it is in {shown(target)}")
            return
        announce(f"quantizing it to 4 bits, into {shown(target)}")
        # Of a run before. Anything else there is an error.
        if target.is_dir() and stored_in_4bit(target):
            shutil.rmtree(target)
        quantize_folder(dense, target, dtype=best_dtype(own_device(config.device)))

    processes.on_first("the model is quantized", write)
    return target


def _plan(base: nn.Module, config: FinetuneConfig) -> Plan:
    return plan(base, config.r, alpha=config.alpha, targets=config.targets, quantize=False)


def _adapter(config: FinetuneConfig) -> dict[str, Any]:
    """The options of `inject`."""
    names = ("r", "alpha", "targets", "dropout", "seed")
    return {name: getattr(config, name) for name in names}
