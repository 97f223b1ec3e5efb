"""The command line: minilora demo | finetune | generate | chat | merge | plan.

The options of `finetune` are the fields of `FinetuneConfig`; their help is its docstring. The other
commands reuse the texts.
"""

import dataclasses
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

import minilora
from minilora.huggingface.sampling import GREEDY, Sampling
from minilora.reports.dry_run import DryRun
from minilora.reports.errors import describe
from minilora.reports.terminal import discard_output, prepare_output, say
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

# torchrun reads the options of the program that it starts, too, and takes --r for a beginning of
# several of its own.
NAMES = {"r": ("--r", "--rank")}

SAMPLING_TEXTS = attribute_texts(Sampling)

Model = Annotated[str, typer.Option(help=TEXTS["model"])]
Base = Annotated[
    str | None, typer.Option(help=f"{TEXTS['model'][:-1]} (default: the one that --adapter names).")
]
Adapter = Annotated[str, typer.Option(help="Folder of an adapter, minilora's or PEFT's.")]
OptionalAdapter = Annotated[
    str | None, typer.Option(help="Folder of an adapter (default: none, the base model alone).")
]
MaxNewTokens = Annotated[int, typer.Option(help="Maximum number of new tokens per answer.")]
Temperature = Annotated[float, typer.Option(help=SAMPLING_TEXTS["temperature"])]
TopP = Annotated[float, typer.Option(help=SAMPLING_TEXTS["top_p"])]
SamplingSeed = Annotated[int, typer.Option(help=SAMPLING_TEXTS["seed"])]
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
                annotation=Annotated[
                    kind, typer.Option(*NAMES.get(field.name, ()), help=texts[field.name])
                ],
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


@contextmanager
def _interruptible() -> Iterator[None]:
    """An interrupted run ends with one line and the exit code that a signal has."""
    from minilora.training import Interrupted

    try:
        yield
    except Interrupted as error:
        # Typer would swallow the message of a KeyboardInterrupt.
        say(str(error))
        raise typer.Exit(128 + error.signal) from None


@app.command(short_help="Fine-tune SmolLM2-135M on a CPU, as a demo.")
def demo(
    task: Annotated[
        str,
        typer.Argument(
            metavar="[orders|shell]",
            help="What to learn: orders (a customer's message becomes a line for the stockroom), "
            "or shell (a task becomes a shell command), which is too hard for the model.",
        ),
    ] = "orders",
    out: Annotated[
        str, typer.Option(help="Output folder; a demo that it contains is replaced.")
    ] = "runs/demo",
    steps: Annotated[
        int | None,
        typer.Option(help="Number of optimizer steps (default: 36 for orders, 100 for shell)."),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Run QLoRA on SmolLM2-135M, from the model to the merged adapter, on a CPU."""
    from minilora.demo.run import run_demo

    with _interruptible():
        run_demo(task, out, steps, seed)


@app.command()
@options_of(FinetuneConfig)
def finetune(**options: Any) -> None:
    """Fine-tune a causal language model on your own data."""
    from minilora.distributed.processes import is_first_process
    from minilora.reports.formatting import format_bytes
    from minilora.training import finetune as run
    from minilora.training.progress import peak_memory
    from minilora.training.report import REPORT, next_commands

    options["targets"] = parse_targets(options["targets"])
    config = FinetuneConfig(**options)
    with _interruptible():
        result = run(config)
    if not is_first_process():
        return
    print(f"\n{result}\n")
    if memory := peak_memory():
        print(f"peak memory: {format_bytes(memory)}")
    print(f"full report: {config.out}/{REPORT}")
    print("\n".join(["", "next steps:", *(f"  {line}" for line in next_commands(config))]))


@app.command()
def generate(
    model: Base = None,
    adapter: OptionalAdapter = None,
    prompt: Annotated[
        str | None, typer.Option(help="The prompt; '-' reads standard input.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="File of prompts, instead of --prompt: a text with one per line, or the other "
            "formats of --data, with 'prompt' or 'messages'. The answers are JSON Lines: "
            '{"prompt": ..., "answer": ...}.'
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="File for the answers to --prompts; it must not exist yet (default: standard "
            "output)."
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    batch_size: Annotated[
        int, typer.Option(help="Number of prompts of --prompts that are answered at a time.")
    ] = 8,
    temperature: Temperature = GREEDY.temperature,
    top_p: TopP = GREEDY.top_p,
    seed: SamplingSeed = GREEDY.seed,
    quantize: Quantize = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Generate an answer to a prompt, or to each prompt of a file."""
    from minilora.huggingface.console import print_answer, read_prompt
    from minilora.huggingface.generation import check_batch_size, check_limit
    from minilora.huggingface.generation import generate as answer
    from minilora.huggingface.provenance import choose_base
    from minilora.huggingface.saving import check_new_path
    from minilora.training.prompts import answer_prompts, read_prompts

    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give either --prompt or --prompts")
    if out is not None and prompts is None:
        raise typer.BadParameter("--out is for the answers to --prompts")
    if out is not None:
        check_new_path(out)
    check_limit(max_new_tokens)
    check_batch_size(batch_size)
    asked = [read_prompt(prompt)] if prompt is not None else read_prompts(str(prompts))
    sampling = Sampling(temperature, top_p, seed)
    choice = choose_base(model, adapter, quantize, trust_remote_code)
    base, tokenizer = _load(choice, adapter, device, trust_remote_code)
    options: Any = {"limit": max_new_tokens, "sampling": sampling}
    if prompt is not None:
        print_answer(answer(base, tokenizer, asked[0], **options), sys.stdout)
    else:
        answer_prompts(base, tokenizer, asked, out, batch_size=batch_size, **options)


@app.command()
def chat(
    model: Base = None,
    adapter: OptionalAdapter = None,
    system: Annotated[
        str | None, typer.Option(help="System message (default: the chat template's).")
    ] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = GREEDY.temperature,
    top_p: TopP = GREEDY.top_p,
    seed: SamplingSeed = GREEDY.seed,
    quantize: Quantize = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a model, and switch its adapter off and on to compare.

    /help lists the commands of the conversation. Without a terminal, each line of standard input
    is answered on standard output; blank lines are skipped, and commands are executed. A program
    that has many prompts asks them with `minilora generate --prompts`, whose answers are JSON.
    """
    from minilora.huggingface.chat import Chat
    from minilora.huggingface.console import Console
    from minilora.huggingface.conversation import Conversation
    from minilora.huggingface.generation import check_limit
    from minilora.huggingface.provenance import choose_base

    if sys.stdin is None or sys.stdout is None:
        raise ValueError("standard input or output is closed: there is nobody to talk to")
    check_limit(max_new_tokens)
    sampling = Sampling(temperature, top_p, seed)
    choice = choose_base(model, adapter, quantize, trust_remote_code)
    base, tokenizer = _load(choice, adapter, device, trust_remote_code)
    conversation = Conversation(
        base, tokenizer, limit=max_new_tokens, sampling=sampling, system=system
    )
    Chat(conversation, Console(sys.stdin, sys.stdout, lambda text: say(f"note: {text}"))).run()


@app.command(short_help="Merge an adapter into its base and save the model.")
def merge(
    adapter: Adapter,
    out: Annotated[str, typer.Option(help="Output folder; it must not exist yet.")],
    model: Base = None,
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Merge an adapter into its base and save an ordinary transformers model.

    The base is what the adapter was trained on: quantized to NF4 and dequantized again, or dense.
    With --quantize or --no-quantize it is what you say.
    """
    from minilora.huggingface.provenance import Merged, choose_base, mark_merged
    from minilora.huggingface.saving import check_new_path, save_model
    from minilora.merging import merge as run

    folder = check_new_path(out)
    choice = choose_base(model, adapter, quantize, trust_remote_code)
    base, tokenizer = _load(choice, adapter, "cpu", trust_remote_code)
    quantized = any(isinstance(module, minilora.NF4Linear) for module in base.modules())
    merged = run(base)
    mark_merged(merged, Merged(choice.name, adapter, quantized=quantized))
    save_model(merged, tokenizer, folder)
    print(f"merged model saved in {folder}/")


@app.command(short_help="Show layers and memory before a run.")
@options_of(DryRun)
def plan(**options: Any) -> None:
    """Show which layers get adapters and how much memory a run needs (reads only the config)."""
    options["targets"] = parse_targets(options["targets"])
    print(DryRun(**options))


def _load(
    choice: "BaseChoice", adapter: str | None, device: str | None, trust_remote_code: bool
) -> tuple["nn.Module", Any]:
    """The base as it was chosen, with the adapter, and its tokenizer."""
    from minilora.files.adapters import load_adapter
    from minilora.huggingface.base_model import load_base
    from minilora.huggingface.loading import pick_device

    for note in choice.notes:
        say(f"note: {note}")
    base, tokenizer = load_base(
        choice.name,
        quantize=choice.quantize,
        dense=choice.dense,
        device=pick_device(device),
        trust_remote_code=trust_remote_code,
    )
    if adapter is not None:
        load_adapter(base, adapter, other_base=choice.other_base)
    return base, tokenizer


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """LoRA and QLoRA: fine-tune a language model, try it, merge it."""
    if version:
        print(f"minilora {minilora.__version__}")
        raise typer.Exit
    if isinstance(context.obj, _Invocation):
        context.obj.debug = debug
    if context.invoked_subcommand is None:
        print(context.get_help())


@dataclasses.dataclass
class _Invocation:
    """What one call of the command was asked for before its command."""

    debug: bool = False


def main() -> None:
    """Runs the command line. An error is one line and an exit code; --debug adds a traceback."""
    prepare_output()
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
        discard_output()
        sys.exit(1)
    except Exception as error:
        if invocation.debug:
            traceback.print_exc()
        text, code = describe(error)
        say(text)
        discard_output()
    sys.exit(code)
