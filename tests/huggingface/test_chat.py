"""The loop of `minilora chat`: commands, notes, and what a program at the other end sees."""

import io
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from tiny_folder import shared

import minilora
from minilora.huggingface import load_dense
from minilora.huggingface.chat import Chat
from minilora.huggingface.console import Console
from minilora.huggingface.conversation import Conversation


class Person(Console):
    """A terminal at which somebody types these lines; an exception is what Ctrl-C raises."""

    def __init__(self, lines: Iterable[str | type[BaseException]]) -> None:
        super().__init__(io.StringIO(), io.StringIO(), pytest.fail)
        self.is_terminal = True
        self.lines = iter(lines)

    def read(self, prompt: str) -> str | None:
        self.write(prompt)
        line = next(self.lines, None)
        if isinstance(line, type):
            raise line
        return line

    @property
    def screen(self) -> str:
        return self.stdout.getvalue()  # type: ignore[attr-defined,no-any-return]


class Parrot(Conversation):
    """Answers without a model, and knows nothing of the adapter but whether it is on."""

    def __init__(self, has_adapter: bool = True, has_turns: bool = True) -> None:
        self.has_adapter = self.adapter_is_on = has_adapter
        self.has_turns = has_turns
        self.last = ""

    def ask(self, message: str, write: Any) -> str:
        self.last = message
        return self.ask_again(write)

    def ask_again(self, write: Any) -> str:
        if not self.last:
            raise ValueError("there is no message yet")
        if self.last == "nothing":
            return ""
        write("you said ")
        if self.last == "stop":
            raise KeyboardInterrupt
        write(self.last)
        return "you said " + self.last

    def clear(self) -> None:
        self.last = ""


def screen(*lines: str | type[BaseException], **options: Any) -> list[str]:
    """What is on the screen after these lines were typed, without the head and blank lines."""
    person = Person(lines)
    Chat(Parrot(**options), person).run()
    _, *found = [line for line in person.screen.split("\n") if line]
    return found


def test_every_answer_says_which_side_gave_it() -> None:
    assert screen("one", "/base", "two", "/adapter", "three") == [
        "you> adapter> you said one",
        "you> The adapter is off: the base answers. /again answers the last message once more.",
        "you> base> you said two",
        "you> The adapter is on. /again answers the last message once more.",
        "you> adapter> you said three",
        "you> ",
    ]


def test_the_head_says_how_to_compare_and_how_to_leave() -> None:
    heads = []
    for has_adapter in (True, False):
        person = Person(())
        Chat(Parrot(has_adapter), person).run()
        heads.append(person.screen.splitlines()[0])
    assert heads == [
        "/base switches the adapter off, /help lists the commands, Ctrl-D quits.",
        "/help lists the commands, Ctrl-D quits.",
    ]


def test_again_is_for_comparing_and_clear_forgets() -> None:
    found = screen("one", "/base", "/again", "/clear", "/again")
    assert found[2:] == [
        "you> base> you said one",
        "you> Started a new conversation.",
        "you> base> (there is no message yet)",
        "you> ",
    ]


@pytest.mark.parametrize("command", ["/base", "/adapter"])
def test_without_an_adapter_there_is_only_the_base(command: str) -> None:
    there_is_none = "you> there is no adapter, only the base: start with --adapter"
    found = screen(command, "one", has_adapter=False)
    assert found[:2] == [there_is_none, "you> base> you said one"]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    found = "\n".join(screen("/help"))
    for command in ("/base", "/adapter", "/again", "/clear", "/help", "/quit"):
        assert f"  {command} " in found
    assert "None" not in found


def test_a_message_that_begins_with_a_slash_needs_a_space() -> None:
    unknown, answer, _ = screen("/etc is what?", " /etc is what?")
    assert unknown.startswith("you> unknown command /etc is what?: /help lists the commands")
    assert answer == "you> adapter> you said /etc is what?"


def test_ctrl_c_stops_an_answer_and_does_not_leave() -> None:
    assert screen("stop", "one", KeyboardInterrupt, "two") == [
        "you> adapter> you said ",
        "(stopped)",
        "you> adapter> you said one",
        "you> ",
        "Ctrl-D or /quit quits.",
        "you> adapter> you said two",
        "you> ",
    ]


def test_quit_leaves_and_blank_lines_ask_nothing() -> None:
    assert screen("", "  ", "/quit", "one") == ["you> ", "you> ", "you> "]


def test_an_empty_answer_is_called_one() -> None:
    assert screen("nothing")[0] == "you> adapter> (an empty answer)"


def test_a_model_without_turns_says_so() -> None:
    person = Person(())
    Chat(Parrot(has_turns=False), person).run()
    first = person.screen.splitlines()[0]
    assert first == "The tokenizer has no chat template: each line is continued on its own."


def piped(text: str, conversation: Conversation) -> tuple[str, list[str]]:
    """What a program reads that writes this text, and the notes that a person sees."""
    notes: list[str] = []
    stdout = io.StringIO()
    Chat(conversation, Console(io.StringIO(text), stdout, notes.append)).run()
    return stdout.getvalue(), notes


def test_a_program_reads_answers_and_nothing_else() -> None:
    found, notes = piped("one\r\n\n/base\ntwo", Parrot())
    assert found == "you said one\nyou said two\n"
    assert len(notes) == 1 and notes[0].startswith("The adapter is off")
    assert piped("one\n/quit\ntwo\n", Parrot())[0] == "you said one\n"


def test_for_a_program_a_refusal_is_an_error_and_ctrl_c_is_one() -> None:
    with pytest.raises(ValueError, match="there is no message yet"):
        piped("/again\none\n", Parrot())
    with pytest.raises(KeyboardInterrupt):
        piped("stop\none\n", Parrot())


def test_for_a_program_an_unknown_command_is_an_error_and_not_a_missing_answer() -> None:
    with pytest.raises(ValueError, match=r"unknown command /x: .* needs a space before it"):
        piped("one\n/x\ntwo\n", Parrot())
    with pytest.raises(ValueError, match="there is no adapter, only the base"):
        piped("one\n/base\ntwo\n", Parrot(has_adapter=False))
    assert piped(" /x\n/help\n/clear\ntwo\n", Parrot())[0] == "you said /x\nyou said two\n"


def bytes_of_a_pipe(content: bytes) -> io.TextIOWrapper:
    """Standard input as Python opens it in a locale that is not UTF-8."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="latin-1")


def test_for_a_program_a_line_that_is_not_text_is_an_error() -> None:
    stdout = io.StringIO()
    stdin = bytes_of_a_pipe("Grüße\n".encode() + b"a\xffb\ntwo\n")
    said = "standard input is not UTF-8 text: .* 0xff in position 1: invalid start byte"
    with pytest.raises(ValueError, match=said):
        Chat(Parrot(), Console(stdin, stdout, pytest.fail)).run()
    assert stdout.getvalue() == "you said Grüße\n"


def test_on_a_terminal_a_line_that_is_not_text_is_noted_and_the_chat_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"a\xffb\none\n"), encoding="utf-8")
    monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
    stdout = Screen()

    def typed(prompt: str) -> str:
        stdout.write(prompt)
        line = stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    monkeypatch.setattr("builtins.input", typed)
    Chat(Parrot(), Console(stdin, stdout, pytest.fail)).run()
    _, refused, answered, _ = [line for line in stdout.getvalue().split("\n") if line]
    assert refused.startswith("you> standard input is not UTF-8 text: ")
    assert answered == "you> adapter> you said one"


@pytest.fixture(scope="module")
def adapted() -> tuple[Any, Any]:
    model, tokenizer = load_dense(shared() / "model", dtype=torch.float32)
    return minilora.load_adapter(model, shared() / "on-dense"), tokenizer


def test_a_full_context_says_how_to_go_on(adapted: tuple[Any, Any]) -> None:
    person = Person(["x" * 450, "say yes"])
    Chat(Conversation(*adapted, limit=100), person).run()
    refused, answered = (line for line in person.screen.split("\n") if "adapter>" in line)
    assert refused.endswith("exceed the model's context of 512: /clear starts a new one)")
    assert "exceed" not in answered and answered != "you> adapter> "


def test_half_a_character_is_refused_and_the_chat_goes_on(adapted: tuple[Any, Any]) -> None:
    person = Person(["\udcff", "say yes"])
    Chat(Conversation(*adapted, limit=10), person).run()
    refused, answered = (line for line in person.screen.split("\n") if "adapter>" in line)
    assert "unpaired surrogate" in refused and "surrogate" not in answered


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_answer_cannot_control_the_terminal() -> None:
    text = "one\n\ttwo\x1b[2J \x9b3\r\u202eend ü\u00a0👩\u200d💻"
    stdout = Screen()
    Console(io.StringIO(), stdout, pytest.fail).write(text)
    assert stdout.getvalue() == ("one\n\ttwo\\x1b[2J \\x9b3\\r\\u202eend ü\u00a0👩\u200d💻")
    stdout = io.StringIO()  # type: ignore[assignment]
    Console(io.StringIO(), stdout, pytest.fail).write(text)
    assert stdout.getvalue() == text
