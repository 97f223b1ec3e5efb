"""Files of records: JSON lines, JSON, CSV, TSV, Parquet; and texts. What each row says, as it is.

Each format is one function, from a file's text to its rows. What a row may hold is the business of
records.py. A file is read with the format that its name ends in; nothing is guessed from contents.
"""

import csv
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from minilora.files.json_file import unique_keys
from minilora.files.text import shown

# Where a row stands, for error messages ("file:line"), and its columns.
Row = tuple[str, dict[str, Any]]

# A small file may hold gigabytes. Texts compress to a third or a tenth, rarely to a hundredth.
LARGEST_RATIO = 100
ALWAYS_ALLOWED = 64 * 2**20

# Of a Parquet file, at a time: a few, because one value may be large.
ROWS_AT_ONCE = 64

_BLANKS = re.compile(r"[ \t\r\n]*")


def read_rows(path: str | Path, columns: Collection[str]) -> Iterator[Row]:
    """Yields the rows of a file, each with its place in it.

    Args:
        path: the file; its name says the format.
        columns: those that the caller needs. Parquet holds each column apart, and others are not
            read.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the name ends in none of the known formats, or the file is damaged; the message
            names the file and, where there is one, the line.
        OSError: the file cannot be read.
    """
    path = Path(path)
    name = shown(path, 1000)
    if not path.exists():
        raise FileNotFoundError(f"{name} does not exist")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise ValueError(f"{name} is {kind}: the data must be one file")

    suffix, compressed = _suffix(path)
    if suffix == ".parquet" and not compressed:
        yield from _parquet(path, name, columns)
    elif suffix in FORMATS:
        content = _unzip(path, name) if compressed else path.read_bytes()
        yield from FORMATS[suffix](_decode(content, name), name)
    else:
        raise ValueError(
            f"{name} is of no known format: its name must end in {', '.join(FORMATS)} (each also "
            "with .gz after it) or .parquet"
        )


def _suffix(path: Path) -> tuple[str, bool]:
    """Returns what the name ends in, in lower case, and whether .gz follows it."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return Path(path.stem).suffix.lower(), True
    return suffix, False


def _unzip(path: Path, name: str) -> bytes:
    """Returns the contents of a gzip file, which may have several members."""
    packed = path.read_bytes()
    allowed = _allowed_size(len(packed))
    contents = io.BytesIO()
    while packed:
        member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        try:
            contents.write(member.decompress(packed, allowed + 1 - contents.tell()))
        except zlib.error as error:
            raise ValueError(f"{name} is not an intact gzip file: {error}") from error
        if contents.tell() > allowed:
            _refuse_expansion(name)
        if not member.eof:
            raise ValueError(f"{name} is not an intact gzip file: it ends too early")
        # Members may be padded with zeros.
        packed = member.unused_data.lstrip(b"\0")
    return contents.getvalue()


def _allowed_size(size: int) -> int:
    return max(ALWAYS_ALLOWED, LARGEST_RATIO * size)


def _refuse_expansion(name: str) -> NoReturn:
    raise ValueError(
        f"{name} expands to more than {LARGEST_RATIO} times its size, as no text does: if it is "
        "what you expect, write it out as .jsonl and give that"
    )


def _decode(content: bytes, name: str) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{name} is UTF-16 or UTF-32 text: save it as UTF-8")
    zero = content.find(b"\0")
    if zero >= 0:
        line = content.count(b"\n", 0, zero) + 1
        raise ValueError(
            f"{name}:{line} has a zero byte: it is not UTF-8 text (a binary file, or UTF-16?)"
        )
    try:
        # Without the byte order mark that Windows puts first.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name} is not UTF-8 text ({error.reason} at byte {error.start}, in line {line}): "
            "save it as UTF-8"
        ) from error


def _text(text: str, name: str) -> Iterator[Row]:
    """One row, with line ends as Python reads them: "\\n"."""
    yield name, {"text": io.StringIO(text, newline=None).read()}


def _json_lines(text: str, name: str) -> Iterator[Row]:
    """One object per line; blank lines are skipped."""
    # Not splitlines, which also splits at separators that JSON allows within a string.
    for number, line in enumerate(text.split("\n"), start=1):
        start = _skip_blanks(line, 0)
        if start == len(line):
            continue
        record, end = _json_object(line, start, name, number)
        if _skip_blanks(line, end) < len(line):
            raise ValueError(f"{name}:{number} is not valid JSON: more follows the object")
        yield f"{name}:{number}", record


def _json(text: str, name: str) -> Iterator[Row]:
    """An array of objects, one object over several lines, or JSON lines."""
    start = _skip_blanks(text, 0)
    if start == len(text):
        return
    line = text.count("\n", 0, start) + 1
    if text[start] == "[":
        yield from _json_array(text, start, name, line)
        return
    record, end = _json_object(text, start, name, line)
    if _skip_blanks(text, end) == len(text):
        yield f"{name}:{line}", record
    else:
        yield from _json_lines(text, name)


def _json_array(text: str, start: int, name: str, line: int) -> Iterator[Row]:
    """Objects one by one, so that each has its line."""
    counted = start
    position = _skip_blanks(text, start + 1)
    more = not text.startswith("]", position)
    while more:
        line += text.count("\n", counted, position)
        counted = position
        record, end = _json_object(text, position, name, line)
        yield f"{name}:{line}", record

        position = _skip_blanks(text, end)
        more = text.startswith(",", position)
        if more:
            position = _skip_blanks(text, position + 1)

    line += text.count("\n", counted, position)
    if not text.startswith("]", position):
        raise ValueError(f"{name}:{line} is not valid JSON: ',' or ']' is missing")
    if _skip_blanks(text, position + 1) < len(text):
        raise ValueError(f"{name}:{line} is not valid JSON: more follows the array")


def _skip_blanks(text: str, position: int) -> int:
    """Returns the position of the next character that is not blank; at the end, the length."""
    blanks = _BLANKS.match(text, position)
    assert blanks is not None
    return blanks.end()


def _json_object(text: str, start: int, name: str, line: int) -> tuple[dict[str, Any], int]:
    """Returns the object that starts at a position, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        line += text.count("\n", start, error.pos)
        reason = f"{error.msg} at column {error.colno}"
        raise ValueError(f"{name}:{line} is not valid JSON: {reason}") from error
    except RecursionError:
        raise ValueError(f"{name}:{line} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name}:{line} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}:{line} is a JSON {type(value).__name__}, not an object")
    return value, end


# No number is ever used. A float has no limit to its digits, as Python's integers do.
_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_int=float)


def _table(text: str, name: str, delimiter: str) -> Iterator[Row]:
    """A header, and one record per row; fields may be quoted, and hold line breaks then."""
    rows = _table_rows(text, name, delimiter)
    if not rows:
        return
    where, header = rows[0]
    _check_columns(header, where)

    for where, row in rows[1:]:
        if len(row) != len(header):
            raise ValueError(f"{where} has {len(row)} fields, and the header {len(header)}")
        yield where, dict(zip(header, row, strict=True))


def _check_columns(names: Sequence[str], where: str) -> None:
    """Columns without a name, such as the index that pandas writes, hold no text to train on."""
    counts = Counter(name for name in names if name)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"{where} has two columns with the name '{shown(twice[0])}'")


def _table_rows(text: str, name: str, delimiter: str) -> list[tuple[str, list[str]]]:
    """All rows that are not blank, each with the line in which it begins."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    line = 1

    # A limit for the whole process, meant for fields of 128 KiB.
    limit = csv.field_size_limit(len(text) + 1)
    try:
        for row in reader:
            if row:
                rows.append((f"{name}:{line}", row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{name}:{line} is not a valid row: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _parquet(path: Path, name: str, columns: Collection[str]) -> Iterator[Row]:
    """One record per row. Other columns than these are not read, and have no values."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(
            f"{name}: Parquet is read with pyarrow, which is missing: pip install pyarrow"
        ) from error

    size, allowed = 0, _allowed_size(path.stat().st_size)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_columns(names, name)
            read = [column for column in names if column in columns]
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=read):
                size += batch.nbytes
                if size > allowed:
                    _refuse_expansion(name)
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}: row {number}", dict.fromkeys(names) | row
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not an intact Parquet file: {shown(error)}") from error


FORMATS: dict[str, Callable[[str, str], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
    ".txt": _text,
    ".md": _text,
}
