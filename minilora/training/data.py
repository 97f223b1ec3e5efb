"""From records to token sequences: the chat template, and which tokens are learned.

Tokens are masked by position, never by their id. In many tokenizers (SmolLM2's too) the padding
token is the end-of-turn token, and masking by id would never teach the model to stop.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilora.files.text import shown
from minilora.huggingface.generation import apply_template
from minilora.training.records import (
    Messages,
    Record,
    check_record,
    conversation,
    read_records,
)

# The label that cross_entropy ignores.
IGNORE = -100

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
    token. A completion that is too long is truncated. A text is used as it is, special tokens in it
    included, and the loss covers all of it but its first token.

    Args:
        record: see `check_record`.
        tokenizer: a fast tokenizer from transformers.
        max_length: maximum number of tokens per sequence.
        learn_prompt: train on the whole conversation, not only on what the assistant says.
        where: what error messages call the record.

    Raises:
        ValueError: the record has not exactly one of the known forms; the tokenizer has no chat
            template, or the template fails, or it does not show the turns as they are; a turn
            contains a token with which the template marks turns; the prompt alone fills
            max_length; or there is nothing to learn.
    """
    record = check_record(record, where)
    if "text" in record:
        return _encode_text(record["text"], tokenizer, max_length, where)

    text, spans = _render(conversation(record), tokenizer, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    learned = [learn_prompt or _is_inside(token, spans) for token in offsets]
    _check_something_is_learned(learned, max_length, where)

    labels = [i if yes else IGNORE for i, yes in zip(ids, learned, strict=True)]
    cut = len(ids) > max_length
    return [Example(ids[:max_length], labels[:max_length], cut=cut, where=where)]


def _encode_text(text: str, tokenizer: Any, max_length: int, where: str) -> list[Example]:
    """Windows that overlap by one token: the first token of a window is not predicted."""
    ids = tokenizer(text)["input_ids"]
    if min(len(ids), max_length) < 2:
        raise ValueError(
            f"{where}: a text of {len(ids)} tokens within max_length={max_length} has nothing to "
            "learn: each token is predicted from those before it, so at least two are needed"
        )
    examples = []
    for start in range(0, len(ids) - 1, max_length - 1):
        window = ids[start : start + max_length]
        labels = [IGNORE, *window[1:]] if start else list(window)
        examples.append(Example(window, labels, where=where))
    return examples


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
    if not tokenizer.is_fast:
        raise ValueError(
            f"{where}: this tokenizer ({type(tokenizer).__name__}) is not a fast one, and cannot "
            "say which tokens the answer has: choose a model with a tokenizer.json"
        )
    _check_no_marks(messages, tokenizer, where)

    def render(count: int, prompt_for_answer: bool = False) -> str:
        try:
            rendered: str = apply_template(
                tokenizer, messages[:count], tokenize=False, add_generation_prompt=prompt_for_answer
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return rendered

    text = render(len(messages))
    spans = []
    for i, message in enumerate(messages):
        start, end = 0, len(text)
        if message["role"] == "assistant":
            # White space after the end-of-turn token is not for the model to say.
            before = render(i, prompt_for_answer=True)
            after = render(i + 1).rstrip()
            if not text.startswith(before) or not text.startswith(after):
                raise ValueError(
                    f"{where}: this chat template rewrites earlier turns, so the answer in turn "
                    f"{i + 1} cannot be located in the conversation: write one line per answer"
                )
            start, end = len(before), len(after)
            spans.append((start, end))

        # Many templates strip a turn. Some leave out a role, or part of an answer.
        if text.find(message["content"].strip(), start, end) < 0:
            raise ValueError(
                f"{where}: this chat template does not show turn {i + 1} ({message['role']}) as it "
                "is: leave out what it drops, or render the conversation yourself into "
                '{"text": ...}'
            )
    return text, spans


def _check_no_marks(messages: Messages, tokenizer: Any, where: str) -> None:
    """Raises ValueError if a turn contains a token that begins or ends turns in the template.

    It would be tokenized as one, and the conversation read as another.
    """
    template = str(tokenizer.chat_template)
    ends = (tokenizer.bos_token, tokenizer.eos_token)
    special = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
    marks = [mark for mark in special if mark in ends or mark in template]
    for i, message in enumerate(messages, start=1):
        found = next((mark for mark in marks if mark in message["content"]), None)
        if found is not None:
            raise ValueError(
                f"{where}: turn {i} contains {shown(found)}, with which the chat template marks "
                "the turns: leave it out (the template adds it), or render the conversation "
                'yourself into {"text": ...}'
            )


def encode_records(
    records: Sequence[tuple[str, Record]],
    tokenizer: Any,
    max_length: int,
    *,
    learn_prompt: bool = False,
) -> list[Example]:
    """Encodes all records of a file, as `read_records` returns them: see `encode`.

    Warns if completions were truncated.
    """
    examples: list[Example] = []
    for where, record in records:
        examples += encode(record, tokenizer, max_length, learn_prompt=learn_prompt, where=where)

    cut = sum(example.cut for example in examples)
    if cut:
        first = next(example.where for example in examples if example.cut)
        warnings.warn(
            f"{cut} of {len(examples)} completions were truncated at max_length={max_length}; the "
            f"first is {first}",
            stacklevel=2,
        )
    return examples


def load_examples(
    path: str | Path, tokenizer: Any, max_length: int, *, learn_prompt: bool = False
) -> list[Example]:
    """Reads and encodes a whole file: `read_records`, then `encode_records`."""
    return encode_records(read_records(path), tokenizer, max_length, learn_prompt=learn_prompt)
