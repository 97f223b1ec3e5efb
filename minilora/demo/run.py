"""`minilora demo`: QLoRA from a real model to a merged one, on a CPU in minutes.

SmolLM2-135M-Instruct learns to answer a task with one shell command. The commands come from the sheets of the `cheat` package
(dual MIT/GPL-3), read at run time. What is held out are whole tools: none of their commands is trained on.
"""

import gc
import random
import re
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.files.adapters import WEIGHTS, load_adapter, save_adapter
from minilora.files.atomic import atomic, write_text
from minilora.huggingface.loading import DEMO_MODEL, generate, load_dense, pad_id
from minilora.merging import merge
from minilora.reports.planning import Plan, amount, plan
from minilora.reports.runs import Step
from minilora.surgery import inject
from minilora.training.data import collate, encode
from minilora.training.loop import (
    FinetuneConfig,
    evaluate,
    peak_memory,
    quantize_with_bar,
    train_with_bar,
)

HELD_OUT = 0.15  # share of the tools
LONGEST = 80  # tokens of a sequence to train on: the few longer ones would decide how much memory a batch takes


@dataclass(frozen=True)
class Command:
    """A line of a cheat sheet: with `tool`, how to do `task`."""

    tool: str
    task: str
    command: str

    @property
    def question(self) -> list[dict[str, str]]:
        """The turns in front of the answer. A system message of our own: the template would add a longer one."""
        return [
            {"role": "system", "content": "Answer with one shell command."},
            {"role": "user", "content": f"{self.tool}: {self.task}"},
        ]

    @property
    def record(self) -> dict[str, list[dict[str, str]]]:
        return {"messages": [*self.question, {"role": "assistant", "content": self.command}]}


def read_sheets() -> list[Command]:
    """Returns every "# task" comment that is followed by one command alone, of the installed `cheat` package.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    try:
        files = sorted(
            (
                f
                for f in metadata.files("cheat") or []
                if f.parent.name == "cheat" and "share" in f.parts
            ),
            key=str,
        )
    except metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            "the demo's data is not installed: pip install --no-deps cheat==2.5.1 (or `make demo`, which does it)"
        ) from error
    found = []
    for file in files:
        text = Path(str(file.locate())).read_text(encoding="utf-8", errors="replace")
        for paragraph in re.split(r"\n\s*\n", text):
            comment, *commands = paragraph.strip("\n").split("\n")
            task = comment.lstrip("# ").rstrip(" :.")
            if (
                comment.startswith("#")
                and len(commands) == 1
                and not commands[0].startswith("#")
                and 8 <= len(task) <= 120
            ):
                found.append(Command(file.name, task, commands[0].strip()))
    return [c for c in found if c.command and len(c.command) <= 120]


def split(commands: list[Command], seed: int = 0) -> tuple[list[Command], list[Command]]:
    """Returns (to train on, held out): whole tools are held out, chosen at random."""
    tools = sorted({c.tool for c in commands})
    random.Random(seed).shuffle(tools)
    held_out = set(tools[: round(HELD_OUT * len(tools))])
    return [c for c in commands if c.tool not in held_out], [
        c for c in commands if c.tool in held_out
    ]


@dataclass(frozen=True)
class Report:
    """What the demo measured. Losses in nats a completion token, on tools that were never trained on."""

    base_loss: float
    nf4_loss: float
    tuned_loss: float
    answers: list[tuple[Command, str, str]]  # with the answer before and after
    plan: Plan
    adapter_bytes: int
    history: list[Step]
    seconds: float
    reloaded: float  # largest difference of a logit: adapter loaded into a fresh model
    merged_loss: float  # held-out loss after merging into bfloat16
    peak: int

    def __str__(self) -> str:
        p, tokens = self.plan, sum(s.tokens for s in self.history)
        dense = 2 * sum(row.out_features * row.in_features for row in p.rows)
        rows = [
            ("held-out loss, unquantized base", f"{self.base_loss:.2f} nats a completion token"),
            ("held-out loss, base in NF4", f"{self.nf4_loss:.2f}"),
            (
                "held-out loss, fine-tuned",
                f"{self.tuned_loss:.2f}  ({self.tuned_loss - self.base_loss:+.2f})",
            ),
            (
                "trained",
                f"{p.trainable:,} of {p.parameters:,} parameters ({p.trainable / p.parameters:.2%})",
            ),
            (
                "adapter on disk",
                f"{amount(self.adapter_bytes)}, the model in bfloat16 {amount(2 * p.parameters)}",
            ),
            (
                "the adapted layers",
                f"{amount(p.bytes['quantized'])} in NF4, {amount(dense)} in bfloat16",
            ),
            (
                "training",
                f"{len(self.history)} steps in {self.seconds:.0f} s, {tokens / self.seconds:.0f} tokens/s",
            ),
            ("peak memory of the process", amount(self.peak)),
            ("adapter in a fresh model", f"logits differ by {self.reloaded:.1g}"),
            ("merged into one dense model", f"held-out loss {self.merged_loss:.2f}"),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows] + [
            "",
            "Asked about tools that it was never trained on:",
        ]
        for command, before, after in self.answers:
            lines += ["", f"  {command.tool}: {command.task}"]
            lines += [
                f"    before  {_one_line(before)}",
                f"    after   {_one_line(after)}",
                f"    sheet   {command.command}",
            ]
        lines += ["", HONEST]
        return "\n".join(lines)


HONEST = """\
What a model of this size learns in 100 steps is the form: one command and nothing else, then stop. The facts stay weak:
it makes up flags of tools that it has hardly seen. Do not run what it says."""


def _one_line(text: str, limit: int = 96) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def run(out: str = "runs/demo", steps: int = 100, seed: int = 0) -> Report:
    """Runs the demo; writes the adapter, metrics.jsonl, demo.png and report.md to `out`."""
    config = FinetuneConfig(
        DEMO_MODEL, "cheat", out, lr=1e-3, steps=steps, seed=seed, checkpointing=False
    )  # faster
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    to_learn, held_out = split(read_sheets(), seed)
    say(f"{DEMO_MODEL}: load, then measure the unquantized base")
    model, tokenizer = load_dense(DEMO_MODEL)
    pad = pad_id(tokenizer)
    training, unseen = (
        [encode(c.record, tokenizer, config.max_length)[0] for c in commands]
        for commands in (to_learn, held_out)
    )
    training = [e for e in training if len(e.ids) <= LONGEST]
    asked = random.Random(seed).sample(held_out, 5)
    base_loss = evaluate(model, unseen, pad=pad)
    before = [generate(model, tokenizer, c.question, limit=40) for c in asked]

    say("quantize to NF4, inject adapters")
    quantize_with_bar(model)
    nf4_loss = evaluate(model, unseen, pad=pad)
    planned = plan(model, config.r)
    print(planned)
    inject(model, config.r, seed=seed)

    say(
        f"train: {steps} steps of 8 from {len(training)} commands; {len(unseen)} commands of other tools are held out"
    )
    start = time.perf_counter()
    history = train_with_bar(model, training, config, pad=pad)
    seconds = time.perf_counter() - start
    tuned_loss = evaluate(model, unseen, pad=pad)
    after = [generate(model, tokenizer, c.question, limit=40) for c in asked]

    say("save the adapter, load it into a fresh model, merge")
    save_adapter(model, folder)
    probe = collate(unseen[:2], pad)["input_ids"]
    trained = logits(model, probe)
    del model
    gc.collect()
    fresh, _ = load_dense(DEMO_MODEL)
    quantize_with_bar(fresh)
    load_adapter(fresh, folder)
    reloaded = (logits(fresh, probe) - trained).abs().max().item()
    merged_loss = evaluate(merge(fresh), unseen, pad=pad)

    answers = list(zip(asked, before, after, strict=True))
    size = (folder / WEIGHTS).stat().st_size
    report = Report(
        base_loss,
        nf4_loss,
        tuned_loss,
        answers,
        planned,
        size,
        history,
        seconds,
        reloaded,
        merged_loss,
        peak_memory(),
    )
    draw(history, report, folder / "demo.png")
    write_text(
        folder / "report.md",
        f"# minilora demo\n\n![the losses, and answers before and after](demo.png)\n\n````text\n{report}\n````\n",
    )
    print(
        f"\n{report}\n\nwritten to {folder}/: {', '.join(sorted(p.name for p in folder.iterdir()))}"
    )
    return report


def say(what: str) -> None:
    """A line that says what comes next, in front of the progress bars."""
    print(f"\n* {what}", flush=True)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's logits in eval mode, float32."""
    return model.eval()(input_ids=ids).logits.float()  # type: ignore[no-any-return]


def draw(history: list[Step], report: Report, path: Path) -> None:
    """The demo in one picture: the losses, and what the model answered before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curve, words) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(
        "SmolLM2-135M learns to write shell commands: QLoRA on a CPU",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    losses = [s.loss for s in history]
    smooth = [
        sum(losses[max(0, i - 9) : i + 1]) / len(losses[max(0, i - 9) : i + 1])
        for i in range(len(losses))
    ]
    x = [s.step for s in history]
    curve.plot(x, losses, color="tab:blue", alpha=0.25, linewidth=1)
    curve.plot(x, smooth, color="tab:blue", linewidth=2, label="training, mean of 10 steps")
    for value, label, style in (
        (report.nf4_loss, "held out: base in NF4", ":"),
        (report.base_loss, "held out: unquantized base", "--"),
        (report.tuned_loss, "held out: fine-tuned", "-"),
    ):
        curve.axhline(value, color="tab:red", linestyle=style, linewidth=1.2)
        curve.annotate(
            f"{label} {value:.2f}",
            (1, value),
            (0, 3),
            curve.get_yaxis_transform(),
            "offset points",
            ha="right",
            fontsize=9,
        )
    curve.set(
        xlabel="step (8 commands each)",
        ylabel="nats a completion token",
        xlim=(1, max(2, len(history))),
    )
    curve.legend(fontsize=9, loc="lower left", frameon=False)
    curve.spines[["top", "right"]].set_visible(False)
    words.axis("off")
    y = iter(0.97 - 0.074 * i for i in range(100))
    words.text(0, next(y), "tools that it was never trained on", fontsize=10, color="0.4", va="top")
    for command, before, after in report.answers[:3]:
        next(y)
        words.text(
            0, next(y), _one_line(f"{command.tool}: {command.task}", 62), fontsize=10, va="top"
        )
        for name, text, colour in (
            ("before", before, "0.45"),
            ("after", after, "tab:blue"),
            ("sheet", command.command, "tab:green"),
        ):
            said = f"{name:<6}  {_one_line(text, 52)}"
            words.text(
                0.02,
                next(y),
                said,
                fontsize=9,
                family="monospace",
                va="top",
                color=colour,
                parse_math=False,
            )
    with atomic(path) as (temporary,):
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
