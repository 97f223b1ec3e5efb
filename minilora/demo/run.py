"""`minilora demo`: QLoRA from a real model to a merged one, on a CPU in minutes.

The training is a call of `finetune`, on two files of examples as anybody could write them. The demo
then checks what a run of one's own has no need to: that the adapter's file gives the trained model
again, bit for bit, and what merging it costs.
"""

import json
import shlex
import shutil
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minilora.demo.picture import draw
from minilora.demo.report import Report
from minilora.demo.tasks import Task, make_task
from minilora.files.adapter_folder import WEIGHTS
from minilora.files.adapters import load_adapter
from minilora.files.atomic import write_text
from minilora.files.json_file import read_json
from minilora.files.peft_config import CONFIG as ADAPTER_CONFIG
from minilora.huggingface.bundled import DEMO_MODEL
from minilora.huggingface.generation import pad_id
from minilora.huggingface.loading import load_dense
from minilora.merging import merge
from minilora.training.batches import collate
from minilora.training.config import FinetuneConfig
from minilora.training.data import encode_records
from minilora.training.lock import hold_folder
from minilora.training.loss import evaluate
from minilora.training.progress import announce, peak_memory, quantize_with_progress
from minilora.training.recipe import finetune
from minilora.training.records import Record
from minilora.training.report import PICTURE as LOSSES
from minilora.training.report import REPORT, fenced
from minilora.training.result import Result
from minilora.training.run_folder import CONFIG, check_folder, check_new
from minilora.training.run_state import METRICS

TRAINING, HELD_OUT = "train.jsonl", "eval.jsonl"
PICTURE = "demo.png"

# What the demo, or its run, would replace.
REPLACED = (TRAINING, HELD_OUT, PICTURE, REPORT, LOSSES, METRICS, WEIGHTS, ADAPTER_CONFIG, CONFIG)


def run_demo(
    task: str = "orders", out: str = "runs/demo", steps: int | None = None, seed: int = 0
) -> Report:
    """Runs the demo; writes the data, the adapter, metrics.jsonl, demo.png and report.md to `out`.

    Args:
        task: "orders", or the hard one, "shell".
        out: the output folder; a demo that it contains is replaced.
        steps: number of optimizer steps; None: as many as the task needs.
        seed: for the data, its order and the adapter's initialization.

    Raises:
        ValueError: there is no such task, `finetune` refuses the settings, or the folder contains
            files that are not a demo's. Nothing has been written.
        FileNotFoundError: the demo's model, or the task's data, is not installed.
        BlockingIOError: another run, or another demo, is working in the folder.
    """
    lesson = make_task(task, seed)
    config = _config(lesson, Path(out), steps, seed)
    # Not around `finetune`, which holds the folder by itself.
    with hold_folder(Path(out)):
        _write_data(lesson, Path(out))
        _introduce(lesson, config)
    result = finetune(config)
    with hold_folder(Path(out)):
        announce("\n* check: load the adapter into a fresh model, merge it")
        checks = check_adapter(result, config, lesson.held_out)
        report = Report(
            task=lesson,
            result=result,
            adapter_bytes=(result.out / WEIGHTS).stat().st_size,
            peak=peak_memory(),
            **checks._asdict(),
        )
        _write_report(report, result.out)

    written = ", ".join(sorted(path.name for path in result.out.iterdir()))
    announce(f"\n{report}\n\nwritten to {result.out}/: {written}")
    announce(f"chat with it: {shlex.join(chat_command(lesson, result.out))}")
    return report


def _config(task: Task, out: Path, steps: int | None, seed: int) -> FinetuneConfig:
    return FinetuneConfig(
        DEMO_MODEL,
        data=str(out / TRAINING),
        eval_data=str(out / HELD_OUT),
        out=str(out),
        lr=task.lr,
        steps=task.steps if steps is None else steps,
        samples=task.asked,
        seed=seed,
        # Which is slower, and the model is small.
        checkpointing=False,
        overwrite=True,
    )


def _write_data(task: Task, out: Path) -> None:
    """Writes the two files of examples, if the demo may have this folder."""
    data = {TRAINING: _as_lines(task.training), HELD_OUT: _as_lines(task.held_out)}
    check_folder(out)
    check_new(out, overwrite=True)
    if not _is_of_a_demo(out):
        _check_nothing_is_lost(out, data)
    for name, text in data.items():
        write_text(out / name, text)


def _as_lines(records: list[Record]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _is_of_a_demo(out: Path) -> bool:
    """Whether the last run in a folder was on the files of examples that a demo writes there."""
    try:
        config = read_json(out / CONFIG)
        folder = Path(config["out"])
        paths = Path(config["data"]), Path(config["eval_data"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return config.get("model") == DEMO_MODEL and paths == (folder / TRAINING, folder / HELD_OUT)


def _check_nothing_is_lost(out: Path, data: dict[str, str]) -> None:
    """Raises ValueError if there is a file that the demo would replace by another one.

    The data is there already if a demo was stopped before its run began.
    """
    for path in (out / name for name in REPLACED if (out / name).exists()):
        if path.is_file() and path.read_bytes() == data.get(path.name, "").encode():
            continue
        raise ValueError(
            f"{path} is not a demo's and would be replaced: choose another output folder (--out), "
            "or move the file"
        )


def _introduce(task: Task, config: FinetuneConfig) -> None:
    """Prints what the model is to learn, and the command that does the same."""
    announce(f"* the task: {task.what}\n")
    for record in task.training[:3]:
        question, answer = _ends_of(record)
        announce(f"    {question}\n      -> {answer}")
    announce(f"\n  {len(task.training)} to train on; {len(task.held_out)} held out:")
    announce(f"  {task.held_out_are}")

    lines = (
        ["minilora", "finetune", "--model", config.model],
        ["--data", config.data, "--eval-data", str(config.eval_data), "--out", config.out],
        ["--lr", str(config.lr), "--steps", str(config.steps), "--samples", str(config.samples)],
        ["--seed", str(config.seed), "--no-checkpointing"],
    )
    command = " \\\n        ".join(map(shlex.join, lines))
    announce(f"\n* fine-tune, as this command does:\n\n    {command}\n")


def _ends_of(record: Record) -> tuple[str, str]:
    """The last question of a record and its answer."""
    if "prompt" in record:
        return record["prompt"], record["completion"]
    *_, question, answer = record["messages"]
    return question["content"], answer["content"]


class Checks(NamedTuple):
    """What a fresh model gave: see `Report`."""

    base_bytes: int
    base_loss: float
    merged_loss: float
    reload_error: float


def check_adapter(result: Result, config: FinetuneConfig, held_out: list[Record]) -> Checks:
    """Loads the model again, gives it the adapter from its file, and merges it.

    Args:
        result, config: of the run.
        held_out: the records on which the losses are measured.
    """
    records = [(f"held-out record {i}", record) for i, record in enumerate(held_out, start=1)]
    examples = encode_records(records, result.tokenizer, config.max_length)
    pad = pad_id(result.tokenizer)
    measure = partial(evaluate, examples=examples, pad=pad)
    probe = collate(examples[:2], pad)["input_ids"]
    expected = logits_of(result.model, probe)

    fresh, _ = load_dense(config.model)
    base_bytes, base_loss = sum(p.nbytes for p in fresh.parameters()), measure(fresh)
    quantize_with_progress(fresh)
    load_adapter(fresh, result.out)
    reload_error = (logits_of(fresh, probe) - expected).abs().max().item()
    return Checks(base_bytes, base_loss, measure(merge(fresh)), reload_error)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Returns the model's logits in eval mode, float32."""
    logits: Tensor = model.eval()(input_ids=ids).logits
    return logits.float()


def _write_report(report: Report, folder: Path) -> None:
    """Draws demo.png and adds it to report.md, with the text of the report."""
    draw(report, folder / PICTURE)
    picture = f"![the losses, and answers before and after training]({PICTURE})"
    section = f"\n## The demo\n\n{picture}\n\n{fenced(str(report))}\n"
    write_text(folder / REPORT, (folder / REPORT).read_text(encoding="utf-8") + section)


def chat_command(task: Task, folder: Path) -> list[str]:
    """Returns the command with which to talk to the adapter in a folder."""
    command = [*installed_command(), "chat", "--adapter", str(folder)]
    return command if task.system is None else [*command, "--system", task.system]


def installed_command() -> list[str]:
    """Returns how to call minilora here: `make demo` installs it where no shell looks for it."""
    if shutil.which("minilora"):
        return ["minilora"]
    script = shutil.which("minilora", path=str(Path(sys.executable).parent))
    if script is None:
        return ["python", "-m", "minilora"]
    with suppress(ValueError):
        return [str(Path(script).relative_to(Path.cwd()))]
    return [script]
