"""QLoRA fine-tuning as a recipe: load, quantize, inject, train, evaluate, save."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from minilora.distributed.processes import Processes, join_processes
from minilora.files.adapters import save_adapter
from minilora.files.text import shown
from minilora.huggingface.activation_checkpointing import gradient_checkpointing
from minilora.huggingface.context import check_max_length
from minilora.huggingface.efficient import efficient_training
from minilora.huggingface.generation import pad_id
from minilora.huggingface.loading import load_config
from minilora.huggingface.provenance import decide_quantize
from minilora.training.callbacks import run_with, show_progress, write_metrics
from minilora.training.checkpoint_manager import CheckpointManager
from minilora.training.config import FinetuneConfig
from minilora.training.evaluation import HoldOut, check_hold_out, evaluated, timed
from minilora.training.header import (
    describe_processes,
    describe_run,
    describe_time,
    print_header,
    where_to_watch,
)
from minilora.training.hold_out import encode_data, read_data
from minilora.training.lock import hold_folder
from minilora.training.loop import make_optimizer, train
from minilora.training.loss import explain_loss
from minilora.training.one_of_many import check_processes, only_first_prints
from minilora.training.packing import check_packing
from minilora.training.preparing import prepare
from minilora.training.progress import announce
from minilora.training.report import write_report
from minilora.training.restart import after_restart
from minilora.training.result import ReleasedModel, Result
from minilora.training.run_state import METRICS, RunState
from minilora.training.samples import Sample, pick_questions
from minilora.training.tensorboard import find_tensorboard, write_events


def finetune(config: FinetuneConfig) -> Result:
    r"""Fine-tunes a causal language model on a file of examples.

    Prints what it is going to do, then its progress: a bar on a terminal, lines elsewhere.

    Writes to `config.out`: the adapter (see `save_adapter`), `report.md` with `loss.png` and sample
    answers, `config.json`, `metrics.jsonl` with one line per step, `tensorboard/` where TensorBoard
    is installed, and `checkpoints/` until the run is finished; and the base in 4 bits, in
    `base-4bit/`, if the run is sharded and its model is dense. With `eval_every` the adapter is the
    one with the lowest loss on the hold-out, otherwise the last one. A run that was interrupted and
    resumed, on the same machine and with the same versions, is bit-identical to one that was not.
    As long as it lasts, no other run can start in `config.out`.

    Started by `torchrun` in several processes, they share the examples of each step, and the first
    one prints and writes. The steps are those of one process, but for rounding, and a checkpoint
    can be resumed by any number of processes. With `torchrun --max-restarts` a run whose processes
    were started again goes on from its newest checkpoint.

    Returns:
        A `Result` with the trained model, its tokenizer, the loss on the hold-out and the sample
        answers before and after training, and the metrics of every `Step`.

    Raises:
        ValueError: the config, the data, the model, or the checkpoint to resume from is invalid, or
            `config.out` contains another run. Nothing has been written, but for the base of a
            sharded run in 4 bits. Also if an adapter gets no gradient in the first step.
        FileNotFoundError: the data or the checkpoint to resume from does not exist.
        FloatingPointError: a loss, on the hold-out too, or a gradient became NaN or infinite.
        ProcessError: another process of the run failed, was killed or hangs. It is an OSError.
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
        >>> result = finetune(config)  # doctest: +ELLIPSIS
        loading smollm2
        ...
        evaluating the adapter (examples: 1, sample answers: 1)
        >>> result.eval_after < result.eval_before
        True
    """
    trust = config.trust_remote_code
    model_config = load_config(config.model, trust_remote_code=trust, allow_4bit=True)
    quantize = decide_quantize(config.quantize, model_config, config.model)
    check_max_length(model_config, config.max_length, config.model)
    with join_processes(config.timeout) as processes, only_first_prints(processes):
        check_processes(config, processes.size)
        with hold_folder(Path(config.out)) if processes.is_first else nullcontext():
            config = after_restart(config, processes)
            return _finetune(replace(config, quantize=quantize), processes)


def _finetune(config: FinetuneConfig, processes: Processes) -> Result:
    tensorboard = find_tensorboard()
    checkpoints = CheckpointManager(config, processes)
    out = Path(config.out)
    torch.manual_seed(config.seed)

    # Load, quantize and inject, the data first: it is checked before the model takes its time
    data, eval_data = read_data(config)
    model, tokenizer, planned = prepare(config, processes)
    pad = pad_id(tokenizer)
    training, held_out = encode_data(data, eval_data, tokenizer, config)
    questions = pick_questions(held_out, eval_data or data, config.samples)
    checkpoints.check_examples(training, held_out)
    checkpoints.check_questions(questions)
    with processes.explained("the base is compared"):
        checkpoints.check_base(model)

    # Before anything is evaluated or written; `train` tries it again as the model is then
    if config.packing:
        check_packing(model)

    # Each evaluation computes as the training does
    with efficient_training(model):
        optimizer = make_optimizer(model, config)
        history = checkpoints.restore(model, optimizer)

        header = describe_run(config, planned, training, held_out)
        header |= describe_processes(config, planned, processes.size)
        print_header(header | where_to_watch(out, tensorboard))
        if (explanation := explain_loss(model)) is not None:
            announce(explanation)

        # Evaluate the base: a fresh adapter changes nothing
        hold_out = HoldOut(model, tokenizer, held_out, questions, config.batch_size, pad, processes)
        seconds = None if checkpoints.resumed else _evaluate_base(hold_out, checkpoints.run)
        checkpointing = uses_checkpointing(model, config)
        announce(describe_time(config, training, held_out, history, seconds, checkpointing))

        # Train
        checkpoints.begin()
        total = config.steps_for(len(training))
        steps = train(
            model,
            training,
            config,
            pad=pad,
            optimizer=optimizer,
            done=len(history),
            processes=processes,
            stop=checkpoints.stop,
        )
        shown = [
            show_progress(total, len(history), optimizer, config.log_every),
            write_metrics(out / METRICS, history),
            write_events(out, len(history), tensorboard),
        ]
        callbacks = [
            *(shown if processes.is_first else []),
            checkpoints.best.keeping(model),
            checkpoints.saving(model, optimizer),
        ]
        with gradient_checkpointing(model) if checkpointing else nullcontext():
            evaluations = evaluated(steps, config.eval_every, total, hold_out.loss)
            history += run_with(callbacks, evaluations)

        # Save the best adapter, or the last one
        checkpoints.best.put_back(model)
        _save(model, config, processes)

        # Evaluate it
        after, samples = _evaluate_adapter(hold_out, checkpoints.run, out)

    # Report
    before, best_step = checkpoints.run.eval_before, checkpoints.best.step
    result = Result(model, tokenizer, out, before, after, history, samples, best_step)
    processes.on_first("the report is written", lambda: write_report(result, config, header))
    checkpoints.remove()
    if config.shard:
        # Kept beyond the end of the process group, it would abort the process at its exit.
        result.model = ReleasedModel(out)
    return result


def _save(model: nn.Module, config: FinetuneConfig, processes: Processes) -> None:
    """Writes the adapter once; that of a sharded model is gathered by all processes."""
    with processes.explained("the adapter is saved"):
        if config.shard or processes.is_first:
            save_adapter(model, config.out)
    processes.share("the adapter is saved")


def _evaluate_base(hold_out: HoldOut, run: RunState) -> float | None:
    """Adds the loss and the answers before training to the run; returns the loss's seconds.

    None: there is no hold-out.
    """
    if not hold_out.examples:
        return None
    announce(f"evaluating the base model ({hold_out})")
    run.answers = hold_out.answers()
    loss, seconds = timed(hold_out.loss)
    run.eval_before = check_hold_out(loss, "before training")
    return seconds


def _evaluate_adapter(
    hold_out: HoldOut, run: RunState, out: Path
) -> tuple[float | None, list[Sample]]:
    """Returns the loss after training, and the samples with the answers before and after."""
    if not hold_out.examples:
        return None, []
    announce(f"evaluating the adapter ({hold_out})")
    answers = zip(hold_out.questions, run.answers, hold_out.answers(), strict=True)
    samples = [question.answered(before, after) for question, before, after in answers]
    when = f"after training (the adapter is saved in {shown(out, 1000)}/)"
    return check_hold_out(hold_out.loss(), when), samples


def uses_checkpointing(model: nn.Module, config: FinetuneConfig) -> bool:
    """Whether gradient checkpointing is on: as the config says, or by default for NF4."""
    if config.checkpointing is not None:
        return config.checkpointing
    supported = getattr(model, "supports_gradient_checkpointing", False)
    return bool(config.quantize) and bool(supported)
