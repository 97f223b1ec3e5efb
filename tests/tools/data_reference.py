"""What must come out of a file of training data, by another way than the library's.

Written from the page "Train on your own data", with the parsers of the standard library on whole
files and no error messages: None stands for "must be refused".
"""

import csv
import gzip
import io
import json
import math
import re
from pathlib import Path
from typing import Any

from byte_level import END, START

Row = dict[str, Any]
Turns = list[tuple[str, str]]

MARKS = {"<|im_end|>": END, "<|im_start|>": START}
SUFFIXES = ("jsonl", "ndjson", "json", "csv", "tsv", "txt", "md")


def rows_of(path: Path) -> list[Row] | None:
    """The rows of a file, by its name; Parquet left out."""
    *_, suffix = name = path.name.lower().split(".")
    content = path.read_bytes()
    if suffix == "gz":
        suffix = name[-2]
        try:
            content = gzip.decompress(content) if content else b""
        except (OSError, EOFError, ValueError, ArithmeticError):
            return None
        except Exception as error:
            assert type(error).__name__ == "error", "zlib.error"
            return None
    if suffix not in SUFFIXES or content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content:
        return None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None

    if suffix in ("txt", "md"):
        return [{"text": text.replace("\r\n", "\n").replace("\r", "\n")}]
    if suffix in ("csv", "tsv"):
        return _table(text, "," if suffix == "csv" else "\t")
    return _json(text, suffix)


def _table(text: str, delimiter: str) -> list[Row] | None:
    try:
        lines = list(csv.reader(io.StringIO(text, ""), delimiter=delimiter, strict=True))
    except csv.Error:
        return None
    header, *rest = [line for line in lines if line] or [[]]
    names = [name for name in header if name]
    if len(set(names)) < len(names) or any(len(line) != len(header) for line in rest):
        return None
    return [dict(zip(header, line, strict=True)) for line in rest]


def _json(text: str, suffix: str) -> list[Row] | None:
    if not text.strip(" \t\r\n"):
        return []
    found: Any = None
    if suffix == "json":
        found = _value(text)
        found = [found] if isinstance(found, dict) else found
        if found is None and text.strip(" \t\r\n").startswith("["):
            return None
    if found is None:
        lines = [line for line in text.split("\n") if line.strip(" \t\r")]
        found = [_value(line) for line in lines]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        return None
    return found


def _value(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> Row:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique, parse_int=lambda _: 0)
    except (ValueError, RecursionError):
        return None


def _says(value: Any) -> bool:
    """Whether a column says something."""
    return not (value is None or value == "" or value == [] or _is_nan(value))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _sound(text: Any) -> bool:
    return isinstance(text, str) and not re.search("[\0\ud800-\udfff]", text)


def turns_of(row: Row) -> Turns | str | None:
    """A text, or the turns of a conversation."""
    keys = ("text", "prompt", "completion", "messages")
    match sorted(key for key in keys if _says(row.get(key))):
        case ["text"]:
            text = row["text"]
            return text if _sound(text) and not text.isspace() else None
        case ["completion", "prompt"]:
            pair = row["prompt"], row["completion"]
            if not all(_sound(text) and not text.isspace() for text in pair):
                return None
            turns = list(zip(("user", "assistant"), pair, strict=True))
        case ["messages"]:
            if not isinstance(row["messages"], list) or _says(row.get("tools")):
                return None
            found = [_turn(message) for message in row["messages"]]
            turns = [turn for turn in found if turn is not None]
            if len(turns) < len(found) or "assistant" not in dict(turns[1:]):
                return None
            if turns[0][0] == "assistant":
                return None
        case _:
            return None
    return None if any(mark in content for mark in MARKS for _, content in turns) else turns


def _turn(message: Any) -> tuple[str, str] | None:
    if not isinstance(message, dict):
        return None
    if {key for key, value in message.items() if _says(value)} - {"role", "content"}:
        return None
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in "system developer user assistant tool".split():
        return None
    if isinstance(content, list) and content:
        if not all(_is_part(part) for part in content):
            return None
        content = "".join(part["text"] for part in content)
    if not _sound(content) or (role == "assistant" and not content.strip()):
        return None
    return role, content


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    given = {key: value for key, value in part.items() if value is not None}
    return given.keys() == {"type", "text"} and given["type"] == "text" and _sound(given["text"])


def tokens(text: str) -> list[int]:
    """Token ids of a text by hand: its UTF-8 bytes, and the special tokens in it."""
    found: list[int] = []
    for part in re.split(r"(<\|im_end\|>|<\|im_start\|>)", text):
        found += [MARKS[part]] if part in MARKS else [_ID_OF_BYTE[b] for b in part.encode()]
    return found


def _byte_ids() -> dict[int, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, others come after 255."""
    itself = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in itself]
    characters = {b: b for b in itself} | {b: 256 + i for i, b in enumerate(others)}
    order = sorted(characters, key=characters.__getitem__)
    return {b: i for i, b in enumerate(order)}


_ID_OF_BYTE = _byte_ids()


def conversation(turns: Turns) -> tuple[list[int], list[bool]]:
    """(ids, learned) of a conversation in ChatML, piece by piece."""
    ids: list[int] = []
    learned: list[bool] = []
    for role, content in turns:
        head, said = [START, *tokens(f"{role}\n")], [*tokens(content), END]
        tail = tokens("\n")
        ids += head + said + tail
        is_answer = role == "assistant"
        learned += [False] * len(head) + [is_answer] * len(said) + [False] * len(tail)
    return ids, learned
