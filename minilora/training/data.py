"""From a user's file to token batches: reading with line numbers, the chat template, which tokens are learned, padding.

What is masked is masked by position, never by token id: in many tokenizers (SmolLM2's too) the padding token *is* the
end-of-turn token, and masking by id would never teach the model to stop.
"""

import json
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # the label that cross_entropy leaves out


@dataclass(frozen=True)
class Example:
    """One training sequence: token ids, and as labels the same ids or IGNORE where nothing is to be learned."""

    ids: list[int]
    labels: list[int]
    cut: bool = False  # the answer went on past max_length
    where: str = field(default="", compare=False)  # "file:line", for errors

    @property
    def learned(self) -> int:
        """Tokens that the loss sees: the first one of a sequence is never predicted."""
        return sum(label != IGNORE for label in self.labels[1:])


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", record) of a JSONL file; any other file is one record {"text": ...}.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no JSON object or has none of the known forms (file and line are named); the file is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    if path.suffix not in (".jsonl", ".json"):
        text = _text(path)
        if not text.strip():
            raise ValueError(f"{path} is empty")
        yield str(path), {"text": text}
        return
    found = False
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            found = True
            yield f"{path}:{number}", _record(line, f"{path}:{number}")
    if not found:
        raise ValueError(f"{path} is empty: one JSON object a line is expected")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a JSON {type(record).__name__}, not an object")
    if isinstance(record.get("text"), str) and record["text"]:
        return record
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return record
    messages = record.get("messages")
    if (
        isinstance(messages, list)
        and messages
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    ):
        return record
    raise ValueError(
        f"{where} has the keys {sorted(record)}; a line is "
        '{"prompt": ..., "completion": ...}, {"messages": [{"role": ..., "content": ...}, ...]} or {"text": ...}'
    )


def encode(
    record: dict[str, Any],
    tokenizer: Any,
    max_length: int,
    *,
    learn_prompt: bool = False,
    where: str = "the record",
) -> list[Example]:
    """Turns a record into training sequences: one for a conversation, as many as it takes for a text.

    {"prompt", "completion"} is a conversation of two turns. A conversation is rendered by the tokenizer's own chat template and
    learned in what the assistant says, its end-of-turn token included; a completion that is too long is cut. A text is taken as
    it is and learned throughout.

    Raises:
        ValueError: the tokenizer has no chat template, the prompt leaves no room within max_length, or there is nothing to learn.
    """
    if "text" in record and "messages" not in record and "prompt" not in record:
        ids = tokenizer(record["text"])["input_ids"]
        windows = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
        return [Example(w, list(w), where=where) for w in windows if len(w) > 1]
    messages = record.get("messages") or [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": record["completion"]},
    ]
    text, spans = _render(messages, tokenizer, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    learned = [
        learn_prompt or any(start <= a and b <= end and a < b for start, end in spans)
        for a, b in offsets
    ]
    if True not in learned[1:max_length]:
        first = learned.index(True) if True in learned else len(ids)
        raise ValueError(
            f"{where}: the prompt takes {first} tokens, which leaves no room for the answer within max_length={max_length}: "
            "raise max_length, or shorten the prompt"
            if True in learned
            else f"{where}: the assistant says nothing, there is nothing to learn"
        )
    labels = [i if yes else IGNORE for i, yes in zip(ids, learned, strict=True)]
    return [Example(ids[:max_length], labels[:max_length], cut=len(ids) > max_length, where=where)]


def _render(
    messages: list[dict[str, Any]], tokenizer: Any, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """Returns the conversation as text, and where in it [start, end) the assistant speaks."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} is a conversation, but this tokenizer has no chat template: take an instruction-tuned model, "
            'or render it yourself into {"text": ...}'
        )
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(
                messages[:i], tokenize=False, add_generation_prompt=True
            )
            after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            if not text.startswith(before) or not text.startswith(after.rstrip()):
                raise ValueError(
                    f"{where}: this chat template rewrites earlier turns, so what the assistant said in turn {i + 1} cannot be "
                    "found in the whole: give one line for each answer"
                )
            spans.append(
                (len(before), len(after.rstrip()))
            )  # white space after the end-of-turn token is not the model's to say
    return text, spans


def load_examples(
    path: str | Path, tokenizer: Any, max_length: int, *, learn_prompt: bool = False
) -> list[Example]:
    """Reads and encodes a whole file: see `read_records` and `encode`."""
    examples: list[Example] = []
    for where, record in read_records(path):
        examples += encode(record, tokenizer, max_length, learn_prompt=learn_prompt, where=where)
    if not examples:
        raise ValueError(f"{path} holds nothing to learn")
    if cut := sum(e.cut for e in examples):
        warnings.warn(
            f"{path}: {cut} of {len(examples)} answers were cut at max_length={max_length}",
            stacklevel=2,
        )
    return examples


def batch_order(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Returns which of n examples make up batch `step` (0, 1, ...) of an endless run of reshuffled epochs.

    A function of its arguments alone, so that a run resumes at any step without replaying the ones before.
    """
    picked: list[int] = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, index = divmod(position, n)
        if not picked or index == 0:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch}".encode()))
            order = torch.randperm(n, generator=generator).tolist()
        picked.append(order[index])
    return picked


def collate(examples: Sequence[Example], pad_id: int, multiple: int = 1) -> dict[str, Tensor]:
    """Returns input_ids, attention_mask and labels, int64 [batch, length], padded on the right to a multiple of `multiple`.

    Matrix products are compiled for each shape that comes by: few different lengths save the time, and the memory, of that.
    """
    longest = -(-max(len(e.ids) for e in examples) // multiple) * multiple

    def rows(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([v + [fill] * (longest - len(v)) for v in values])

    return {
        "input_ids": rows([e.ids for e in examples], pad_id),
        "attention_mask": rows([[1] * len(e.ids) for e in examples], 0),
        "labels": rows([e.labels for e in examples], IGNORE),
    }
