"""QLoRA fine-tuning as a recipe: load, quantize, inject, train, evaluate, save."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from minilora.files.adapters import save_adapter
from minilora.huggingface.activation_checkpointing import gradient_checkpointing
from minilora.huggingface.context import check_max_length
from minilora.huggingface.generation import pad_id
from minilora.huggingface.loading import load_config, load_dense, pick_device
from minilora.huggingface.provenance import decide_quantize
from minilora.surgery import inject
from minilora.training.batches import check_step_size, split_hold_out
from minilora.training.callbacks import run_with, show_progress, write_metrics
from minilora.training.checkpoint_manager import CheckpointManager
from minilora.training.config import FinetuneConfig
from minilora.training.data import encode_records
from minilora.training.lock import hold_folder
from minilora.training.loop import make_optimizer, train
from minilora.training.loss import evaluate
from minilora.training.progress import quantize_with_progress
from minilora.training.records import read_records
from minilora.training.result import Result


def finetune(config: FinetuneConfig) -> Result:
    r"""Fine-tunes a causal language model on a file of examples.

    Writes to `config.out`: the adapter (see `save_adapter`), `config.json`, `metrics.jsonl` with
    one line per step, and `checkpoints/` until the run is finished. A run that was interrupted and
    resumed, on the same machine and with the same versions, is bit-identical to one that was not.
    As long as it lasts, no other run can start in `config.out`.

    Returns:
        A `Result` with the trained model, its tokenizer, the loss on the hold-out before and after
        training, and the metrics of every `Step`.

    Raises:
        ValueError: the config, the data, the model, or the checkpoint to resume from is invalid, or
            `config.out` contains another run. Nothing has been written. Also if an adapter gets no
            gradient in the first step.
        FileNotFoundError: the data or the checkpoint to resume from does not exist.
        FloatingPointError: a loss or a gradient became NaN or infinite.
        BlockingIOError: another run is working in `config.out`; the message says which.
        OSError: a file could not be written; the message names it.
        minilora.training.Interrupted: Ctrl-C or SIGTERM, after a checkpoint was saved. It is a
            KeyboardInterrupt.

    Example:
        >>> data = tmp / "my.jsonl"
        >>> line = '{"prompt": "Where is it?", "completion": "Under the stone"}\n'
        >>> _ = data.write_text(8 * line)
        >>> config = FinetuneConfig(
        ...     "smollm2", str(data), str(tmp / "a"),
        ...     lr=2e-3, steps=2, batch_size=2, eval_fraction=0.1,
        ... )
        >>> result = finetune(config)
        >>> result.eval_after < result.eval_before
        True
    """
    model_config = load_config(config.model, trust_remote_code=config.trust_remote_code)
    quantize = decide_quantize(config.quantize, model_config, config.model)
    check_max_length(model_config, config.max_length, config.model)
    with hold_folder(Path(config.out)):
        return _finetune(replace(config, quantize=quantize))


def _finetune(config: FinetuneConfig) -> Result:
    checkpoints = CheckpointManager(config)
    out = Path(config.out)
    torch.manual_seed(config.seed)

    # Load, the data first: it is checked before the model takes its time
    records = read_records(config.data)
    model, tokenizer = load_dense(
        config.model,
        device=pick_device(config.device),
        trust_remote_code=config.trust_remote_code,
    )
    pad = pad_id(tokenizer)
    examples = encode_records(
        records, tokenizer, config.max_length, learn_prompt=config.learn_prompt
    )
    checkpoints.check_examples(examples)
    training, held_out = split_hold_out(examples, config.eval_fraction, config.seed)
    check_step_size(len(training), config)
    measure = partial(evaluate, model, held_out, batch_size=config.batch_size, pad=pad)

    # Quantize
    if config.quantize:
        quantize_with_progress(model)
    checkpoints.check_base(model)

    # Inject
    inject(
        model,
        config.r,
        alpha=config.alpha,
        targets=config.targets,
        dropout=config.dropout,
        seed=config.seed,
    )

    optimizer = make_optimizer(model, config)
    history = checkpoints.restore(model, optimizer)
    checkpoints.begin()
    if held_out and not checkpoints.resumed:
        checkpoints.run.eval_before = measure()

    # Train
    steps = train(model, training, config, pad=pad, optimizer=optimizer, done=len(history))
    callbacks = [
        show_progress(config.steps_for(len(training)), len(history), optimizer),
        write_metrics(out / "metrics.jsonl", history),
        checkpoints.saving(model, optimizer),
    ]
    with _maybe_checkpointing(model, config):
        history += run_with(callbacks, steps)

    # Save, evaluate
    save_adapter(model, out)
    eval_after = measure() if held_out else None
    checkpoints.remove()
    return Result(model, tokenizer, out, checkpoints.run.eval_before, eval_after, history)


def _maybe_checkpointing(model: nn.Module, config: FinetuneConfig) -> AbstractContextManager[None]:
    """Gradient checkpointing inside the block, if the config asks for it."""
    wanted = config.checkpointing
    if wanted is None:
        supported = getattr(model, "supports_gradient_checkpointing", False)
        wanted = bool(config.quantize) and supported
    return gradient_checkpointing(model) if wanted else nullcontext()
