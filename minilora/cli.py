"""The command line: minilora demo | finetune | generate | merge | plan.

The options of `finetune` are the fields of `FinetuneConfig`; their help is its docstring. The other
commands reuse the texts.
"""

import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minilora.training.config import FinetuneConfig

if TYPE_CHECKING:
    from torch import nn

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def attribute_texts(documented: type) -> dict[str, str]:
    """Returns the descriptions under `Attributes:` in a class's docstring, by attribute."""
    section = re.search(
        r"^Attributes:\n(.*?)(?=^\S|\Z)", inspect.getdoc(documented) or "", re.DOTALL | re.MULTILINE
    )
    # An attribute's text goes on in lines that are indented further.
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.M)
    return {name: " ".join(text.split()) for name, text in entries}


TEXTS = attribute_texts(FinetuneConfig)

# The types of `FinetuneConfig` that an option cannot have, and what it has instead.
OPTION_TYPES: dict[Any, Any] = {str | Sequence[str]: str}

Model = Annotated[str, typer.Option(help=TEXTS["model"])]
Adapter = Annotated[str, typer.Option(help="Folder of an adapter, minilora's or PEFT's.")]
Quantize = Annotated[bool, typer.Option(help=TEXTS["quantize"])]
Device = Annotated[
    str | None, typer.Option(help="Device: cpu or cuda (default: GPU if available).")
]
Targets = Annotated[str, typer.Option(help=TEXTS["targets"])]
Rank = Annotated[int, typer.Option(help=TEXTS["r"])]
Seed = Annotated[int, typer.Option(help=TEXTS["seed"])]


def options_of(config: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command with **options one option for each field of a dataclass."""
    texts = attribute_texts(config)
    parameters = []
    for field in dataclasses.fields(config):
        kind: Any = OPTION_TYPES.get(field.type, field.type)
        required = field.default is dataclasses.MISSING
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if required else field.default,
                annotation=Annotated[kind, typer.Option(help=texts[field.name])],
            )
        )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        # What typer reads instead of **options.
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def parse_targets(text: str) -> str | list[str]:
    """Splits names at commas; a single name stays a string."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return names if len(names) != 1 else names[0]


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Output folder.")] = "runs/demo",
    steps: Annotated[int, typer.Option(help="Number of optimizer steps.")] = 100,
    seed: Seed = 0,
) -> None:
    """Run QLoRA on SmolLM2-135M, from the model to the merged adapter, on a CPU."""
    from minilora.demo.run import run_demo

    run_demo(out, steps, seed)


@app.command()
@options_of(FinetuneConfig)
def finetune(**options: Any) -> None:
    """Fine-tune a causal language model on your own data."""
    from minilora.reports.formatting import format_bytes
    from minilora.training import Interrupted
    from minilora.training import finetune as run
    from minilora.training.progress import peak_memory

    options["targets"] = parse_targets(options["targets"])
    try:
        result = run(FinetuneConfig(**options))
    except Interrupted as error:
        # Typer would swallow the message of a KeyboardInterrupt.
        print(f"minilora: {error}", file=sys.stderr)
        raise typer.Exit(128 + error.signal) from None
    print(result)
    print(f"peak memory {format_bytes(peak_memory())}")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The prompt; '-' reads standard input.")],
    adapter: Annotated[
        str | None, typer.Option(help="Folder of an adapter (default: none, the base model alone).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.")] = 128,
    quantize: Quantize = True,
    device: Device = None,
) -> None:
    """Generate an answer to a prompt with greedy decoding."""
    from minilora.huggingface.generation import generate as answer
    from minilora.huggingface.loading import load_dense, pick_device

    base, tokenizer = load_dense(model, device=pick_device(device))
    base = _with_adapter(base, adapter, quantize)
    text = sys.stdin.read() if prompt == "-" else prompt
    print(answer(base, tokenizer, text, limit=max_new_tokens))


@app.command()
def merge(
    model: Model,
    adapter: Adapter,
    out: Annotated[str, typer.Option(help="Output folder; it must not exist yet.")],
    quantize: Quantize = True,
) -> None:
    """Merge an adapter into its base and save an ordinary transformers model.

    With --quantize, the adapter is added to the base that it was trained on, quantized to NF4 and
    dequantized again. With --no-quantize, it is added to the original base.
    """
    from minilora.files.atomic import atomic_folder
    from minilora.huggingface.loading import load_dense
    from minilora.merging import merge as run

    folder = Path(out)
    if folder.exists():
        raise ValueError(f"{folder} already exists: choose another --out, or remove it")
    base, tokenizer = load_dense(model)
    merged = run(_with_adapter(base, adapter, quantize))
    with atomic_folder(folder) as temporary:
        merged.save_pretrained(temporary)  # type: ignore[operator]
        tokenizer.save_pretrained(temporary)
    print(f"merged model saved in {folder}/")


@app.command()
def plan(
    model: Model,
    r: Rank = 16,
    targets: Targets = "all-linear",
    quantize: Quantize = True,
) -> None:
    """Show which layers get adapters and how much memory a run needs (reads only the config)."""
    from minilora.huggingface.bundled import DEMO_MODEL, bundled_model_folder
    from minilora.reports.planning import plan as run

    source = bundled_model_folder() if model == DEMO_MODEL else model
    quantized = "all-linear" if quantize else False
    print(run(source, r, targets=parse_targets(targets), quantize=quantized))


def _with_adapter(model: "nn.Module", adapter: str | None, quantize: bool) -> "nn.Module":
    from minilora.files.adapters import load_adapter
    from minilora.training.progress import quantize_with_progress

    if quantize:
        quantize_with_progress(model)
    return model if adapter is None else load_adapter(model, adapter)


def main() -> None:
    """Runs the command line. An expected error is one line and exit code 1, not a traceback."""
    if not sys.stderr.isatty():
        # The progress bars of transformers.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"minilora: {error}", file=sys.stderr)
        sys.exit(1)
