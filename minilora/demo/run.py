"""`minilora demo`: QLoRA from a real model to a merged one, on a CPU in minutes.

SmolLM2-135M-Instruct learns to answer a task with one shell command.
"""

import gc
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.demo.picture import draw
from minilora.demo.report import Answer, Report
from minilora.demo.sheets import Command, read_sheets, split_by_tool
from minilora.files.adapter_folder import WEIGHTS
from minilora.files.adapters import load_adapter, save_adapter
from minilora.files.atomic import write_text
from minilora.huggingface.bundled import DEMO_MODEL
from minilora.huggingface.generation import generate, pad_id
from minilora.huggingface.loading import load_dense
from minilora.merging import merge
from minilora.reports.planning import plan
from minilora.surgery import inject
from minilora.training.batches import collate
from minilora.training.callbacks import run_with, show_progress, write_metrics
from minilora.training.config import FinetuneConfig
from minilora.training.data import Example, encode
from minilora.training.loop import Step, make_optimizer, train
from minilora.training.loss import evaluate
from minilora.training.progress import peak_memory, quantize_with_progress

# Longest training sequence in tokens. The few longer ones would decide how much memory a batch
# takes.
LONGEST = 80

QUESTIONS = 5
ANSWER_TOKENS = 40


def run_demo(out: str = "runs/demo", steps: int = 100, seed: int = 0) -> Report:
    """Runs the demo; writes the adapter, metrics.jsonl, demo.png and report.md to `out`."""
    # Without gradient checkpointing, which is slower: the model is small.
    config = FinetuneConfig(
        DEMO_MODEL, "cheat", out, lr=1e-3, steps=steps, seed=seed, checkpointing=False
    )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    to_learn, to_hold_out = split_by_tool(read_sheets(), seed)
    asked = random.Random(seed).sample(to_hold_out, QUESTIONS)

    announce(f"{DEMO_MODEL}: load, then measure the unquantized base")
    model, tokenizer = load_dense(DEMO_MODEL)
    training = [e for e in encode_all(to_learn, tokenizer, config) if len(e.ids) <= LONGEST]
    held_out = encode_all(to_hold_out, tokenizer, config)
    pad = pad_id(tokenizer)
    measure = partial(evaluate, examples=held_out, pad=pad)
    base_loss = measure(model)
    before = answers_of(model, tokenizer, asked)

    announce("quantize to NF4, inject adapters")
    quantize_with_progress(model)
    nf4_loss = measure(model)
    planned = plan(model, config.r)
    print(planned)
    inject(model, config.r, seed=seed)

    counts = f"{len(training)} commands; {len(held_out)} commands of other tools are held out"
    announce(f"train: {steps} steps of {config.batch_size} from {counts}")
    start = time.perf_counter()
    history = train_with_progress(model, training, config, pad)
    seconds = time.perf_counter() - start
    tuned_loss = measure(model)
    after = answers_of(model, tokenizer, asked)

    announce("save the adapter, load it into a fresh model, merge")
    save_adapter(model, folder)
    probe = collate(held_out[:2], pad)["input_ids"]
    expected = logits_of(model, probe)
    del model
    gc.collect()
    fresh = load_fresh(folder)
    reload_error = (logits_of(fresh, probe) - expected).abs().max().item()
    merged_loss = measure(merge(fresh))

    report = Report(
        base_loss=base_loss,
        nf4_loss=nf4_loss,
        tuned_loss=tuned_loss,
        merged_loss=merged_loss,
        reload_error=reload_error,
        answers=[Answer(*row) for row in zip(asked, before, after, strict=True)],
        plan=planned,
        adapter_bytes=(folder / WEIGHTS).stat().st_size,
        history=history,
        seconds=seconds,
        peak=peak_memory(),
    )
    write_report(report, folder)
    return report


def announce(what: str) -> None:
    """Prints what comes next."""
    print(f"\n* {what}", flush=True)


def encode_all(commands: list[Command], tokenizer: Any, config: FinetuneConfig) -> list[Example]:
    """Returns one training sequence per command."""
    return [encode(command.record, tokenizer, config.max_length)[0] for command in commands]


def answers_of(model: nn.Module, tokenizer: Any, commands: list[Command]) -> list[str]:
    """Returns the model's answer to each task."""
    return [generate(model, tokenizer, c.question, limit=ANSWER_TOKENS) for c in commands]


def load_fresh(folder: Path) -> nn.Module:
    """Returns the demo's model, loaded again, in NF4 and with the adapter in `folder`."""
    model, _ = load_dense(DEMO_MODEL)
    quantize_with_progress(model)
    return load_adapter(model, folder)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Returns the model's logits in eval mode, float32."""
    logits: Tensor = model.eval()(input_ids=ids).logits
    return logits.float()


def train_with_progress(
    model: nn.Module, examples: list[Example], config: FinetuneConfig, pad: int
) -> list[Step]:
    """Trains with a progress bar and metrics.jsonl, without checkpoints."""
    optimizer = make_optimizer(model, config)
    callbacks = [
        show_progress(config.steps_for(len(examples)), 0, optimizer),
        write_metrics(Path(config.out) / "metrics.jsonl", []),
    ]
    return run_with(callbacks, train(model, examples, config, pad=pad, optimizer=optimizer))


def write_report(report: Report, folder: Path) -> None:
    """Prints the report, and writes report.md and its picture."""
    draw(report, folder / "demo.png")
    picture = "![the losses, and answers before and after training](demo.png)"
    text = f"# minilora demo\n\n{picture}\n\n````text\n{report}\n````\n"
    write_text(folder / "report.md", text)
    written = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"\n{report}\n\nwritten to {folder}/: {written}")
