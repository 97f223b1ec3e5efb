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


def spoken(**options: Any) -> st.SearchStrategy[str]:
    """Texts that hold more than white space, and no zero character."""
    texts = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, **options)
    return texts.filter(str.strip)


@given(spoken(max_size=30), spoken(max_size=30))
def test_whatever_the_texts_the_learned_tokens_are_the_answer(
    tokenizer: Any, prompt: str, completion: str
) -> None:
    (example,) = encode({"prompt": prompt, "completion": completion}, tokenizer, 1000)
    assert learned_text(example, tokenizer) == f"{completion}<|im_end|>"


def test_a_text_is_learned_throughout_and_cut_into_windows(tokenizer: Any) -> None:
    examples = encode({"text": "abcdefghij"}, tokenizer, 4)
    # Each window begins with the last token of the one before, which is not learned again.
    assert [len(e.ids) for e in examples] == [4, 4, 4]
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


@pytest.mark.parametrize("size", range(2, 14))
def test_every_token_of_a_text_but_the_first_is_predicted_once(tokenizer: Any, size: int) -> None:
    examples = encode({"text": "abcdefghijkl"}, tokenizer, size)
    assert max(len(e.ids) for e in examples) <= size
    assert sum(e.learned for e in examples) == 11


@pytest.mark.parametrize(("text", "max_length"), [("a", 100), ("abc", 1)])
def test_a_text_without_a_token_to_predict_is_refused(
    tokenizer: Any, text: str, max_length: int
) -> None:
    with pytest.raises(ValueError, match=r"d\.jsonl:3: a text of \d tokens .* nothing to learn"):
        encode({"text": text}, tokenizer, max_length, where="d.jsonl:3")


def test_parts_of_a_content_are_one_text_and_not_their_python_repr(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": parts}]
    (example,) = encode({"messages": turns}, tokenizer, 200)
    assert learned_text(example, tokenizer) == "two parts<|im_end|>"


@pytest.mark.parametrize("turn", [0, 1])
def test_a_token_that_marks_turns_is_refused_within_a_turn(tokenizer: Any, turn: int) -> None:
    """It would be tokenized as what it marks: a turn that ends early, or a second one."""
    record = {"prompt": "say yes", "completion": "yes"}
    key = ("prompt", "completion")[turn]
    record[key] += "<|im_end|>"
    with pytest.raises(ValueError, match=rf"d:1: turn {turn + 1} contains <\|im_end\|>"):
        encode(record, tokenizer, 200, where="d:1")
    # A text is taken as it is.
    assert encode({"text": "yes<|im_end|>"}, tokenizer, 200)[0].ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "fails .* roles must alternate"),
        ("{{ messages[9].role }}", "fails .* UndefinedError"),
        ("{{ 1 / 0 }}", "fails .* ZeroDivisionError"),
        ("{% for m in %}", "fails .* TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "fails .* SecurityError"),
        ("{{ messages[9] + '\x1b[31m' }}", "fails"),
        (CHATML.replace("m['content']", "m['content'] | upper"), r"turn 1 \(user\) as it is"),
        (
            CHATML.replace("m['content']", "'' if m['role'] == 'user' else m['content']"),
            r"turn 1 \(user\) as it is",
        ),
        (
            CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"),
            r"turn 2 \(assistant\) as it is",
        ),
    ],
)
def test_a_template_that_fails_or_changes_a_turn_is_named_with_the_line(
    byte_tokenizer: Callable[[str], Any], template: str, message: str
) -> None:
    record = {"prompt": "say yes", "completion": "<think>hm</think>yes"}
    with pytest.raises(ValueError, match=r"d\.jsonl:7: .*" + message) as error:
        encode(record, byte_tokenizer(template), 400, where="d.jsonl:7")
    assert "\x1b" not in str(error.value)


def test_a_slow_tokenizer_is_refused(tokenizer: Any) -> None:
    class Slow:
        chat_template = CHATML
        is_fast = False

    with pytest.raises(ValueError, match=r"d:1: this tokenizer \(Slow\) is not a fast one"):
        encode({"prompt": "a", "completion": "b"}, Slow(), 100, where="d:1")


def test_a_file_is_read_and_encoded(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "t.txt").write_text("hello\nworld")
    assert len(load_examples(tmp_path / "t.txt", tokenizer, 100)[0].ids) == 11
    (tmp_path / "d.csv").write_text("prompt,completion\na,b\n")
    (example,) = load_examples(tmp_path / "d.csv", tokenizer, 200)
    assert example == encode({"prompt": "a", "completion": "b"}, tokenizer, 200)[0]
    assert example.where == f"{tmp_path / 'd.csv'}:2"
