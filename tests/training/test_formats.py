"""Rows as they stand in files of each format, and what is refused about a file."""

import csv
import gzip
import io
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.training import formats
from minilora.training.formats import read_rows, shown

COLUMNS = ("text", "prompt", "completion", "messages")
ROWS = [
    {"prompt": 'a "quoted", text', "completion": "two\nlines"},
    {"prompt": "tab\tand\u2028separator", "completion": "über 😀"},
]


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path, COLUMNS)]


def places(path: Path) -> list[str]:
    return [where.removeprefix(str(path)) for where, _ in read_rows(path, COLUMNS)]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CONTENTS = {
    "d.jsonl": LINES,
    "d.ndjson": LINES.replace("\n", "\r\n"),
    "D.JSONL": LINES + "\n\n",
    "lines.json": LINES,
    "array.json": json.dumps(ROWS),
    "indented.json": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "d.csv": table(ROWS),
    "D.Csv": table([{"": i} | row for i, row in enumerate(ROWS)]),
    "d.tsv": table(ROWS, "\t"),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_format_gives_the_same_rows(
    tmp_path: Path, name: str, mark: str, packed: bool
) -> None:
    content = (mark + CONTENTS[name]).encode()
    path = tmp_path / name
    if packed:
        path, content = tmp_path / f"{name}.GZ", gzip.compress(content, mtime=0)
    found = rows(written(path, content))
    assert [{k: v for k, v in row.items() if k} for row in found] == ROWS


def test_rows_are_named_by_the_line_in_which_they_begin(tmp_path: Path) -> None:
    assert places(written(tmp_path / "a.csv", CONTENTS["d.csv"])) == [":2", ":4"]
    assert places(written(tmp_path / "a.jsonl", "\n" + LINES)) == [":2", ":3"]
    assert places(written(tmp_path / "a.json", json.dumps(ROWS, indent=1))) == [":2", ":6"]
    assert places(written(tmp_path / "b.json", "[{}, {},\n{}\n, {}]")) == [":1", ":1", ":2", ":3"]
    assert places(written(tmp_path / "c.json", '\n{"text":\n"a"}\n')) == [":2"]


@pytest.mark.parametrize("name", ["t.txt", "t.MD", "t.md.gz"])
def test_a_text_is_one_row(tmp_path: Path, name: str) -> None:
    content = '\ufeffprompt,completion\r\n{"text": 1}\n'.encode()
    path = written(
        tmp_path / name, gzip.compress(content, mtime=0) if name.endswith("gz") else content
    )
    assert rows(path) == [{"text": 'prompt,completion\n{"text": 1}\n'}]


@pytest.mark.parametrize(
    "name",
    ["d", "d.", "data.txt.bak", "d.xlsx", "d.jsonl.zst", "d.parquet.gz", ".jsonl", "d.gz"],
)
def test_a_file_of_no_known_format_is_refused(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, LINES)
    with pytest.raises(ValueError, match=rf"{name} is of no known format: .*\.jsonl, .*\.parquet"):
        rows(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"text": "a"}\n{"text": ', ":2 is not valid JSON: Expecting value"),
        ("d.jsonl", '{"text": "a"}\n\n[1]', ":3 is a JSON list, not an object"),
        ("d.jsonl", '{"text": "a"} {"text": "b"}', ":1 is not valid JSON: more follows"),
        ("d.jsonl", '{"text": "a"}\r{"text": "b"}', ":1 is not valid JSON: more follows"),
        ("d.jsonl", '{"text": "a", "text": "b"}', ":1 is not valid JSON: the key 'text' occurs"),
        ("d.jsonl", '{"a": [{"\\u001b": 1, "\\u001b": 2}]}', r":1 .* the key '\\x1b' occurs"),
        ("d.jsonl", '\n{"text": "a\tb"}', ":2 is not valid JSON: Invalid control character"),
        ("d.jsonl", '{"a": ' + "[" * 100_000, ":1 is not valid JSON: it is nested too deeply"),
        ("d.json", '{"a": ' * 100_000, ":1 is not valid JSON: it is nested too deeply"),
        ("d.json", '[{"text": "a"},\n{"text": }]', ":2 is not valid JSON: Expecting value"),
        ("d.json", '[{"text": "a"}\n{"text": "b"}]', ":2 is not valid JSON: ',' or ']' is"),
        ("d.json", '[{"text": "a"},\n]', ":2 is not valid JSON: Expecting value"),
        ("d.json", '[{"text": "a"},\n3]', ":2 is a JSON float"),
        ("d.json", '[{"text": "a"}]\n[]', ":1 is not valid JSON: more follows the array"),
        ("d.json", '[{"text": "a"}', ":1 is not valid JSON: ',' or ']' is missing"),
        ("d.json", '"text"', ":1 is a JSON str"),
        ("d.json", '{"text":\n"a",\n}', ":3 is not valid JSON: "),
        ("d.csv", "text,id\na,1\nb\n", ":3 has 1 fields, and the header 2"),
        ("d.csv", 'text,id\n"a\nb",1\nb,2,3\n', ":4 has 3 fields, and the header 2"),
        ("d.csv", 'text,id\na,1\n"b,2\n', ":3 is not a valid row: unexpected end of data"),
        ("d.csv", 'text,id\na,1\n"b"c,2\n', ":3 is not a valid row: "),
        ("d.csv", "text,id,text\na,1,b\n", ":1 has two columns with the name 'text'"),
        ("d.txt", b"abc\n\xffd", r" is not UTF-8 text \(invalid start byte at byte 4, in line 2\)"),
        ("d.csv", b"text\n\xed\xa0\x80\n", r" is not UTF-8 text .* in line 2"),
        ("d.csv", "text\nabc".encode("utf-16"), " is UTF-16 or UTF-32 text: save it as UTF-8"),
        ("d.txt", "text".encode("utf-16-le"), ":1 has a zero byte"),
        ("d.txt", "text".encode("utf-32"), " is UTF-16 or UTF-32 text"),
        ("d.jsonl", b'{"text": "a"}\n{"text": "\0"}', ":2 has a zero byte"),
        ("d.txt.gz", b"text", " is not an intact gzip file: "),
        (
            "d.txt.gz",
            gzip.compress(LINES.encode(), mtime=0)[:-9],
            " is not an intact gzip file: it ends too",
        ),
        (
            "d.txt.gz",
            gzip.compress(b"a", mtime=0)[:-8] + 8 * b"x",
            " is not an intact gzip file: .*check",
        ),
        ("d.txt.gz", gzip.compress(b"a", mtime=0) + b"more", " is not an intact gzip file: "),
    ],
)
def test_what_is_wrong_with_a_file_is_named_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + message) as error:
        rows(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_members_of_a_gzip_file_follow_each_other(tmp_path: Path) -> None:
    members = [gzip.compress(line.encode(), mtime=0) for line in LINES.splitlines(keepends=True)]
    assert rows(written(tmp_path / "d.jsonl.gz", b"".join(members) + 512 * b"\0")) == ROWS


def test_a_small_file_that_expands_to_gigabytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "ALWAYS_ALLOWED", 10_000)
    path = written(tmp_path / "d.txt.gz", gzip.compress(b"a" * 10_000, mtime=0))
    assert len(rows(path)[0]["text"]) == 10_000
    for content in (
        gzip.compress(b"a" * 100_000, mtime=0),
        30 * gzip.compress(b"a" * 9_000, mtime=0),
    ):
        with pytest.raises(ValueError, match=r"d\.txt\.gz expands to more than 100 times its size"):
            rows(written(path, content))


def test_a_field_may_be_large_and_the_limit_of_the_process_stays(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    assert rows(written(tmp_path / "d.csv", f"text\n{'a' * 300_000}\n")) == [
        {"text": "a" * 300_000}
    ]
    assert csv.field_size_limit() == limit


def test_a_number_may_have_any_number_of_digits(tmp_path: Path) -> None:
    """It stands in a column that is not used. Python's integers stop at 4,300 digits."""
    (row,) = rows(written(tmp_path / "d.jsonl", '{"id": ' + "9" * 5000 + ', "text": "a"}'))
    assert row["text"] == "a"


def test_what_is_not_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl does not exist"):
        rows(tmp_path / "nowhere.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "link.jsonl")
    with pytest.raises((FileNotFoundError, OSError), match=r"link\.jsonl"):
        rows(tmp_path / "link.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"folder\.jsonl is a folder: the data must be one file"):
        rows(tmp_path / "folder.jsonl")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
def test_sockets_and_pipes_are_named_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    # The path of a socket must be short.
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket.jsonl")
        for name in ("pipe.jsonl", "socket.jsonl"):
            with pytest.raises(ValueError, match=rf"{name} is not a regular file"):
                rows(tmp_path / name)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "d.jsonl", LINES)
    path.chmod(0)
    if os.geteuid() == 0:
        # Root may read anything.
        def refuse(self: Path) -> bytes:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError, match=r"d\.jsonl"):
        rows(path)


@given(st.text(), st.integers(1, 50))
def test_a_text_in_a_message_is_printable_and_short(text: str, limit: int) -> None:
    assert shown(text, limit).isprintable()
    if text.isprintable() and len(text) <= limit:
        assert shown(text, limit) == text
    assert len(shown(text, limit)) <= 10 * limit + 3


def test_parquet_needs_pyarrow_and_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = written(tmp_path / "d.parquet", b"PAR1")
    with pytest.raises(ValueError, match=r"d\.parquet: .* pip install pyarrow"):
        rows(path)


class TestParquet:
    @pytest.fixture
    def parquet(self) -> Any:
        return pytest.importorskip("pyarrow.parquet", reason="Parquet files are read with pyarrow")

    def write(self, parquet: Any, path: Path, columns: dict[str, Any], **options: Any) -> Path:
        import pyarrow

        parquet.write_table(pyarrow.table(columns), path, **options)
        return path

    def test_each_row_is_a_record(self, tmp_path: Path, parquet: Any) -> None:
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        columns = {"id": range(100), "text": ["a"] * 99 + [None], "messages": [None] * 99 + [talk]}
        path = self.write(parquet, tmp_path / "d.PARQUET", columns, row_group_size=7)
        found = list(read_rows(path, COLUMNS))
        assert [row["text"] for _, row in found] == columns["text"]
        assert found[-1] == (f"{path}: row 100", {"id": None, "text": None, "messages": talk})

    def test_strings_of_every_type_are_texts(self, tmp_path: Path, parquet: Any) -> None:
        import pyarrow

        plain = pyarrow.array(["a", None, "ü"])
        for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())):
            path = self.write(parquet, tmp_path / "d.parquet", {"text": plain.cast(kind)})
            assert [row["text"] for row in rows(path)] == ["a", None, "ü"]

    def test_columns_that_are_not_used_are_not_read(self, tmp_path: Path, parquet: Any) -> None:
        import pyarrow

        # Python's datetime ends with the year 9999.
        times = pyarrow.array([2**60], pyarrow.timestamp("us"))
        path = self.write(parquet, tmp_path / "d.parquet", {"at": times, "text": ["a"]})
        assert rows(path) == [{"at": None, "text": "a"}]

    def test_damage_is_named(self, tmp_path: Path, parquet: Any) -> None:
        path = self.write(parquet, tmp_path / "d.parquet", {"text": ["a text"] * 50})
        content = path.read_bytes()
        for damaged in (b"", b"PAR1", content[:-20], b"x" * len(content)):
            with pytest.raises(ValueError, match=r"d\.parquet is not an intact Parquet file"):
                rows(written(path, damaged))

    def test_equal_columns_are_refused(self, tmp_path: Path, parquet: Any) -> None:
        import pyarrow

        table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
        parquet.write_table(table, tmp_path / "d.parquet")
        with pytest.raises(ValueError, match=r"d\.parquet has two columns with the name 'text'"):
            rows(tmp_path / "d.parquet")

    def test_a_small_file_of_many_rows_is_refused(
        self, tmp_path: Path, parquet: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(formats, "ALWAYS_ALLOWED", 10_000)
        columns = {"text": ["the same text again"] * 50_000}
        path = self.write(parquet, tmp_path / "d.parquet", columns)
        with pytest.raises(ValueError, match="expands to more than 100 times its size"):
            rows(path)
