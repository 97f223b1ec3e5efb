"""`minilora chat` in a terminal, as a person uses it: a pseudo-terminal and the real command."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
import tokenizers
from tiny_folder import make_adapter, make_model_folder

from minilora.files import load_adapter
from minilora.files.text import shown_lines
from minilora.huggingface import generate, load_dense

fcntl = pytest.importorskip("fcntl", reason="Windows has no pseudo-terminals")
pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")
termios = pytest.importorskip("termios", reason="Windows has no pseudo-terminals")

CTRL_C, CTRL_D = "\x03", "\x04"

# Of a machine that is busy with other things.
PATIENCE = 240


class Terminal:
    """A command that has a terminal of its own, and what is on the screen."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minilora", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=self._take_terminal,
        )
        os.close(slave)
        self.seen = ""
        self._bytes = b""

    @staticmethod
    def _take_terminal() -> None:
        """In the new process: the terminal is the one whose Ctrl-C it gets."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read_until(self, marker: str, more: int = 0, again: str = "") -> str:
        """Returns what is shown up to a marker, and forgets it.

        Args:
            more: number of characters to wait for after the marker; they are not returned.
            again: what is typed once more whenever nothing is shown for two seconds. Python notices
                a Ctrl-C that comes just before it waits for a key with the next key.
        """
        deadline = time.monotonic() + PATIENCE
        while marker not in self.seen or len(self.seen.partition(marker)[2]) < more:
            left = max(0, deadline - time.monotonic())
            ready, _, _ = select.select([self.master], [], [], min(2, left) if again else left)
            if again and left and not ready:
                self.type(again)
                continue
            assert ready, f"{marker!r} did not appear in {self.seen!r}"
            self._bytes += os.read(self.master, 4096)
            self.seen = self._bytes.decode(errors="ignore").replace("\r\n", "\n")
        before, _, self.seen = self.seen.partition(marker)
        self._bytes = self.seen.encode()
        return before

    def exit_code(self) -> int:
        """Returns the exit code of the command, which is to end by itself."""
        with contextlib.suppress(OSError):
            # A terminal that nobody has open any more cannot be read.
            while os.read(self.master, 4096):
                pass
        return self.process.wait(PATIENCE)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.master)
        self.process.kill()
        self.process.wait()


# More tokens than a test would wait for.
ENDLESS = 50_000


class Case(NamedTuple):
    """An adapter with which the answer soon ends, and without which it never does."""

    adapter: str
    answer: str
    beginning_of_the_base: str


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("terminal")
    folder = make_model_folder(root / "model", context=2 * ENDLESS)
    adapter = make_adapter(folder, root / "adapter", "dense")
    settings = folder / "generation_config.json"
    contents = json.loads(settings.read_text())
    settings.write_text(json.dumps({**contents, "eos_token_id": None}))

    # As many characters as tokens. The random model soon repeats itself.
    model, tokenizer = load_dense(folder)
    tokenizer.backend_tokenizer.decoder = tokenizers.decoders.Fuse()
    base = generate(model, tokenizer, "say yes", limit=400)
    adapted = generate(load_adapter(model, adapter), tokenizer, "say yes", limit=60)
    end = next(c for c in adapted[5:] if c not in base and c not in adapted[:5])

    end_token = tokenizer.convert_tokens_to_ids(end)
    settings.write_text(json.dumps({**contents, "eos_token_id": end_token}))
    model, tokenizer = load_dense(folder)
    base = generate(model, tokenizer, "say yes", limit=100)
    adapted = generate(load_adapter(model, adapter), tokenizer, "say yes")
    return Case(str(adapter), shown_lines(adapted), shown_lines(base))


def test_a_conversation_in_a_terminal(case: Case) -> None:
    arguments = ["--adapter", case.adapter, "--max-new-tokens", str(ENDLESS)]
    with Terminal("chat", *arguments) as terminal:
        converse(terminal, case)


def converse(terminal: Terminal, case: Case) -> None:
    head = terminal.read_until("you> ")
    assert "base model: " in head and "/base switches the adapter off" in head

    terminal.type("say yes\n")
    terminal.read_until("adapter> ")
    assert terminal.read_until("\n\nyou> ") == case.answer

    # Parts of the endless answer arrive while it is produced, and Ctrl-C ends it.
    terminal.type("/base\n")
    assert "The adapter is off" in terminal.read_until("you> ")
    terminal.type("/again\n")
    terminal.read_until("base> ", more=20)
    terminal.type(CTRL_C)
    begun = terminal.read_until("\n(stopped)").removesuffix("^C")
    length = min(len(begun), len(case.beginning_of_the_base))
    assert length >= 10 and begun[:length] == case.beginning_of_the_base[:length]
    terminal.read_until("you> ")

    # The conversation has stayed: its last message is answered once more.
    terminal.type("/adapter\n")
    assert "The adapter is on" in terminal.read_until("you> ")
    terminal.type("/again\n")
    terminal.read_until("adapter> ")
    assert terminal.read_until("\n\nyou> ") == case.answer

    # A byte that is no text is refused, and the chat goes on.
    os.write(terminal.master, b"a\xffb\n")
    assert "standard input is not UTF-8 text: " in terminal.read_until("you> ")

    # Ctrl-C leaves neither a half line nor the chat; Ctrl-D does.
    terminal.type("say")
    terminal.read_until("say")
    terminal.type(CTRL_C)
    terminal.read_until("Ctrl-D or /quit quits.", again=CTRL_C)
    terminal.read_until("you> ")
    terminal.type(CTRL_D)
    assert terminal.exit_code() == 0
