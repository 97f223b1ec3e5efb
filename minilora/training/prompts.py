"""Files of prompts, in the formats of the data that a model is trained on, and their answers."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from minilora.files.atomic import atomic_files
from minilora.files.text import is_harmless, shown
from minilora.huggingface.generation import Prompt, generate_batch
from minilora.training.formats import read_rows
from minilora.training.progress import progress_bar
from minilora.training.records import UNSUPPORTED, check_record, check_supported, is_absent

# What stands for the answer that a prompt is to get, when it is checked as a record.
_ANSWER = "?"


def read_prompts(path: str | Path) -> list[Prompt]:
    r"""Reads and checks a whole file of prompts, without a tokenizer or a model.

    A text (.txt, .md) has one prompt per line; blank lines are skipped. Any other format of
    `read_records` has one prompt per record: "prompt", or "messages" up to the last that is not
    the assistant's. A completion is not looked at, so a file of training data will do.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or empty, or a record has no prompt, or one with tools. The
            message names the file and the line.

    Example:
        >>> file = tmp / "prompts.txt"
        >>> _ = file.write_text("2 + 2?\n\n3 + 3?\n")
        >>> read_prompts(file)
        ['2 + 2?', '3 + 3?']
    """
    rows = read_rows(path, ("prompt", "messages", *UNSUPPORTED))
    prompts: list[Prompt]
    if str(path).lower().removesuffix(".gz").endswith((".txt", ".md")):
        prompts = [line for _, row in rows for line in row["text"].split("\n") if line.strip()]
    else:
        prompts = [_prompt_of(row, where) for where, row in rows]
    if not prompts:
        raise ValueError(f"{shown(path, 1000)} is empty: it holds no prompt")
    return prompts


def _prompt_of(row: dict[str, Any], where: str) -> Prompt:
    """The prompt of a record: a record is one with its answer."""
    given = [column for column in ("prompt", "messages") if not is_absent(row.get(column))]
    if len(given) != 1:
        raise ValueError(
            f"{where} has the keys {shown(sorted(map(str, row)))}; expected one of "
            '{"prompt": ...}, {"messages": [{"role": ..., "content": ...}, ...]}'
        )
    check_supported(row, where)
    if given == ["prompt"]:
        record = {"prompt": row["prompt"], "completion": _ANSWER}
        return str(check_record(record, where)["prompt"])

    messages = row["messages"]
    if isinstance(messages, list):
        messages = [*messages, {"role": "assistant", "content": _ANSWER}]
    turns: list[dict[str, str]] = check_record({"messages": messages}, where)["messages"]
    while turns[-1]["role"] == "assistant":
        turns.pop()
    return turns


def answer_prompts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    out: str | Path | None = None,
    **options: Any,
) -> None:
    """Answers prompts and writes the answers as JSON Lines, with a progress bar on terminals.

    Args:
        model, tokenizer, prompts, options: see `generate_batch`.
        out: a file, which is complete or absent; None: standard output.
    """
    with progress_bar("generate", len(prompts)) as bar:
        answers = generate_batch(model, tokenizer, prompts, progress=bar.update, **options)

    if out is not None:
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_files(path) as (file,):
            file.write_text(answers_as_json(prompts, answers), encoding="utf-8")
    elif sys.stdout is not None:
        # A letter that the encoding lacks would be escaped, but not as JSON does.
        utf8 = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
        print(answers_as_json(prompts, answers, ascii_only=not utf8), end="")


def answers_as_json(
    prompts: Sequence[Prompt], answers: Sequence[str], ascii_only: bool = False
) -> str:
    r"""Returns JSON Lines, {"prompt": ..., "answer": ...}; what controls a terminal is escaped.

    Example:
        >>> print(answers_as_json(["2 + 2?"], ["\x9b4"]), end="")
        {"prompt": "2 + 2?", "answer": "\u009b4"}
    """
    lines = [
        json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=ascii_only) + "\n"
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return "".join(c if is_harmless(c) else json.dumps(c)[1:-1] for c in "".join(lines))
