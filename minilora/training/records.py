"""Records: what one line of a user's file may say, and the check that it says one thing.

A record has one of three forms: a text, a prompt with its completion, or the messages of a
conversation. Exports of tables give every row all columns, and leave those empty that it does not
use, so an empty column counts as absent. A record that still has two forms is refused: which of
them was meant would be a guess.
"""

import re
from pathlib import Path
from typing import Any

from minilora.files.text import shown
from minilora.training.formats import read_rows

# One of {"text": str}, {"prompt": str, "completion": str}, {"messages": list}, once checked.
Record = dict[str, Any]
Messages = list[dict[str, str]]

FORMS = (("text",), ("prompt", "completion"), ("messages",))
COLUMNS = {column for form in FORMS for column in form}
ROLES = ("system", "developer", "user", "assistant", "tool")

# Columns that change what a conversation is rendered to, which this library does not do.
UNSUPPORTED = ("tools", "functions")

_EXPECTED = (
    '{"prompt": ..., "completion": ...}, '
    '{"messages": [{"role": ..., "content": ...}, ...]}, {"text": ...}'
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_TYPES = {dict: "an object", list: "a list", bool: "a truth value", float: "a number"}
_TYPES |= {int: "a number", bytes: "bytes", type(None): "null", str: "a text"}


def read_records(path: str | Path) -> list[tuple[str, Record]]:
    r"""Reads and checks a whole file, without a tokenizer or a model.

    The name of the file says its format: .jsonl, .ndjson (one object per line), .json (the same,
    an array of objects, or one object), .csv, .tsv (with a header), .parquet (with pyarrow), .txt,
    .md (one text). All but .parquet may be compressed (.gz). Upper and lower case are the same.

    Returns:
        (place, record) of each record; the place is "file:line".

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has another format, is damaged or empty, or a record does not have
            exactly one of the known forms. The message names the file and the line.
        OSError: the file cannot be read.

    Example:
        >>> data = tmp / "my.csv"
        >>> _ = data.write_text("id,prompt,completion\n7,2 + 2?,4\n")
        >>> [record for _, record in read_records(data)]
        [{'prompt': '2 + 2?', 'completion': '4'}]
    """
    rows = read_rows(path, COLUMNS.union(UNSUPPORTED))
    records = [(where, check_record(row, where)) for where, row in rows]
    if not records:
        raise ValueError(f"{shown(path, 1000)} is empty: it holds no record")
    return records


def check_record(record: Any, where: str) -> Record:
    """Returns the record without the columns that it does not use, and with texts for contents.

    Args:
        record: a row of a file. A value that is null, NaN, "" or [] counts as absent.
        where: what error messages call the record.

    Raises:
        ValueError: the record does not have exactly one of the known forms, or a text in it cannot
            be trained on.
    """
    used = {column for column in COLUMNS if not is_absent(record.get(column))}
    form = next((form for form in FORMS if used == set(form)), None)
    if form is None:
        raise ValueError(_wrong_form(record, used, where))

    if form == ("messages",):
        check_supported(record, where)
        return {"messages": _check_messages(record["messages"], where)}
    return {column: _check_text(record[column], f"{where}: {column!r}") for column in form}


def check_supported(record: Record, where: str) -> None:
    """Raises ValueError if a record has a column that would change how it is rendered."""
    for column in UNSUPPORTED:
        if not is_absent(record.get(column)):
            raise ValueError(
                f"{where} has {column!r}, which is not supported: write what the model should "
                'see of it into the messages, or render the record into {"text": ...}'
            )


def conversation(record: Record) -> Messages:
    """Returns the turns of a record that is no text; a prompt and its completion are two."""
    return record.get("messages") or [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": record["completion"]},
    ]


def is_absent(value: Any) -> bool:
    """Whether a column says nothing. NaN is how pandas writes a missing value."""
    is_nan = isinstance(value, float) and value != value
    return value is None or is_nan or value in ("", [])


def _wrong_form(record: Record, used: set[str], where: str) -> str:
    if record == {"text": ""}:
        return f"{where} is empty"
    keys = shown(sorted(map(str, record)))
    if any(used > set(form) for form in FORMS):
        return (
            f"{where} is ambiguous: {sorted(used)} are set, and only one form can be trained on: "
            f"{_EXPECTED}. Set the other keys to null, or remove them"
        )
    empty = sorted((COLUMNS & record.keys()) - used)
    which = f" ({empty} without a value)" if empty else ""
    return f"{where} has the keys {keys}{which}; expected one of {_EXPECTED}"


def _check_text(value: Any, where: str) -> str:
    """Returns a text if it can be trained on.

    Args:
        value: that of a column.
        where: what error messages call it.
    """
    text = _check_characters(value, where)
    if not text.strip():
        raise ValueError(f"{where} holds only white space")
    return text


def _check_characters(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where} is {_type_name(text)}, not a text")
    half = _SURROGATE.search(text)
    if half:
        raise ValueError(
            f"{where} contains an unpaired surrogate, {shown(half[0])}, at position "
            f"{half.start()}: no tokenizer can encode it"
        )
    if "\0" in text:
        raise ValueError(f"{where} has a zero character at position {text.index(chr(0))}")
    return text


def _type_name(value: Any) -> str:
    return _TYPES.get(type(value), type(value).__name__)


def _check_messages(messages: Any, where: str) -> Messages:
    """Returns the turns of a conversation with role and content alone."""
    if not isinstance(messages, list):
        raise ValueError(
            f"{where}: 'messages' is {_type_name(messages)}, not a list of "
            '{"role": ..., "content": ...} (a CSV file cannot hold one: use JSONL or Parquet)'
        )
    turns = [_check_turn(m, f"{where}: turn {i}") for i, m in enumerate(messages, start=1)]
    if not any(turn["role"] == "assistant" for turn in turns):
        raise ValueError(f"{where}: the assistant says nothing, so there is nothing to learn")
    if turns[0]["role"] == "assistant":
        raise ValueError(
            f"{where}: turn 1 is the assistant's, who answers to nothing: begin with a turn of the "
            'user or the system, or render the conversation yourself into {"text": ...}'
        )
    return turns


def _check_turn(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is {_type_name(message)}, not an object")

    # Templates read further keys, such as tool_calls or reasoning_content, each its own.
    given = {str(key) for key, value in message.items() if not is_absent(value)}
    others = sorted(given - {"role", "content"})
    if others:
        raise ValueError(
            f"{where} has the keys {shown(others)} besides 'role' and 'content', which are not "
            "supported: write them into the content, or set them to null"
        )

    role = message.get("role")
    if role not in ROLES:
        named = f"'{shown(role)}'" if isinstance(role, str) else _type_name(role)
        raise ValueError(f"{where} has the role {named}; expected one of {', '.join(ROLES)}")

    content = _join_parts(message.get("content"), f"{where}: 'content'")
    if role == "assistant" and not content.strip():
        raise ValueError(f"{where}: the assistant says nothing, so there is nothing to learn")
    return {"role": role, "content": content}


def _join_parts(content: Any, where: str) -> str:
    """Returns a content as one text; it may be a list of parts, all of them texts."""
    if not isinstance(content, list) or not content:
        return _check_characters(content, where)

    texts = []
    for number, part in enumerate(content, start=1):
        values = part if isinstance(part, dict) else {}
        given = {key: value for key, value in values.items() if value is not None}
        if set(given) != {"type", "text"} or given["type"] != "text":
            raise ValueError(
                f"{where}: part {number} is not a text: only parts "
                '{"type": "text", "text": ...} are supported'
            )
        texts.append(_check_characters(given["text"], f"{where}: part {number}"))
    return "".join(texts)
