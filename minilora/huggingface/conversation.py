"""A conversation with a model, whose adapter can be off for some of its answers."""

import contextlib
from collections.abc import Callable
from typing import Any

from torch import nn

from minilora.huggingface.generation import check_limit, stream
from minilora.huggingface.sampling import GREEDY, Sampling
from minilora.surgery import disabled
from minilora.targets import adapter_names

Turn = dict[str, str]


class Conversation:
    """The turns so far, and the model that answers.

    A model without a chat template has no turns: it continues each message on its own.

    Args:
        model, tokenizer: a causal language model of transformers, with an adapter or without.
        limit: maximum number of new tokens per answer.
        sampling: how they are chosen; the seed goes up by one with each message.
        system: the text of a system turn to begin with.

    Raises:
        ValueError: there is a system turn and the tokenizer has no chat template, or the limit is
            not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        limit: int = 256,
        sampling: Sampling = GREEDY,
        system: str | None = None,
    ) -> None:
        check_limit(limit)
        self.has_turns = bool(tokenizer.chat_template)
        if system is not None and not self.has_turns:
            raise ValueError("--system: the tokenizer has no chat template that could place it")

        self.model = model
        self.tokenizer = tokenizer
        self.limit = limit
        self.sampling = self._last_sampling = sampling
        self.has_adapter = bool(adapter_names(model))
        self.adapter_is_on = self.has_adapter
        self._start = [] if system is None else [_turn("system", system)]
        self._turns = self._start

    def ask(self, message: str, write: Callable[[str], object]) -> str:
        """Answers a message, and returns the answer.

        The message and the answer become turns, also if Ctrl-C stops the answer after its first
        words. Otherwise, after an error, the conversation stays as it was.

        Args:
            message: a text.
            write: called with each part of the answer as it is produced.

        Raises:
            ContextExceededError: there is no space for the answer in the model's context.
            ValueError: the message cannot be encoded, or the chat template fails.
        """
        return self._answer([*self._turns, _turn("user", message)], write, self.sampling)

    def ask_again(self, write: Callable[[str], object]) -> str:
        """Answers the last message once more; the answer takes the place of the one before.

        The seed is that of the answer before, so that the two differ in the model alone.

        Raises:
            ValueError: there is no message yet. See also `ask`.
        """
        if self._turns == self._start:
            raise ValueError("there is no message yet")
        return self._answer(self._turns[:-1], write, self._last_sampling)

    def clear(self) -> None:
        """Forgets all turns but that of the system."""
        self._turns = self._start

    def _answer(self, turns: list[Turn], write: Callable[[str], object], sampling: Sampling) -> str:
        parts: list[str] = []

        def write_and_keep(part: str) -> None:
            write(part)
            parts.append(part)

        prompt = turns if self.has_turns else turns[-1]["content"]
        try:
            with self._side():
                answer = stream(
                    self.model,
                    self.tokenizer,
                    prompt,
                    write_and_keep,
                    limit=self.limit,
                    sampling=sampling,
                )
        except KeyboardInterrupt:
            if parts:
                self._keep([*turns, _turn("assistant", "".join(parts))], sampling)
            raise
        self._keep([*turns, _turn("assistant", answer)], sampling)
        return answer

    def _keep(self, turns: list[Turn], sampling: Sampling) -> None:
        """Takes over the turns, whose last one was drawn like this."""
        self._turns = turns
        self._last_sampling = sampling
        self.sampling = sampling.with_next_seed()

    def _side(self) -> contextlib.AbstractContextManager[None]:
        if self.adapter_is_on or not self.has_adapter:
            return contextlib.nullcontext()
        return disabled(self.model)


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}
