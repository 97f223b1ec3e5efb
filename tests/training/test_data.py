"""Reading a user's file, and which of its tokens are learned."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.training.data import (
    IGNORE,
    Example,
    encode,
    load_examples,
    read_records,
)

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nBe brief<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer: Callable[[str], Any]) -> Any:
    return byte_tokenizer(CHATML)


def learned_text(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in example.labels if label != IGNORE]))


def test_a_prompt_and_its_completion_render_as_the_chat_template_does(tokenizer: Any) -> None:
    (example,) = encode({"prompt": "list files", "completion": "ls -l"}, tokenizer, 200)
    messages = [
        {"role": "user", "content": "list files"},
        {"role": "assistant", "content": "ls -l"},
    ]
    assert example.ids == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    same = encode({"messages": messages}, tokenizer, 200)
    assert same == [example]


def test_only_the_answer_and_its_end_of_turn_are_learned(tokenizer: Any) -> None:
    (example,) = encode({"prompt": "list files", "completion": "ls -l"}, tokenizer, 200)
    assert learned_text(example, tokenizer) == "ls -l<|im_end|>"
    # The padding token is the end of turn: masking by id would lose it.
    assert tokenizer.pad_token_id in example.labels
    assert example.learned == len("ls -l") + 1


def test_the_prompt_is_learned_when_asked_for(tokenizer: Any) -> None:
    (example,) = encode({"prompt": "a", "completion": "b"}, tokenizer, 200, learn_prompt=True)
    assert example.labels == example.ids


def test_every_answer_of_a_conversation_is_learned(tokenizer: Any) -> None:
    turns = [
        ("system", "be kind"),
        ("user", "one"),
        ("assistant", "1"),
        ("user", "two"),
        ("assistant", "22"),
    ]
    (example,) = encode({"messages": [{"role": r, "content": c} for r, c in turns]}, tokenizer, 200)
    assert learned_text(example, tokenizer) == "1<|im_end|>22<|im_end|>"


@given(st.text(min_size=1, max_size=30), st.text(min_size=1, max_size=30))
def test_whatever_the_texts_the_learned_tokens_are_the_answer(
    tokenizer: Any, prompt: str, completion: str
) -> None:
    (example,) = encode({"prompt": prompt, "completion": completion}, tokenizer, 1000)
    if not any(mark in prompt + completion for mark in ("<|", "\ufffd")):
        assert learned_text(example, tokenizer) == f"{completion}<|im_end|>"


def test_a_text_is_learned_throughout_and_cut_into_windows(tokenizer: Any) -> None:
    examples = encode({"text": "abcdefghij"}, tokenizer, 4)
    assert [len(e.ids) for e in examples] == [4, 4, 2]
    assert "".join(learned_text(e, tokenizer) for e in examples) == "abcdefghij"


def test_a_completion_too_long_is_cut_and_a_prompt_too_long_refused(tokenizer: Any) -> None:
    record = {"prompt": "p" * 20, "completion": "c" * 80}
    (example,) = encode(record, tokenizer, 120)
    assert len(example.ids) == 120 and example.cut
    with pytest.raises(
        ValueError, match=r"data.jsonl:7: the prompt takes \d+ tokens.*max_length=40"
    ):
        encode(record, tokenizer, 40, where="data.jsonl:7")


def test_cut_answers_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    lines = [{"prompt": "p", "completion": "c" * n} for n in (5, 80, 90)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.warns(UserWarning, match="2 of 3 completions were truncated at max_length=100"):
        assert len(load_examples(tmp_path / "d.jsonl", tokenizer, 100)) == 3


def test_a_conversation_needs_a_chat_template(tokenizer: Any) -> None:
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(ValueError, match="no chat template"):
            encode({"prompt": "a", "completion": "b"}, tokenizer, 100)
        assert encode({"text": "abc"}, tokenizer, 100)
    finally:
        tokenizer.chat_template = template


def test_a_conversation_in_which_the_assistant_is_silent_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="nothing to learn"):
        encode({"messages": [{"role": "user", "content": "hello?"}]}, tokenizer, 100)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["", "  "], "is empty"),
        (['{"text": "a"}', '{"text": '], r"d\.jsonl:2 is not valid JSON"),
        (['{"text": "a"}', "", "[1]"], r"d\.jsonl:3 is a JSON list"),
        (['{"instruction": "a"}'], r"d\.jsonl:1 has the keys \['instruction'\]"),
        (['{"prompt": "a"}'], r"d\.jsonl:1 has the keys \['prompt'\]"),
        (['{"prompt": "a", "completion": 3}'], r"d\.jsonl:1"),
        (['{"messages": []}'], r"d\.jsonl:1"),
        (['{"messages": [{"role": "user"}]}'], r"d\.jsonl:1"),
        (['{"text": ""}'], r"d\.jsonl:1"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        list(read_records(path))


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(read_records(tmp_path / "nowhere.jsonl"))
    (tmp_path / "b.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8 text"):
        list(read_records(tmp_path / "b.txt"))


def test_a_text_file_and_unicode_line_separators(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "t.txt").write_text("hello\nworld")
    assert len(load_examples(tmp_path / "t.txt", tokenizer, 100)[0].ids) == 11
    # str.splitlines would cut this line in three.
    tricky = {"text": "one\u2028two\x85three"}
    (tmp_path / "u.jsonl").write_text(json.dumps(tricky, ensure_ascii=False) + "\n")
    assert [record for _, record in read_records(tmp_path / "u.jsonl")] == [tricky]
