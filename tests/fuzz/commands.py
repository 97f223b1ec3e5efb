"""Command lines made from the flags that the commands declare, run through `minilora.cli.main`.

A case starts from a valid command line and changes up to three things: values of the wrong type or
at a boundary, missing and repeated options, options of other commands, paths that cannot be written
to. It ends with exit code 0 and the result that the library's functions give for the same options,
or with one line that names what is wrong, and everything as it was.
"""

import contextlib
import functools
import io
import json
import math
import os
import random
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_folder
import torch
import typer
from fuzzing import REFUSED, SAME, Wrong

CI, SAMPLE, FULL = 30, 150, 600
SECONDS = 10

ROOT = tiny_folder.shared()
ADAPTERS = ("on-nf4", "on-dense", "says-nothing")
INT, FLOAT, TEXT, FLAG = "int", "float", "text", "flag"

# Of each option: values that are valid for any combination of the others.
VALID: dict[str, list[Any]] = {
    "model": [ROOT / "model", ROOT / "shards"],
    "adapter": [ROOT / name for name in ADAPTERS],
    "data": [ROOT / "data.jsonl"],
    "prompt": ["say yes", "x", "Grüße 👋", "-"],
    "prompts": [ROOT / "prompts.txt", ROOT / "data.jsonl"],
    "system": ["be brief"],
    "temperature": [0.0, 0.7],
    "top_p": [0.5, 1.0],
    "max_new_tokens": [1, 2, 5],
    "device": ["cpu"],
    "r": [1, 2, 8],
    "targets": ["all-linear", "q_proj", "q_proj,v_proj", "self_attn.o_proj"],
    "alpha": [0.5, 16],
    "dropout": [0.0, 0.1],
    "lr": [1e-4, 1e-2],
    "steps": [1, 2],
    "epochs": [0.1, 1],
    "batch_size": [1, 3],
    "length": [8, 17],
    "grad_accum": [1, 2],
    "max_length": [32, 100],
    "weight_decay": [0.0, 0.1],
    "clip": [0.5],
    "eval_fraction": [0, 0.2],
    "seed": [0, 7],
    "save_every": [0, 1],
    "keep": [1, 2],
}
FLAGS = ["quantize", "learn_prompt", "checkpointing"]

# Values that an option of this kind may not have, or not of every command.
JUNK: dict[str, list[str]] = {
    INT: [
        "x",
        "1.5",
        "",
        "-1",
        "0",
        "1e3",
        "9" * 25,
        "9" * 5000,
        " 3 ",
        "0x10",
        "nan",
        "+2",
        "\u0661",
    ],
    FLOAT: ["x", "", "nan", "inf", "-inf", "1e400", "-1", "1e-320", "0", "1,5", "9" * 400, "0x1p3"],
    TEXT: ["", ".", "..", "/", "nowhere", "/nowhere/x", "x" * 5000, "ü\u202e\x1b[31m", "a\nb", "~"],
}
EXTRA: dict[str, list[str]] = {
    "device": [
        "cuda",
        "cuda:0",
        "cuda:-1",
        "mps",
        "xpu",
        "meta",
        "cpu:1",
        "CPU",
        "foo",
        "9" * 5000,
    ],
    "targets": ["", ",", "lm_head", "nope", "q_proj,nope", "(", ".*", "model", "embed_tokens"],
    "prompt": ["", "a" * 5000, "\u202e\x07", "{{ x }}", "<|im_end|>"],
    "model": [
        str(ROOT),
        str(ROOT / "on-nf4"),
        str(ROOT / "data.jsonl"),
        "../x",
        "a/b/c",
        "no/such",
    ],
    "prompts": [str(ROOT), "/dev/null", str(ROOT / "model" / "model.safetensors")],
    "system": ["", "a" * 5000, "\u202e\x07"],
    "temperature": ["1e-9", "1e9"],
    "top_p": ["2"],
    "adapter": [str(ROOT), str(ROOT / "model"), str(ROOT / "data.jsonl"), "/dev/null"],
    "data": [str(ROOT), "/dev/null", str(ROOT / "model" / "model.safetensors")],
    "out": ["out/", "a/b/out", "full", "file", "file/x", ".", "/dev/null/x", "/proc/x", "link"],
    "max_new_tokens": ["0", "-5", "100000", "300"],
    "batch_size": ["1000000"],
    "max_length": ["1", "2", "1000000"],
    "seed": ["-1", str(2**63), str(2**64)],
}
# Too slow, and not wrong: as many steps as are asked for.
SLOW = {"grad_accum", "steps", "epochs"}


def commands() -> dict[str, Any]:
    from minilora.cli import app

    return typer.main.get_command(app).commands  # type: ignore[attr-defined,no-any-return]


COMMANDS = commands()
CHOSEN = ("generate", "generate", "chat", "merge", "merge", "plan", "plan", "finetune", "demo")

# Options that every case gives, although a command can do without.
GIVEN = {"out", "steps", "batch_size", "max_new_tokens"}


class Line:
    """A command line: options with their values as text, in order; what was changed in it."""

    def __init__(self, command: str, rng: random.Random) -> None:
        self.command = command
        self.rng = rng
        self.options: dict[str, Any] = {}
        self.words: list[list[str]] = []
        self.changed: list[str] = []
        given, left_out = self.choose()
        for option in COMMANDS[command].params:
            required = option.required or option.name in given
            if option.name not in left_out and (required or rng.random() < 0.3):
                self.give(option)

    def choose(self) -> tuple[set[str], set[str]]:
        """Options that have to be given, and others that may not be given with them."""
        given, left_out = set(GIVEN), set()
        if self.command in ("generate", "chat", "merge"):
            # The base is named, or the adapter names it.
            chosen, other = self.rng.choice([("model", None), ("adapter", "model")])
            given.add(chosen)
            left_out.add(other)
        if self.command == "plan":
            # A batch has a length.
            given.add("length")
        if self.command == "generate":
            chosen, *others = self.rng.choice([("prompt", "prompts", "out"), ("prompts", "prompt")])
            given.add(chosen)
            left_out.update(others)
        return given, left_out

    def give(self, option: Any) -> None:
        """Gives an option a valid value, if there is one for it."""
        if option.name in FLAGS:
            self.options[option.name] = self.rng.random() < 0.5
            chosen = option.opts if self.options[option.name] else option.secondary_opts
            self.words.append([chosen[0]])
        elif option.name in VALID or option.name == "out":
            value = self.rng.choice(VALID.get(option.name, ["out"]))
            self.options[option.name] = value
            self.words.append([option.opts[0], str(value)])

    def harmless(self) -> None:
        """Another spelling or order of the same."""
        if self.rng.random() < 0.5:
            self.rng.shuffle(self.words)
        if self.rng.random() < 0.3:
            self.words = [["=".join(w)] if len(w) == 2 else w for w in self.words]

    def change(self) -> None:
        how = [self.junk] * 8 + [self.missing, self.no_value, self.unknown, self.foreign]
        how += [self.positional, self.typo, self.flag_with_value, self.twice]
        self.rng.choice(how)()

    def junk(self) -> None:
        with_value = [w for w in self.words if len(w) == 2]
        declared = {o.opts[0]: o for o in COMMANDS[self.command].params if kind(o) != FLAG}
        name = self.rng.choice(sorted(declared))
        known = declared[name].name
        values = JUNK[kind(declared[name])] + 3 * EXTRA.get(known, [])
        if known in SLOW:
            values = [v for v in values if not is_large(v)]
        value = self.rng.choice(values)
        for words in with_value:
            if words[0] == name:
                words[1] = value
                break
        else:
            self.words.append([name, value])
        self.changed += [name.lstrip("-"), known, value]
        if known == "system":
            # It is a part of the prompt.
            self.changed.append("prompt")
        self.options[known] = None

    def missing(self) -> None:
        if self.words:
            gone = self.words.pop(self.rng.randrange(len(self.words)))
            self.changed += [gone[0], "data", "prompt"]

    def no_value(self) -> None:
        with_value = [w for w in self.words if len(w) == 2]
        if with_value:
            words = self.rng.choice(with_value)
            self.changed += [*words, "--help"]
            self.words.remove(words)
            self.words.append(words[:1])

    def unknown(self) -> None:
        name = self.rng.choice(["--nope", "-x", "--", "---", "--\u202e", "--no-", "-", "--é=1"])
        self.words.insert(self.rng.randint(0, len(self.words)), [name])
        self.changed += [name, "--help"]

    def foreign(self) -> None:
        """An option of another command, or the global one in the wrong place."""
        others = {o.opts[0] for c in COMMANDS.values() for o in c.params} | {"--debug"}
        name = self.rng.choice(sorted(others - {o.opts[0] for o in COMMANDS[self.command].params}))
        self.words.append([name, "1"])
        self.changed += [name]

    def positional(self) -> None:
        word = self.rng.choice(["x", "", "generate", "-1"])
        self.words.append([word])
        self.changed += [word, "--help"]

    def typo(self) -> None:
        if self.words:
            words = self.rng.choice(self.words)
            words[0] = words[0][:-1] + self.rng.choice(["", "x", "_", words[0][-1:].upper()])
            self.changed += [*words, "--help"]

    def flag_with_value(self) -> None:
        flags = [o.opts[0] for o in COMMANDS[self.command].params if kind(o) == FLAG]
        if flags:
            name = self.rng.choice(flags)
            self.words.append([f"{name}={self.rng.choice(['1', 'no', ''])}"])
            self.changed += [name]

    def twice(self) -> None:
        if self.words:
            self.words.append(list(self.rng.choice(self.words)))
            self.changed += [*self.words[-1], "--help"]

    def arguments(self) -> list[str]:
        return [self.command, *(word for words in self.words for word in words)]


def kind(option: Any) -> str:
    kinds = {bool: FLAG, int: INT, float: FLOAT}
    return kinds.get(option.type_descriptor.annotation, TEXT)


def is_large(value: str) -> bool:
    with contextlib.suppress(ValueError):
        return math.isfinite(float(value)) and abs(float(value)) > 3
    return False


class Ended:
    """What one call of `main` printed, and its exit code."""

    def __init__(self, arguments: list[str]) -> None:
        from minilora.cli import main

        out, err = io.StringIO(), io.StringIO()
        stdin = io.TextIOWrapper(io.BytesIO(b"say no"))
        self.code: Any = 0
        patches = [
            mock.patch.object(sys, "argv", ["minilora", *arguments]),
            mock.patch.object(sys, "stdin", stdin),
            mock.patch.dict(os.environ),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ]
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            warnings.simplefilter("default")
            try:
                main()
            except SystemExit as left:
                self.code = left.code or 0
        self.out, self.err = out.getvalue(), err.getvalue()


def run(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    line = Line(rng.choice(CHOSEN), rng)
    changes = rng.choice([0, 1, 1, 1, 2, 3])
    for _ in range(changes):
        line.change()
    line.harmless()
    if line.command == "demo":
        # A demo takes minutes: one that starts has to be refused.
        line.words.append(["--steps", rng.choice(["x", "", "1.5", "nan"])])
        line.changed.append("steps")

    (folder / "full").mkdir()
    (folder / "full" / "kept.txt").write_text("kept")
    (folder / "file").write_text("kept")
    (folder / "link").symlink_to("nowhere-else")
    models = contents(ROOT)
    before = contents(folder)
    where = Path.cwd()
    os.chdir(folder)
    try:
        ended = Ended(line.arguments())
    finally:
        os.chdir(where)
    shown = shlex.join(line.arguments())[:500]
    if contents(ROOT) != models:
        raise Wrong("changed", f"the model's folder, by {shown}")

    check_messages(ended, shown)
    if ended.code:
        if contents(folder) != before:
            raise Wrong("changed", f"after {ended.err!r} of {shown}")
        check_named(ended, line, shown)
        return REFUSED
    gone = [path for path, content in before.items() if contents(folder).get(path) != content]
    if gone:
        raise Wrong("changed", f"{gone}, by {shown}")
    check_result(line, ended, folder, shown)
    return SAME


def contents(folder: Path) -> dict[str, Any]:
    return {
        str(path): path.read_bytes() if path.is_file() else path.is_symlink()
        for path in sorted(folder.rglob("*"))
    }


def check_messages(ended: Ended, shown: str) -> None:
    if "Traceback" in ended.err or "Traceback" in ended.out:
        raise Wrong("raw", f"a traceback, of {shown}: {ended.err[-1500:]}")
    if ended.code not in (0, 1, 2):
        raise Wrong("raw", f"exit code {ended.code}, of {shown}: {ended.err}")
    if any((ord(c) < 32 and c != "\n") or 0x2028 <= ord(c) <= 0x2069 for c in ended.err):
        raise Wrong("raw", f"{ended.err!r} controls the terminal, of {shown}")

    lines = ended.err.splitlines()
    said = [
        text for text in lines if not text.startswith(("minilora: note:", "minilora: warning:"))
    ]
    if ended.code == 0 and said:
        raise Wrong("raw", f"{said} without an error, of {shown}")
    if ended.code and (len(said) != 1 or not said[0].startswith("minilora: ")):
        raise Wrong("raw", f"{said} is not one line, of {shown}")


def check_named(ended: Ended, line: Line, shown: str) -> None:
    if not line.changed:
        raise Wrong("silent", f"{ended.err!r}, of the valid {shown}")
    parts = [part for text in line.changed for part in text.split(",") if part] + ["--help"]
    parts += [part.replace("-", "_") for part in parts] + ["target"]
    escaped = [part.encode("unicode_escape").decode()[:40] for part in parts]
    if not any(part[:40] in ended.err for part in [*parts, *escaped]):
        raise Wrong("raw", f"{ended.err!r} names none of {line.changed}, of {shown}")


def check_result(line: Line, ended: Ended, folder: Path, shown: str) -> None:
    """Compares what a command did with what the library's functions do."""
    if any(value is None for value in line.options.values()) or line.changed:
        # A value that was changed and is accepted: at least there is a result.
        if line.command == "plan" and "total" not in ended.out and "Usage" not in ended.out:
            raise Wrong("silent", f"{ended.out!r}, of {shown}")
        return
    expected, found = EXPECT[line.command](line.options, ended, folder)
    if expected != found:
        raise Wrong("silent", f"{found!r} instead of {expected!r}, of {shown}"[:3000])


def base(options: dict[str, Any]) -> Any:
    """The base, with the adapter, as the options and the adapter's file say."""
    import minilora
    from minilora.huggingface import load_dense

    # The adapters name this model.
    model, tokenizer = load_dense(options.get("model", ROOT / "model"))
    adapter = options.get("adapter")
    default = adapter is not None and adapter.name == "on-nf4"
    if options.get("quantize", default):
        minilora.quantize(model)
    if adapter is not None:
        minilora.load_adapter(model, adapter, other_base=True)
    return model, tokenizer


def expect_generate(options: dict[str, Any], ended: Ended, folder: Path) -> tuple[Any, Any]:
    from minilora.huggingface import generate, generate_batch
    from minilora.training.prompts import read_prompts

    settings: Any = {"limit": options["max_new_tokens"], "sampling": sampling(options)}
    if "prompts" not in options:
        prompt = "say no" if options["prompt"] == "-" else options["prompt"]
        return generate(*base(options), prompt, **settings) + "\n", ended.out

    written = (folder / "out").read_text() if "out" in options else ended.out
    prompts = read_prompts(options["prompts"])
    found = [json.loads(line) for line in written.splitlines()]
    assert [record["prompt"] for record in found] == prompts
    settings["batch_size"] = options["batch_size"]
    expected = generate_batch(*base(options), prompts, **settings)
    return expected, [record["answer"] for record in found]


def sampling(options: dict[str, Any]) -> Any:
    from minilora.huggingface import Sampling

    names = ("temperature", "top_p", "seed")
    return Sampling(**{name: options[name] for name in names if name in options})


def expect_chat(options: dict[str, Any], ended: Ended, folder: Path) -> tuple[Any, Any]:
    from minilora.huggingface import generate

    turns = [{"role": "user", "content": "say no"}]
    if "system" in options:
        turns.insert(0, {"role": "system", "content": options["system"]})
    settings: Any = {"limit": options["max_new_tokens"], "sampling": sampling(options)}
    return generate(*base(options), turns, **settings) + "\n", ended.out


def expect_merge(options: dict[str, Any], ended: Ended, folder: Path) -> tuple[Any, Any]:
    import minilora
    from minilora.huggingface import load_dense

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = minilora.merge(base(options)[0]).state_dict()
    found = load_dense(folder / "out")[0].state_dict()
    same = expected.keys() == found.keys()
    return True, same and all(torch.equal(expected[key], found[key]) for key in expected)


def expect_plan(options: dict[str, Any], ended: Ended, folder: Path) -> tuple[Any, Any]:
    import minilora
    from minilora.cli import parse_targets

    targets = parse_targets(options.get("targets", "all-linear"))
    quantize = "all-linear" if options.get("quantize", True) else False
    batch = ("batch_size", "length", "checkpointing", "dropout")
    plan = minilora.plan(
        str(options["model"]),
        options.get("r", 16),
        targets=targets,
        quantize=quantize,
        **{name: options[name] for name in batch if name in options},
    )
    return f"{plan}\n", ended.out


def expect_finetune(options: dict[str, Any], ended: Ended, folder: Path) -> tuple[Any, Any]:
    """The same run as one call of `finetune`, tensor for tensor."""
    from minilora.cli import parse_targets
    from minilora.files.tensors import read_tensors
    from minilora.training import FinetuneConfig, finetune

    given = {key: str(v) if isinstance(v, Path) else v for key, v in options.items()}
    given["targets"] = parse_targets(given.get("targets", "all-linear"))
    given["out"] = str(folder / "again")
    with contextlib.redirect_stderr(io.StringIO()):
        finetune(FinetuneConfig(**given))
    name = "adapter_model.safetensors"
    expected, found = (read_tensors(folder / out / name)[0] for out in ("again", "out"))
    same = expected.keys() == found.keys()
    return True, same and all(torch.equal(expected[key], found[key]) for key in expected)


EXPECT = {
    "generate": expect_generate,
    "chat": expect_chat,
    "merge": expect_merge,
    "plan": expect_plan,
    "finetune": expect_finetune,
}


@functools.cache
def prepare() -> None:
    """What every process pays once is no part of a case."""
    options = {"model": ROOT / "model", "adapter": ROOT / "on-nf4", "prompt": "x"}
    expect_generate({**options, "max_new_tokens": 1}, Ended(["--help"]), ROOT)
