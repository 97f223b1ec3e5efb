"""`minilora chat`: a conversation that is typed line by line, and its commands."""

from collections.abc import Callable

from minilora.files.text import shown
from minilora.huggingface.console import Console
from minilora.huggingface.conversation import Conversation
from minilora.huggingface.generation import ContextExceededError


class Chat:
    """Answers what is typed; a line that begins with / is a command.

    Args:
        conversation: with the model that answers.
        console: where it is typed, and shown. Without a terminal there is nobody to read a note
            and try again: a line that cannot be answered or executed raises ValueError, and an
            answer ends with Ctrl-C as any program does.
    """

    def __init__(self, conversation: Conversation, console: Console) -> None:
        self.conversation = conversation
        self.console = console

        # In the order in which /help shows them, with their docstrings.
        self.commands: dict[str, Callable[[], object]] = {
            "/base": self.switch_off,
            "/adapter": self.switch_on,
            "/again": self.ask_again,
            "/clear": self.clear,
            "/help": self.help,
        }

    def run(self) -> None:
        """Reads and answers until the input ends, or /quit."""
        if not self.conversation.has_turns:
            self.console.note(
                "The tokenizer has no chat template: each line is continued on its own."
            )
        switch = "/base switches the adapter off, " if self.conversation.has_adapter else ""
        self.console.decorate(f"{switch}/help lists the commands, Ctrl-D quits.\n")
        goes_on = True
        while goes_on:
            try:
                goes_on = self.step()
            except KeyboardInterrupt:
                if not self.console.is_terminal:
                    raise
                self.console.note("\nCtrl-D or /quit quits.")

    def step(self) -> bool:
        """Reads a line and does what it says; returns whether the chat goes on."""
        self.console.decorate("\n")
        try:
            line = self.console.read("you> ")
        except ValueError as error:
            self.refuse(error)
            return True
        if line is None or line.strip() == "/quit":
            return False
        if line.startswith("/"):
            self.execute(line.strip())
        elif line.strip():
            self.show(lambda write: self.conversation.ask(line.strip(), write))
        return True

    def execute(self, command: str) -> None:
        if command in self.commands:
            self.commands[command]()
        else:
            self.refuse(
                ValueError(
                    f"unknown command {shown(command)}: /help lists the commands, and a message "
                    "that begins with / needs a space before it"
                )
            )

    def refuse(self, error: ValueError) -> None:
        """Notes on a terminal why a line was not executed; raises the error without one."""
        if not self.console.is_terminal:
            raise error
        self.console.note(str(error))

    def show(self, answer: Callable[[Callable[[str], object]], str]) -> None:
        """Shows an answer while it is produced, or why there is none."""
        side = "adapter" if self.conversation.adapter_is_on else "base"
        self.console.decorate(f"{side}> ")
        try:
            if not answer(self.console.write):
                self.console.decorate("(an empty answer)")
            self.console.write("\n")
        except KeyboardInterrupt:
            if not self.console.is_terminal:
                raise
            self.console.note("\n(stopped)")
        except ValueError as error:
            if not self.console.is_terminal:
                raise
            self.console.note(f"({self.reason(error)})")

    @staticmethod
    def reason(error: ValueError) -> str:
        if isinstance(error, ContextExceededError):
            return (
                f"the conversation has {error.length} tokens, and {error.limit} new ones exceed "
                f"the model's context of {error.context}: /clear starts a new one"
            )
        return str(error)

    def switch_off(self) -> None:
        """switch the adapter off: the base answers"""
        self.switch(False)

    def switch_on(self) -> None:
        """switch the adapter on again"""
        self.switch(True)

    def switch(self, on: bool) -> None:
        if not self.conversation.has_adapter:
            self.refuse(ValueError("there is no adapter, only the base: start with --adapter"))
            return
        self.conversation.adapter_is_on = on
        state = "on" if on else "off: the base answers"
        self.console.note(f"The adapter is {state}. /again answers the last message once more.")

    def ask_again(self) -> None:
        """answer the last message once more, with the same seed, to compare"""
        self.show(self.conversation.ask_again)

    def clear(self) -> None:
        """start a new conversation"""
        self.conversation.clear()
        self.console.note("Started a new conversation.")

    def help(self) -> None:
        """show this list"""
        for name, command in self.commands.items():
            self.console.note(f"  {name:9} {command.__doc__}")
        self.console.note(f"  {'/quit':9} quit, as Ctrl-D does; Ctrl-C stops an answer")
