"""Sample answers: what the model says to prompts of the hold-out, before and after training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from minilora.huggingface.context import context_length
from minilora.huggingface.generation import apply_template, generate_batch
from minilora.training.data import Example
from minilora.training.hold_out import Records
from minilora.training.records import Messages, Record, conversation

# Of an answer. What is expected may be longer; then the answer is cut.
MOST_TOKENS = 128

# A model that goes on after the expected answer is seen to do so: longer by a half, and by so many.
MARGIN = 8


@dataclass(frozen=True)
class Sample:
    """A prompt of the hold-out, and what the model answered before and after training.

    Attributes:
        prompt: the last turn of the user.
        expected: the completion in the data.
        before: the answer of the base model.
        after: the answer with the finished adapter.
    """

    prompt: str
    expected: str
    before: str
    after: str

    @property
    def exact(self) -> bool:
        """Whether the answer after training is the expected one, apart from white space around."""
        return self.after.strip() == self.expected.strip()

    @property
    def exact_before(self) -> bool:
        """The same of the answer before training."""
        return self.before.strip() == self.expected.strip()


@dataclass(frozen=True)
class Question:
    """A prompt of the hold-out.

    Attributes:
        turns: the conversation up to the answer.
        expected: the last answer in it.
    """

    turns: Messages
    expected: str

    @property
    def prompt(self) -> str:
        """The last turn of the user, or the last one of all if the user says nothing."""
        said = [turn["content"] for turn in self.turns if turn["role"] == "user"]
        return said[-1] if said else self.turns[-1]["content"]

    def answered(self, before: str, after: str) -> Sample:
        """Returns the sample with both answers."""
        return Sample(self.prompt, self.expected, before, after)


def pick_questions(held_out: Sequence[Example], records: Records, count: int) -> list[Question]:
    """Returns the prompts of the first `count` conversations of the hold-out.

    A text without turns has no prompt, and a conversation that was truncated no whole answer.

    Args:
        held_out: the examples of the hold-out.
        records: what they were encoded from.
        count: at most so many.
    """
    found = dict(records)
    whole = [found[example.where] for example in held_out if not example.cut]
    conversations = [record for record in whole if "text" not in record]
    return [_question(record) for record in conversations[:count]]


def _question(record: Record) -> Question:
    turns = conversation(record)
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    return Question(turns[:last], turns[last]["content"])


def ask(model: nn.Module, tokenizer: Any, questions: Sequence[Question]) -> list[str]:
    """Returns the model's greedy answers.

    An answer has at most one and a half times the tokens of the longest expected one and a few
    more, 128 in all, and no more than fit into the model's context.
    """
    if not questions:
        return []
    limit = _limit(model, tokenizer, questions)
    prompts = [question.turns for question in questions]
    return generate_batch(model, tokenizer, prompts, limit=limit)


def _limit(model: Any, tokenizer: Any, questions: Sequence[Question]) -> int:
    expected = max(len(tokenizer(question.expected)["input_ids"]) for question in questions)
    limit = min(MOST_TOKENS, expected + expected // 2 + MARGIN)

    context = context_length(model.config)
    if context is None:
        return limit
    prompts = [
        apply_template(tokenizer, q.turns, add_generation_prompt=True, return_dict=True)
        for q in questions
    ]
    return min(limit, context - max(len(prompt["input_ids"]) for prompt in prompts))
