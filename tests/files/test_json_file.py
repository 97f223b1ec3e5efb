"""JSON files are read within limits, and what is wrong names the file."""

from pathlib import Path

import pytest

from minilora.files.json_file import read_json


def test_what_is_valid_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, {"b": null}], "ü": 2.5}', encoding="utf-8")
    assert read_json(path) == {"a": [1, {"b": None}], "ü": 2.5}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (b'[{"a\\u001b": 1, "a\\u001b": 2}]', r"the key 'a\\+x1b' occurs twice"),
        (b"9" * 5000, "is not valid JSON"),
        (b"[]", "is a JSON list, not an object"),
        (b'{"a":' + b"[" * 32 + b"]" * 32 + b"}", "is nested too deeply: at most 32 levels"),
        (b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", "is nested too deeply"),
        (b'{"a":' * 100_000, "is nested too deeply"),
        (b" " * (1 << 24) + b"1", "at most 16,777,216 are read"),
    ],
)
def test_what_is_not_is_refused_by_name(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_json(path)
    assert str(path) in str(error.value) and str(error.value).isprintable()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_json(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a regular file"):
        read_json(tmp_path)
