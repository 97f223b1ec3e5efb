"""What a record may say: one thing, in texts that can be trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.training.records import check_record, read_records

NAN = float("nan")
ABSENT = [None, NAN, "", []]


def turns(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def said(content: Any, **keys: Any) -> dict[str, Any]:
    return turns(
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": content} | keys
    )


TEXT = {"text": "a text"}
PAIR = {"prompt": "2 + 2?", "completion": "4"}
TALK = said("Hello")
FORMS: list[dict[str, Any]] = [TEXT, PAIR, TALK]
EMPTY = dict.fromkeys(TEXT | PAIR | TALK)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("absent", ABSENT)
def test_columns_without_a_value_are_absent(form: dict[str, Any], absent: Any) -> None:
    """As pandas and Hugging Face export a table whose rows have different forms."""
    row = {"id": 7} | dict.fromkeys(EMPTY, absent) | form
    assert check_record(row, "d:1") == form


@pytest.mark.parametrize("absent", ABSENT)
def test_keys_of_a_message_without_a_value_are_absent(absent: Any) -> None:
    """Parquet gives every message all keys."""
    assert check_record(said("Hello", tool_calls=absent, name=absent), "d:1") == TALK


@pytest.mark.parametrize(
    ("record", "which"),
    [
        (TEXT | PAIR, r"\['completion', 'prompt', 'text'\] are set"),
        (TEXT | TALK, r"\['messages', 'text'\] are set"),
        (PAIR | TALK, r"\['completion', 'messages', 'prompt'\] are set"),
        (TEXT | {"prompt": "a"}, r"\['prompt', 'text'\] are set"),
        (TALK | {"prompt": "a"}, r"\['messages', 'prompt'\] are set"),
    ],
)
def test_a_record_of_two_forms_is_ambiguous(record: dict[str, Any], which: str) -> None:
    with pytest.raises(ValueError, match=f"d:1 is ambiguous: {which}.* Set the other keys to null"):
        check_record(record, "d:1")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, r"has the keys \[\]; expected one of"),
        ({"instruction": "a"}, r"has the keys \['instruction'\]; expected one of"),
        ({"prompt": "a"}, r"has the keys \['prompt'\]; expected"),
        ({"prompt": "a", "completion": None}, r"\(\['completion'\] without a value\)"),
        (EMPTY, r"\(\['completion', 'messages', 'prompt', 'text'\] without a value\)"),
        ({"text": 3}, "'text' is a number, not a text"),
        ({"text": True}, "'text' is a truth value, not a text"),
        ({"text": ["a"]}, "'text' is a list, not a text"),
        ({"text": " \n\t\u3000"}, "'text' holds only white space"),
        ({"text": "a\ud800b"}, r"'text' contains an unpaired surrogate, \\ud800, at position 1"),
        ({"text": "a\0b"}, "'text' has a zero character at position 1"),
        (PAIR | {"completion": " "}, "'completion' holds only white space"),
        (PAIR | {"prompt": [{"role": "user", "content": "a"}]}, "'prompt' is a list, not a text"),
        (PAIR | {"completion": b"4"}, "'completion' is bytes, not a text"),
        ({"messages": "[]"}, "'messages' is a text, not a list of"),
        ({"messages": {"role": "user"}}, "'messages' is an object, not a list of"),
        (TALK | {"tools": [{"name": "f"}]}, "'tools', which is not supported"),
        (turns("Hi"), "turn 1 is a text, not an object"),
        (turns({"role": "user"}), "turn 1: 'content' is null, not a text"),
        (turns({"content": "a"}), "turn 1 has the role null; expected one of system, dev"),
        (turns({"role": 3, "content": "a"}), "turn 1 has the role a number"),
        (turns({"role": ["user"], "content": "a"}), "turn 1 has the role a list"),
        (turns({"role": "human", "content": "a"}), "turn 1 has the role 'human'"),
        (turns({"role": "\x1b[31m", "content": "a"}), r"has the role '\\x1b\[31m'"),
        (turns({"from": "human", "value": "a"}), r"the keys \['from', 'value'\] besides"),
        (said(None, tool_calls=[{"id": 1}]), r"turn 2 has the keys \['tool_calls'\] besides"),
        (said("4", weight=0), r"turn 2 has the keys \['weight'\] besides"),
        (said("4", reasoning_content="2 * 2"), r"turn 2 has the keys \['reasoning_content'\]"),
        (said(None), "turn 2: 'content' is null, not a text"),
        (said({"type": "text", "text": "4"}), "turn 2: 'content' is an object, not a text"),
        (said([]), "turn 2: 'content' is a list, not a text"),
        (said(["4"]), "turn 2: 'content': part 1 is not a text"),
        (said([{"type": "text", "text": 4}]), "turn 2: 'content': part 1 is a number"),
        (said([{"type": "text"}]), "turn 2: 'content': part 1 is not a text"),
        (
            said([{"type": "text", "text": "a"}, {"type": "image", "url": "x"}]),
            "turn 2: 'content': part 2 is not a text",
        ),
        (
            said([{"type": "text", "text": "a", "cache_control": {}}]),
            "turn 2: 'content': part 1 is not a text",
        ),
        (said(" "), "turn 2: the assistant says nothing"),
        (said([{"type": "text", "text": " "}]), "turn 2: the assistant says nothing"),
        (said("\udfff"), r"turn 2: 'content' contains an unpaired surrogate, \\udfff"),
        (turns({"role": "user", "content": "a"}), "d:1: the assistant says nothing"),
        (turns({"role": "assistant", "content": "a"}), "d:1: turn 1 is the assistant's"),
    ],
)
def test_a_record_that_cannot_be_trained_on_is_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check_record(record, "d:1")
    assert str(error.value).startswith("d:1")
    assert str(error.value).isprintable()


def test_parts_of_text_are_joined_and_other_turns_may_be_empty() -> None:
    parts = [{"type": "text", "text": "a", "image": None}, {"type": "text", "text": " b"}]
    talk = turns(
        {"role": "system", "content": ""},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": parts},
    )
    checked = check_record(talk, "d:1")["messages"]
    assert [message["content"] for message in checked] == ["", "a b", "a b"]


# NaN is a number in Python's JSON, and its halves of surrogate pairs are characters.
LEAVES = st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.just("\ud800")
KEYS = st.sampled_from(["text", "prompt", "completion", "messages", "role", "content", "type"])
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_whatever_a_record_holds_it_has_one_form_afterwards_or_is_refused(
    record: dict[str, Any],
) -> None:
    try:
        checked = check_record(record, "d:1")
    except ValueError as error:
        assert str(error).startswith("d:1") and str(error).isprintable()
        return
    assert set(checked) in ({"text"}, {"prompt", "completion"}, {"messages"})
    assert check_record(checked, "d:1") == checked


def test_the_first_record_that_is_wrong_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, [TEXT, PAIR, TEXT | PAIR, {}])))
    with pytest.raises(ValueError, match=r"d\.jsonl:3 is ambiguous"):
        read_records(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", ""),
        ("d.jsonl", "\n  \r\n\t\n"),
        ("d.json", " "),
        ("d.json", "[ ]"),
        ("d.csv", ""),
        ("d.csv", "prompt,completion\n\n"),
        ("d.tsv", "\ufeff"),
    ],
)
def test_a_file_without_records_is_empty(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} is empty"):
        read_records(tmp_path / name)


@pytest.mark.parametrize("name", ["empty.txt", "empty.md"])
def test_an_empty_text_file_is_called_empty(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"{name} is empty$"):
        read_records(tmp_path / name)
