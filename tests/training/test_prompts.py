"""Files of prompts: what is read, what is refused, and how the answers are written."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.files.text import shown_lines
from minilora.training.prompts import answers_as_json, read_prompts


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_a_text_has_one_prompt_per_line(tmp_path: Path) -> None:
    file = written(tmp_path / "p.TXT", "\ufeffone\r\n\n  \n two \u2028 more\nthree")
    assert read_prompts(file) == ["one", " two \u2028 more", "three"]


def test_a_record_has_a_prompt_or_messages_and_its_answer_is_not_looked_at(tmp_path: Path) -> None:
    answered = [user("a"), {"role": "assistant", "content": "b"}]
    records: list[dict[str, Any]] = [
        {"prompt": "one"},
        {"prompt": "two", "completion": "an answer", "id": 7},
        {"prompt": None, "messages": [user("three")], "tools": []},
        {"prompt": float("nan"), "messages": [user("three")], "functions": None},
        {"messages": answered},
        {"messages": [*answered, user("c")]},
    ]
    file = written(tmp_path / "p.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    expected = ["one", "two", *2 * [[user("three")]], [user("a")], [*answered, user("c")]]
    assert read_prompts(file) == expected

    table = written(tmp_path / "p.csv", "prompt,completion\none,1\ntwo,2\n")
    assert read_prompts(table) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "", "p.txt is empty: it holds no prompt"),
        ("p.txt", "\n \n", "p.txt is empty: it holds no prompt"),
        ("p.jsonl", "\n", "p.jsonl is empty: it holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', r"p.jsonl:2 has the keys \['text'\]; expect"),
        ("p.jsonl", '{"prompt": "a", "messages": [1]}', "p.jsonl:1 has the keys"),
        ("p.jsonl", '{"prompt": 3}', "p.jsonl:1: 'prompt' is a number, not a text"),
        ("p.jsonl", '{"prompt": " "}', "p.jsonl:1: 'prompt' holds only white space"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "p.jsonl:1: 'prompt' contains an unpaired surrogate"),
        ("p.jsonl", '{"messages": "hi"}', "p.jsonl:1: 'messages' is a text, not a list"),
        ("p.jsonl", '{"messages": [{"role": "x", "content": "a"}]}', "turn 1 has the role 'x'"),
        (
            "p.jsonl",
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            "turn 1 is the assistant's",
        ),
        ("p.jsonl", '{"prompt": "a", "tools": [1]}', "p.jsonl:1 has 'tools', which is not supp"),
        (
            "p.jsonl",
            '{"messages": [{"role": "user", "content": "a"}], "functions": "f"}',
            "p.jsonl:1 has 'functions', which is not supported",
        ),
        ("p.xyz", "hi", "p.xyz is of no known format"),
    ],
)
def test_a_file_without_prompts_is_refused(name: str, text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        read_prompts(written(tmp_path / name, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"p.txt does not exist"):
        read_prompts(tmp_path / "p.txt")


@given(st.lists(st.text(), min_size=2, max_size=2), st.booleans())
def test_answers_are_json_lines_that_a_terminal_can_show(
    texts: list[str], ascii_only: bool
) -> None:
    prompt, answer = texts
    found = answers_as_json([prompt, [user(prompt)]], [answer, "x"], ascii_only)
    lines = found.splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": prompt, "answer": answer},
        {"prompt": [user(prompt)], "answer": "x"},
    ]
    assert shown_lines(found) == found
    assert found.isascii() or not ascii_only
