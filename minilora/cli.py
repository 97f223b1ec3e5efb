"""The command line: minilora demo | finetune | generate | merge | plan."""

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import nn

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str,
    typer.Option(
        help="Folder or hub id of a causal language model; 'smollm2' is the embedded one."
    ),
]
Adapter = Annotated[str, typer.Option(help="Folder of an adapter, minilora's or PEFT's.")]
Quantize = Annotated[bool, typer.Option(help="Hold the base in 4-bit NormalFloat (QLoRA).")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; left out: the GPU if there is one.")]
Targets = Annotated[str, typer.Option(help="all-linear, or names with commas: q_proj,v_proj.")]


def _targets(text: str) -> str | list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    return names if len(names) != 1 else names[0]


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Folder for the run.")] = "runs/demo",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    seed: Annotated[
        int, typer.Option(help="Decides the hold-out, the order and the adapter's start.")
    ] = 0,
) -> None:
    """QLoRA on SmolLM2-135M, from the model to the merged adapter, on a CPU."""
    from minilora.demo.run import run

    run(out, steps, seed)


@app.command()
def finetune(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="JSONL with prompt/completion, messages or text in each line; or a text file."
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder for the adapter and the metrics.")],
    r: Annotated[int, typer.Option(help="Rank.")] = 16,
    alpha: Annotated[
        float | None, typer.Option(help="Scale of the update is alpha / r; left out: 2 r.")
    ] = None,
    targets: Targets = "all-linear",
    dropout: Annotated[float, typer.Option(help="Dropout on the adapters' input.")] = 0.0,
    lr: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 2e-4,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; left out: --epochs decides.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the examples.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward pass.")] = 8,
    grad_accum: Annotated[int, typer.Option(help="Forward passes in a step.")] = 1,
    max_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    quantize: Quantize = True,
    learn_prompt: Annotated[
        bool, typer.Option(help="Learn the prompt too, not the answer alone.")
    ] = False,
    eval_fraction: Annotated[
        float, typer.Option(help="Share of the examples that is held out.")
    ] = 0.05,
    seed: Annotated[
        int, typer.Option(help="Decides the hold-out, the order and the adapter's start.")
    ] = 0,
    device: Device = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            help="Gradient checkpointing: less memory, more time; left out: with --quantize."
        ),
    ] = None,
    save_every: Annotated[
        int, typer.Option(help="Steps between two checkpoints of the run; 0: only when stopped.")
    ] = 100,
    keep: Annotated[int, typer.Option(help="Checkpoints that are kept, the last ones.")] = 2,
    resume: Annotated[
        bool, typer.Option(help="Go on from the newest whole checkpoint in --out.")
    ] = False,
) -> None:
    """Fine-tune a causal language model on your own data."""
    from minilora.reports.planning import amount
    from minilora.training.checkpoints import Interrupted
    from minilora.training.loop import FinetuneConfig, peak_memory
    from minilora.training.loop import finetune as run

    config = FinetuneConfig(
        model=model,
        data=data,
        out=out,
        r=r,
        alpha=alpha,
        targets=_targets(targets),
        dropout=dropout,
        lr=lr,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        grad_accum=grad_accum,
        max_length=max_length,
        quantize=quantize,
        learn_prompt=learn_prompt,
        eval_fraction=eval_fraction,
        seed=seed,
        device=device,
        checkpointing=checkpointing,
        save_every=save_every,
        keep=keep,
        resume=resume,
    )
    try:
        result = run(config)
    except Interrupted as stopped:  # typer would swallow what a KeyboardInterrupt says
        print(f"minilora: {stopped}", file=sys.stderr)
        raise typer.Exit(128 + stopped.signal) from None
    print(result)
    print(f"peak memory {amount(peak_memory())}")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What to ask; '-' reads standard input.")],
    adapter: Annotated[
        str | None, typer.Option(help="Folder of an adapter; left out: the base alone.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 128,
    quantize: Quantize = True,
    device: Device = None,
) -> None:
    """Answer a prompt, greedily."""
    from minilora.huggingface.loading import generate as answer
    from minilora.huggingface.loading import load_dense, pick_device

    base, tokenizer = load_dense(model, device=pick_device(device))
    base = _with_adapter(base, adapter, quantize)
    print(
        answer(base, tokenizer, sys.stdin.read() if prompt == "-" else prompt, limit=max_new_tokens)
    )


@app.command()
def merge(
    model: Model,
    adapter: Adapter,
    out: Annotated[str, typer.Option(help="Folder for the merged model; it must not exist yet.")],
    quantize: Quantize = True,
) -> None:
    """Write base + adapter as an ordinary transformers folder.

    With --quantize the adapter is added to the base as it was trained on, in NF4 and decoded again; with --no-quantize to the
    dense base, which is closer to the original and further from what the training saw.
    """
    from minilora.huggingface.loading import load_dense
    from minilora.merging import merge as run

    folder = Path(out)
    if folder.exists():
        raise ValueError(f"{folder} exists already: choose another --out, or remove it")
    base, tokenizer = load_dense(model)
    merged = run(_with_adapter(base, adapter, quantize))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(partial)  # type: ignore[operator]
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    print(f"merged model in {folder}/")


@app.command()
def plan(
    model: Model,
    r: Annotated[int, typer.Option(help="Rank.")] = 16,
    targets: Targets = "all-linear",
    quantize: Quantize = True,
) -> None:
    """What would be wrapped and what a run will need, from the config alone: nothing is loaded."""
    from minilora.huggingface.loading import DEMO_MODEL, demo_folder
    from minilora.reports.planning import plan as run

    source, in_nf4 = (
        demo_folder() if model == DEMO_MODEL else model,
        "all-linear" if quantize else False,
    )
    print(run(source, r, targets=_targets(targets), quantize=in_nf4))


def _with_adapter(model: "nn.Module", adapter: str | None, quantize: bool) -> "nn.Module":
    from minilora.files.adapters import load_adapter
    from minilora.training.loop import quantize_with_bar

    if quantize:
        quantize_with_bar(model)
    return model if adapter is None else load_adapter(model, adapter)


def main() -> None:
    """Runs the command line; an error that names its way out is one line, not a traceback."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the bars of transformers
    try:
        app()
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"minilora: {error}", file=sys.stderr)
        sys.exit(1)
