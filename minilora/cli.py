"""The command line: minilora demo | finetune | generate | merge | plan.

The options of `finetune` are the fields of `FinetuneConfig`; their help is its docstring. The other
commands reuse the texts.
"""

import contextlib
import dataclasses
import inspect
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minilora.training.config import FinetuneConfig

if TYPE_CHECKING:
    from torch import nn

    from minilora.huggingface.provenance import BaseChoice

app = typer.Typer(
    add_completion=False,
    invoke_without_command=True,
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
Quantize = Annotated[
    bool | None,
    typer.Option(
        help="Quantize the base model to 4-bit NormalFloat, or do not (default: as the adapter "
        "was trained; without an adapter, and where its file does not say, the base stays dense)."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="Device: cpu, cuda or mps (default: cuda if available, else cpu)."),
]
TrustRemoteCode = Annotated[bool, typer.Option(help=TEXTS["trust_remote_code"])]
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
    quantize: Quantize = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Generate an answer to a prompt with greedy decoding."""
    from minilora.huggingface.generation import generate as answer
    from minilora.huggingface.provenance import choose_base

    text = _read_prompt(prompt)
    choice = choose_base(adapter, quantize)
    base, tokenizer = _load(model, adapter, choice, device, trust_remote_code)
    print(answer(base, tokenizer, text, limit=max_new_tokens))


@app.command()
def merge(
    model: Model,
    adapter: Adapter,
    out: Annotated[str, typer.Option(help="Output folder; it must not exist yet.")],
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Merge an adapter into its base and save an ordinary transformers model.

    The base is what the adapter was trained on: quantized to NF4 and dequantized again, or dense.
    With --quantize or --no-quantize it is what you say.
    """
    from minilora.huggingface.provenance import Merged, choose_base, mark_merged
    from minilora.huggingface.saving import check_new_folder, save_model
    from minilora.merging import merge as run

    folder = check_new_folder(out)
    choice = choose_base(adapter, quantize)
    base, tokenizer = _load(model, adapter, choice, "cpu", trust_remote_code)
    merged = run(base)
    mark_merged(merged, Merged(model, adapter, quantized=choice.quantize is not None))
    save_model(merged, tokenizer, folder)
    print(f"merged model saved in {folder}/")


@app.command()
def plan(
    model: Model,
    r: Rank = 16,
    targets: Targets = "all-linear",
    quantize: Annotated[bool | None, typer.Option(help=TEXTS["quantize"])] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show which layers get adapters and how much memory a run needs (reads only the config)."""
    from minilora.huggingface.bundled import DEMO_MODEL, bundled_model_folder
    from minilora.huggingface.model_folder import read_config
    from minilora.huggingface.provenance import decide_quantize
    from minilora.reports.planning import plan as run

    source = bundled_model_folder() if model == DEMO_MODEL else model
    quantized = decide_quantize(quantize, read_config(source, trust_remote_code), model)
    print(
        run(
            source,
            r,
            targets=parse_targets(targets),
            quantize="all-linear" if quantized else False,
            trust_remote_code=trust_remote_code,
        )
    )


def _load(
    model: str, adapter: str | None, choice: "BaseChoice", device: str | None, trust: bool
) -> tuple["nn.Module", Any]:
    """The base as it was chosen, with the adapter, and its tokenizer."""
    from minilora.files.adapters import load_adapter
    from minilora.huggingface.loading import load_dense, pick_device
    from minilora.training.progress import quantize_with_progress

    if choice.note:
        _say(f"note: {choice.note}")
    base, tokenizer = load_dense(model, device=pick_device(device), trust_remote_code=trust)
    if choice.quantize is not None:
        quantize_with_progress(base, **choice.quantize)
    if adapter is not None:
        load_adapter(base, adapter, other_base=choice.other_base)
    return base, tokenizer


def _read_prompt(prompt: str) -> str:
    """The prompt, or standard input for '-'; it has to be text."""
    name, text = "--prompt", prompt.encode(errors="surrogateescape")
    if prompt == "-":
        if sys.stdin is None:
            raise ValueError("--prompt -: standard input is closed")
        name, text = "standard input", sys.stdin.buffer.read()
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from error


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """LoRA and QLoRA: fine-tune a language model, try it, merge it."""
    if isinstance(context.obj, _Invocation):
        context.obj.debug = debug
    if context.invoked_subcommand is None:
        print(context.get_help())


@dataclasses.dataclass
class _Invocation:
    """What one call of the command was asked for before its command."""

    debug: bool = False


# Of sysexits.h: an error inside the program, which is not the user's.
INTERNAL_ERROR = 70

# Errors that say what to do; any other one is a defect of minilora.
EXPECTED = (ValueError, TypeError, OSError, FloatingPointError)

LONGEST_MESSAGE = 3000


def main() -> None:
    """Runs the command line. An error is one line and an exit code; --debug adds a traceback."""
    _prepare_output()
    invocation = _Invocation()
    code = None
    try:
        try:
            code = app(obj=invocation, standalone_mode=False)
        finally:
            # Not at exit, where an error could no longer be shown.
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        sys.exit(1)
    except Exception as error:
        if invocation.debug:
            traceback.print_exc()
        text, code = describe(error)
        _say(text)
        _discard_output()
    sys.exit(code)


def describe(error: Exception) -> tuple[str, int]:
    """Returns the line that a user sees for an error, and the exit code."""
    if hasattr(error, "format_message") and hasattr(error, "ctx"):
        return _describe_usage(error)

    # Of PyTorch: a RuntimeError of this name, or one that only its text tells apart.
    no_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if no_memory or "can't allocate memory" in str(error):
        return f"out of memory: {error or 'the system gives no more'}; see `minilora plan`", 1
    if isinstance(error, EXPECTED) and str(error):
        return str(error), 1
    return (
        f"internal error: {error!r}. This is a defect of minilora: please report it with what "
        "`minilora --debug ...` prints",
        INTERNAL_ERROR,
    )


def _describe_usage(error: Any) -> tuple[str, int]:
    """The same for one of typer's errors: an option that is missing, unknown or misspelt."""
    command = error.ctx.command_path if error.ctx else "minilora"
    return f"{error.format_message()} (see `{command} --help`)", error.exit_code


def _say(text: str) -> None:
    """Prints one line to standard error; what controls a terminal is escaped."""
    from minilora.huggingface.messages import one_line

    if sys.stderr is not None:
        print(f"minilora: {one_line(text, LONGEST_MESSAGE)}", file=sys.stderr)


def _prepare_output() -> None:
    """One line per warning, no progress bars in files, and text that any terminal can show."""
    if sys.stderr is None or not sys.stderr.isatty():
        # The progress bars of transformers.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Their warnings are for programmers; what a user has to know is checked here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Makes sure that what could not be written is not written again at exit."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
