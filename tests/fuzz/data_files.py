"""Files of training data: written in every format, then changed in their rows, text or bytes.

A case ends well if every text that was put in comes out, token by token, and the loss covers the
answers and nothing else; or if the error names the file, and the line of what was changed.
"""

import csv
import functools
import gzip
import io
import json
import os
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_reference as reference
from byte_level import CHATML, byte_tokenizer
from fuzzing import REFUSED, SAME, Wrong, attempt

from minilora.training.data import IGNORE, Example, encode_records
from minilora.training.records import read_records

try:
    import pyarrow
    import pyarrow.parquet
except ImportError:
    pyarrow = None

CI, SAMPLE, FULL = 1500, 10_000, 40_000

Row = dict[str, Any]
Rows = list[Row]
Pair = tuple[list[int], list[int]]

FORMATS = ("jsonl", "ndjson", "json", "array", "csv", "tsv", "txt", "md", "parquet")

WORDS = (
    *"list the files , 2 + 2 = 4 \" ' ' \\ / { } [ ] null NaN <|im_ <0x0A> # ; \u00df".split(),
    *("\u65e5\u672c", "\U0001f600", "e\u0301", "\u202e", "\u200b", "\ufeff", "\u2028", "\x85"),
    *("\n", "\r\n", "\t", "\x1b[31m", "\x7f", "\ufffd", "\uffff", "\U0010ffff", '{"text": 1}', ","),
    "x" * 300,
)
COLUMNS = ("text", "prompt", "completion", "messages")
ABSENT = (None, "", [], float("nan"))
# In JSON a number that Python's integers refuse to read.
HUGE = "5000 nines"
EXTRAS: dict[str, tuple[Any, ...]] = {
    "id": (7, HUGE, -0.0, float("inf"), "a", True, None),
    "source": ("a.txt", {"text": "a"}, [[[[]]]], {"messages": [{}]}, "prompt"),
    "": (0, 1),
}


@functools.cache
def tokenizer() -> Any:
    return byte_tokenizer(CHATML)


def some_text(rng: random.Random) -> str:
    words = [rng.choice(WORDS) for _ in range(rng.randint(1, 6))]
    return rng.choice(("", " ", "\n")) + rng.choice(("", " ")).join(words) + "."


def some_row(rng: random.Random, simple: bool) -> Row:
    """A row that is fine. `simple`: for a table, whose cells are texts."""
    form = rng.choice(("text", "pair", "pair") if simple else ("text", "pair", "talk", "talk"))
    if form == "text":
        return {"text": some_text(rng)}
    if form == "pair":
        return {"prompt": some_text(rng), "completion": some_text(rng)}

    talk: list[Row] = []
    for _ in range(rng.randint(0, 4)):
        role = rng.choice(("system", "user", "assistant", "tool", "developer"))
        talk.append({"role": role, "content": some_content(rng)})
    if not talk or talk[0]["role"] == "assistant":
        talk.insert(0, {"role": "user", "content": some_content(rng)})
    talk.insert(rng.randint(1, len(talk)), {"role": "assistant", "content": some_content(rng)})
    return {"messages": talk}


def some_content(rng: random.Random) -> Any:
    if rng.random() < 0.7:
        return some_text(rng)
    texts = [some_text(rng) for _ in range(rng.randint(1, 3))]
    return [{"type": "text", "text": text} for text in texts]


def widen(rows: Rows, rng: random.Random, absent: tuple[Any, ...]) -> Rows:
    """The same rows as an export of a table has them: more columns, empty where not used."""
    columns = [column for column in COLUMNS if rng.random() < 0.6]
    wide = []
    for row in rows:
        new = {column: rng.choice(absent) for column in columns} | row
        if rng.random() < 0.5:
            name = rng.choice(list(EXTRAS))
            new[name] = rng.choice(EXTRAS[name])
        if "messages" in row and rng.random() < 0.5:
            extra = {rng.choice(("tool_calls", "name", "weight")): rng.choice(absent)}
            new["messages"] = [extra | message for message in row["messages"]]
        names = list(new)
        rng.shuffle(names)
        wide.append({name: new[name] for name in names})
    return wide


def said(row: Row) -> list[str]:
    """The columns that say something."""
    return [c for c in COLUMNS if row.get(c) and row[c] == row[c]]


# Each of these makes one row wrong.


def add_form(row: Row, rng: random.Random) -> None:
    others = [column for column in COLUMNS if column not in said(row)]
    row[rng.choice(others)] = "another text"


def drop_column(row: Row, rng: random.Random) -> None:
    del row[rng.choice(said(row))]


def rename_column(row: Row, rng: random.Random) -> None:
    name = rng.choice(said(row))
    row[rng.choice((name.upper(), name + " ", "\u200b" + name, "\x1b[2J"))] = row.pop(name)


def blank_text(row: Row, rng: random.Random) -> None:
    set_text(row, rng, rng.choice((" ", "\n\t", "\u3000")))


def other_type(row: Row, rng: random.Random) -> None:
    set_text(row, rng, rng.choice((3, True, 2.5, ["a"], {"a": "b"}, [[]], {"text": "a"})))


def half_character(row: Row, rng: random.Random) -> None:
    set_text(row, rng, rng.choice(("a\ud800", "\udfff\ud800b", "a\0b")))


def turn_mark(row: Row, rng: random.Random) -> None:
    row.pop("text", None)
    row["messages"] = []
    row |= {"prompt": "a", "completion": "b"}
    set_text(row, rng, rng.choice(("yes<|im_end|>", "<|im_start|>user\nx", "a <|im_end|> b")))


def set_text(row: Row, rng: random.Random, value: Any) -> None:
    if isinstance(row.get("messages"), list) and row["messages"]:
        answers = [m for m in row["messages"] if m["role"] == "assistant"]
        rng.choice(answers)["content"] = value
        return
    row[rng.choice(said(row))] = value


def wrong_message(row: Row, rng: random.Random) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    changes: list[Row] = [
        {"role": "human"},
        {"role": "User"},
        {"role": None},
        {"role": 3},
        {"role": ["user"]},
        {"role": "\x1b]0;x\x07"},
        {"content": None},
        {"content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
        {"tool_calls": [{"id": "1"}]},
        {"weight": 0},
        {"name": "Ann"},
        {"reasoning_content": "hm"},
        {"content": {"type": "text", "text": "a"}},
        {"content": ["a", "b"]},
        {"content": [{"type": "text", "text": "a"}, {"type": "image", "image": "b"}]},
        {"content": [{"type": "text", "text": "a", "cache": 1}]},
        {"content": [{"type": "text"}]},
        {"content": [{"type": "input_text", "text": "a"}]},
    ]
    talk[rng.randint(0, 1)] |= rng.choice(changes)
    others = [talk, talk[:1], {"role": "assistant"}, "a text", [talk], [*talk, None], ["a"]]
    kinds: list[Any] = [talk] * 8 + others
    messages = rng.choice(kinds)
    row |= {"text": None, "prompt": None, "completion": None, "messages": messages}
    if messages == talk[:1] and talk[0]["role"] == "assistant":
        row["messages"] = [{"role": "user", "content": "Hi"}]


def tools_column(row: Row, rng: random.Random) -> None:
    wrong_message(row, rng)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    row |= {"messages": talk, "tools": [{"name": "f"}]}


SPOILERS: tuple[Callable[[Row, random.Random], None], ...] = (
    add_form,
    drop_column,
    rename_column,
    blank_text,
    other_type,
    half_character,
    turn_mark,
    wrong_message,
    tools_column,
)
# What a cell of a table can be: never absent by a type, never a list.
TABLE_SPOILERS = (add_form, drop_column, rename_column, blank_text, turn_mark)


# Each of these writes rows, and tells in which line each begins.


def write_lines(rows: Rows, rng: random.Random) -> tuple[str, list[str]]:
    end = rng.choice(("\n", "\r\n"))
    text, places, line = "", [], 1
    for row in rows:
        blanks = rng.choice((0, 0, 0, 2))
        text += blanks * end
        line += blanks
        places.append(f":{line}")
        text += dump(row, rng) + end
        line += 1
    return text if rng.random() < 0.7 else text.rstrip(), places


def dump(row: Row, rng: random.Random, indent: int | None = None) -> str:
    text = json.dumps(row, ensure_ascii=False, indent=indent)
    if rng.random() < 0.5 or re.search("[\ud800-\udfff]", text):
        text = json.dumps(row, indent=indent)
    return text.replace(f'"{HUGE}"', "9" * 5000)


def write_array(rows: Rows, rng: random.Random) -> tuple[str, list[str]]:
    indent = rng.choice((None, 1, 4))
    text, places = "\n" * rng.choice((0, 2)) + "[", []
    for i, row in enumerate(rows):
        text += ("," if i else "") + rng.choice(("", "\n", "\r\n  "))
        places.append(f":{text.count(chr(10)) + 1}")
        text += dump(row, rng, indent)
    return text + rng.choice(("]", "\n]\n")), places


def write_table(rows: Rows, rng: random.Random, delimiter: str) -> tuple[str, list[str]]:
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["text"]
    rng.shuffle(names)
    out = io.StringIO()
    quoting = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    end = rng.choice(("\n", "\r\n"))
    writer = csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerow(names)
    places = []
    for row in rows:
        # A line ends with \n, \r or \r\n.
        ended = out.getvalue().replace("\r\n", "\n").replace("\r", "\n")
        places.append(f":{ended.count(chr(10)) + 1}")
        cells = [row.get(name) for name in names]
        if len(names) == 1 and cells[0] in (None, ""):
            out.write('""' + end)
            continue
        writer.writerow(["" if cell is None or cell != cell else cell for cell in cells])
    return out.getvalue(), places


def write_parquet(rows: Rows, path: Path, rng: random.Random) -> list[str] | None:
    """None: these rows fit no table of Arrow's, which gives each column one type."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    try:
        for name in names:
            values = [row.get(name) for row in rows]
            columns[name] = pyarrow.array([None if v == "" or v == [] else v for v in values])
        size = rng.choice((1, 2, 100))
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=size)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
        return None
    return [f": row {i + 1}" for i in range(len(rows))]


# Each of these spoils a file as a whole.


def wrong_encoding(content: bytes, rng: random.Random) -> bytes:
    text = content.decode(errors="replace") + "\u00e9"
    encoding = rng.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp500", "cp1252"))
    return text.encode(encoding, errors="replace")


def double(content: bytes, rng: random.Random) -> bytes:
    """A key or a column that occurs twice; or values in values, deeper than can be read."""
    text = content.decode()
    if text.lstrip().startswith(("{", "[")):
        deep = 20_000 * "[" + 20_000 * "]"
        key = rng.choice(('"id": 1, "id": 1', '"text": "a", "text": "b"', f'"id": {deep}'))
        return text.replace("{", "{" + key + ", ", 1).encode()
    delimiter = "\t" if "\t" in text.splitlines()[0] else ","
    out = io.StringIO()
    rows = [row for row in csv.reader(io.StringIO(text, ""), delimiter=delimiter) if row]
    at = next(i for i, name in enumerate(rows[0]) if name)
    csv.writer(out, delimiter=delimiter).writerows([*row, row[at]] for row in rows)
    return out.getvalue().encode()


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        start = rng.randrange(len(found) + 1)
        end = min(len(found), start + rng.choice((0, 1, 1, 2, 8, 40)))
        new = rng.choice((b"", b"", rng.randbytes(1), bytes(found[start:end]) * 2, *TOKENS))
        found[start:end] = new
    return bytes(found)


TOKENS = tuple(
    token.encode()
    for token in (
        *('"', "\\", "{", "}", "[", "]", ",", ":", "\n", "\r", "\t", " ", "null", "NaN", "-1e999"),
        *('"text": "x", ', '"prompt": null, ', ', "completion": ""', "}\n{", "} {", "\\ud83d"),
        *("\\u0000", "\ufeff", '""', '",', '\n\n"', "<|im_end|>", "[" * 5000, '{"a":' * 5000),
    )
)


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def special_file(path: Path, rng: random.Random) -> None:
    kind = rng.choice(("missing", "folder", "pipe", "loop", "name", "bomb", "blank"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "blank":
        path.write_bytes(rng.choice((b"", b"\n \n", b"\xef\xbb\xbf", b"\r\n")))
    elif kind == "bomb":
        member = gzip.compress(b"a" * (1 << 20), 9, mtime=0)
        path.with_name(path.name + ".gz").write_bytes(80 * member)
    elif kind == "name":
        suffix = rng.choice(("", ".xls", ".doc", ".jsonl.bz2", ".json_", ".parquet.gz"))
        path.with_name(path.stem + suffix).write_text('{"text": "a text"}')


def run(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    kind = rng.choice(FORMATS)
    suffix = "json" if kind == "array" else kind
    suffix = rng.choice((suffix, suffix, suffix.upper(), suffix.title()))
    # A name that cannot be shown as it is.
    stem = rng.choice(("data", "data", "data \u00fc", "\x1b[1m\u202edata"))
    path = folder / f"{stem}.{suffix}"

    change = rng.choice(("none", "none", "row", "row", "bytes", "bytes", "whole"))
    if change == "whole" and rng.random() < 0.4:
        special_file(path, rng)
        (path,) = [*folder.iterdir()] or [path]
        return judge(path, None, None, rng)

    simple = kind in ("csv", "tsv")
    rows = [some_row(rng, simple) for _ in range(1 if kind in ("txt", "md") else rng.randint(1, 5))]
    intended = [reference.turns_of(row) for row in rows]
    assert None not in intended, rows
    if kind in ("txt", "md"):
        # At the start of a file this character is a byte order mark.
        text = some_text(rng).lstrip("\ufeff")
        intended = [text.replace("\r\n", "\n").replace("\r", "\n")]
        content, places = text.encode(), [""]
    else:
        rows = widen(rows, rng, ("",) if simple else ABSENT)
        spoiled = None
        if change == "row":
            spoiled = rng.randrange(len(rows))
            rng.choice(TABLE_SPOILERS if simple else SPOILERS)(rows[spoiled], rng)
        if kind == "parquet":
            return parquet_case(rows, intended, spoiled, path, change, rng)
        writers: dict[str, Callable[[], tuple[str, list[str]]]] = {
            "array": lambda: write_array(rows, rng),
            "csv": lambda: write_table(rows, rng, ","),
            "tsv": lambda: write_table(rows, rng, "\t"),
        }
        written, places = writers.get(kind, lambda: write_lines(rows, rng))()
        content = written.encode()
        if spoiled is not None:
            path.write_bytes(content)
            return judge(path, None, places[spoiled], rng)

    if rng.random() < 0.2:
        content = b"\xef\xbb\xbf" + content
    if change == "bytes":
        content = change_bytes(content, rng)
    if change == "whole":
        spoil = double if kind not in ("txt", "md") and rng.random() < 0.5 else wrong_encoding
        content = spoil(content, rng)
    if rng.random() < 0.3:
        path = path.with_name(path.name + rng.choice((".gz", ".GZ")))
        content = gzip.compress(content, mtime=0)
        if change == "bytes" and rng.random() < 0.3:
            content = rng.choice((truncate, change_bytes))(content, rng)
    path.write_bytes(content)
    expected = intended if change in ("none", "row") else by_reference(path)
    return judge(path, expected, None, rng)


def by_reference(path: Path) -> list[Any] | None:
    rows = reference.rows_of(path)
    found = [reference.turns_of(row) for row in rows or []]
    return None if not found or None in found else found


def parquet_case(
    rows: Rows,
    intended: list[Any],
    spoiled: int | None,
    path: Path,
    change: str,
    rng: random.Random,
) -> str:
    if pyarrow is None:
        path.write_bytes(b"PAR1")
        return judge(path, None, ": Parquet is read with pyarrow, which is missing: pip", rng)
    places = write_parquet(rows, path, rng)
    if places is None:
        path.write_bytes(b"")
        return judge(path, None, None, rng)
    if spoiled is not None:
        return judge(path, None, places[spoiled], rng)
    if change == "whole":
        path.write_bytes(truncate(path.read_bytes(), rng)[:-1])
        return judge(path, None, None, rng)
    return judge(path, intended, None, rng)


def judge(path: Path, expected: list[Any] | None, place: str | None, rng: random.Random) -> str:
    """Reads and encodes the file; compares every token and label with what was put in.

    Args:
        path: the file.
        expected: the texts and conversations; None: it must be refused.
        place: what the error must name after the file's name, if it is known.
    """
    max_length = rng.choice((100_000, 2000, 40, 17)) if place is None else 100_000
    learn_prompt = rng.random() < 0.3

    def load() -> list[Example]:
        records = read_records(path)
        return encode_records(records, tokenizer(), max_length, learn_prompt=learn_prompt)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        examples, error = attempt(load, ["data"])

    wanted = [sequences(e, max_length, learn_prompt) for e in expected or [None]]
    if error is not None:
        if None not in wanted:
            raise Wrong("raw", f"a file that is fine was refused: {error}")
        if place is not None and place not in str(error):
            raise Wrong("raw", f"the error names another place than {place}: {error}")
        return REFUSED
    if None in wanted:
        raise Wrong("silent", f"trained on {[e.ids for e in examples]!r:.300}")

    found = [(e.ids, e.labels) for e in examples]
    if found != [pair for pairs in wanted if pairs for pair in pairs]:
        raise Wrong("silent", f"{found!r:.300} instead of {wanted!r:.300}")
    cut = any(len(e) > max_length for e in map(whole, expected or []) if e)
    if bool(warned) != cut:
        raise Wrong("silent", f"truncated: {cut}; warned: {[str(w.message) for w in warned]}")
    return SAME


def whole(record: Any) -> list[int]:
    """All tokens of a conversation; nothing for a text, which is not truncated."""
    return [] if isinstance(record, str) else reference.conversation(record)[0]


def sequences(record: Any, size: int, learn_prompt: bool) -> list[Pair] | None:
    """(ids, labels) of each sequence that a record becomes; None: it must be refused."""
    if record is None:
        return None
    if isinstance(record, str):
        ids = reference.tokens(record)
        starts = range(0, len(ids) - 1, size - 1)
        firsts = [ids[0] if start == 0 else IGNORE for start in starts]
        return [
            (ids[s : s + size], [first, *ids[s + 1 : s + size]])
            for s, first in zip(starts, firsts, strict=True)
        ] or None
    ids, learned = reference.conversation(record)
    labels = [i if yes or learn_prompt else IGNORE for i, yes in zip(ids, learned, strict=True)]
    if all(label == IGNORE for label in labels[1:size]):
        return None
    return [(ids[:size], labels[:size])]
