"""From a user's file to token sequences: records, the chat template, which tokens are learned.

Tokens are masked by position, never by their id. In many tokenizers (SmolLM2's too) the padding
token is the end-of-turn token, and masking by id would never teach the model to stop.
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The label that cross_entropy ignores.
IGNORE = -100

Record = dict[str, Any]
Messages = list[dict[str, Any]]

# Characters [start, end) of a rendered conversation.
Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """One training sequence.

    Attributes:
        ids: token ids.
        labels: the same ids, or IGNORE where nothing is to be learned.
        cut: whether the completion was truncated to max_length.
        where: "file:line", for error messages.
    """

    ids: list[int]
    labels: list[int]
    cut: bool = False
    where: str = field(default="", compare=False)

    @property
    def learned(self) -> int:
        """The number of tokens in the loss. The first token of a sequence is never predicted."""
        return sum(label != IGNORE for label in self.labels[1:])


def read_records(path: str | Path) -> Iterator[tuple[str, Record]]:
    """Yields ("file:line", record) of a JSONL file; any other file is one record {"text": ...}.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is not a JSON object or has none of the known forms (the message names
            file and line), or the file is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")

    text = _read_text(path)
    if path.suffix not in (".jsonl", ".json"):
        if not text.strip():
            raise ValueError(f"{path} is empty")
        yield str(path), {"text": text}
        return

    # Not splitlines, which also splits at separators that JSON allows within a string.
    lines = text.split("\n")
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path} is empty: one JSON object per line is expected")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{path}:{number}", _parse_record(line, f"{path}:{number}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


def _parse_record(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a JSON {type(record).__name__}, not an object")
    if not _has_known_form(record):
        raise ValueError(
            f"{where} has the keys {sorted(record)}; expected one of "
            '{"prompt": ..., "completion": ...}, '
            '{"messages": [{"role": ..., "content": ...}, ...]}, {"text": ...}'
        )
    return record


def _has_known_form(record: Record) -> bool:
    if isinstance(record.get("text"), str) and record["text"]:
        return True
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return True
    messages = record.get("messages")
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    )


def encode(
    record: Record,
    tokenizer: Any,
    max_length: int,
    *,
    learn_prompt: bool = False,
    where: str = "the record",
) -> list[Example]:
    """Turns a record into training sequences: one per conversation, as many as needed for a text.

    {"prompt", "completion"} is a conversation of two turns. A conversation is rendered by the
    tokenizer's chat template; the loss covers what the assistant says, including its end-of-turn
    token. A completion that is too long is truncated. A text is used as it is, and the loss covers
    all of it.

    Args:
        record: see `read_records`.
        tokenizer: a fast tokenizer from transformers.
        max_length: maximum number of tokens per sequence.
        learn_prompt: train on the whole conversation, not only on what the assistant says.
        where: what error messages call the record.

    Raises:
        ValueError: the tokenizer has no chat template, the prompt alone fills max_length, or there
            is nothing to learn.
    """
    if "text" in record and "messages" not in record and "prompt" not in record:
        return _encode_text(record["text"], tokenizer, max_length, where)

    text, spans = _render(_messages(record), tokenizer, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    learned = [learn_prompt or _is_inside(token, spans) for token in offsets]
    _check_something_is_learned(learned, max_length, where)

    labels = [i if yes else IGNORE for i, yes in zip(ids, learned, strict=True)]
    cut = len(ids) > max_length
    return [Example(ids[:max_length], labels[:max_length], cut=cut, where=where)]


def _encode_text(text: str, tokenizer: Any, max_length: int, where: str) -> list[Example]:
    ids = tokenizer(text)["input_ids"]
    windows = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    return [Example(w, list(w), where=where) for w in windows if len(w) > 1]


def _messages(record: Record) -> Messages:
    """The turns of a conversation; a prompt and its completion are two."""
    return record.get("messages") or [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": record["completion"]},
    ]


def _is_inside(token: Span, spans: list[Span]) -> bool:
    """Whether a token's characters, at least one, lie in one of the spans."""
    first, last = token
    return any(start <= first and last <= end and first < last for start, end in spans)


def _check_something_is_learned(learned: list[bool], max_length: int, where: str) -> None:
    if True not in learned:
        raise ValueError(f"{where}: the assistant says nothing, so there is nothing to learn")
    if True not in learned[1:max_length]:
        raise ValueError(
            f"{where}: the prompt takes {learned.index(True)} tokens, which leaves none for the "
            f"completion within max_length={max_length}: raise max_length, or shorten the prompt"
        )


def _render(messages: Messages, tokenizer: Any, where: str) -> tuple[str, list[Span]]:
    """Returns the conversation as text, and the spans of it that the assistant says."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} is a conversation, but this tokenizer has no chat template: choose an "
            'instruction-tuned model, or render the conversation yourself into {"text": ...}'
        )

    def render(count: int, prompt_for_answer: bool = False) -> str:
        rendered: str = tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=prompt_for_answer
        )
        return rendered

    text = render(len(messages))
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue

        # White space after the end-of-turn token is not for the model to say.
        before = render(i, prompt_for_answer=True)
        after = render(i + 1).rstrip()
        if not text.startswith(before) or not text.startswith(after):
            raise ValueError(
                f"{where}: this chat template rewrites earlier turns, so the answer in turn "
                f"{i + 1} cannot be located in the conversation: write one line per answer"
            )
        spans.append((len(before), len(after)))
    return text, spans


def load_examples(
    path: str | Path, tokenizer: Any, max_length: int, *, learn_prompt: bool = False
) -> list[Example]:
    """Reads and encodes a whole file: see `read_records` and `encode`.

    Warns if completions were truncated.
    """
    examples: list[Example] = []
    for where, record in read_records(path):
        examples += encode(record, tokenizer, max_length, learn_prompt=learn_prompt, where=where)
    if not examples:
        raise ValueError(f"{path} holds nothing to learn")

    cut = sum(example.cut for example in examples)
    if cut:
        warnings.warn(
            f"{path}: {cut} of {len(examples)} completions were truncated at "
            f"max_length={max_length}",
            stacklevel=2,
        )
    return examples
