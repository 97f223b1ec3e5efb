"""The training examples and the hold-out: a part of the data, or a file of its own."""

from collections.abc import Sequence
from typing import Any

from minilora.files.text import shown
from minilora.training.batches import check_step_size, split_hold_out
from minilora.training.config import FinetuneConfig
from minilora.training.data import Example, encode_records
from minilora.training.records import Record, read_records

# Each with its place, "file:line".
Records = list[tuple[str, Record]]


def read_data(config: FinetuneConfig) -> tuple[Records, Records]:
    """Returns the records of `data` and of `eval_data`, none if there is no such file.

    Raises:
        ValueError, OSError: see `read_records`.
    """
    data = read_records(config.data)
    return data, read_records(config.eval_data) if config.eval_data is not None else []


def encode_data(
    data: Records, eval_data: Records, tokenizer: Any, config: FinetuneConfig
) -> tuple[list[Example], list[Example]]:
    """Encodes what `read_data` returned as (training, hold-out).

    Raises:
        ValueError: a record cannot be encoded; no example is left to train on, or a step is too
            large for them; all of `eval_data` is trained on; or `eval_every` asks for evaluations
            and nothing is held out.
    """

    def encoded(records: Records) -> list[Example]:
        return encode_records(
            records, tokenizer, config.max_length, learn_prompt=config.learn_prompt
        )

    training = encoded(data)
    if eval_data:
        held_out = encoded(eval_data)
        _check_something_is_new(training, held_out, config)
    else:
        training, held_out = split_hold_out(training, config.eval_fraction, config.seed)

    check_step_size(len(training), config)
    if config.eval_every and not held_out:
        raise ValueError(
            f"eval_every={config.eval_every} has nothing to evaluate: "
            f"eval_fraction={config.eval_fraction} of {len(training)} examples rounds to none. "
            "Raise eval_fraction, or give eval_data"
        )
    return training, held_out


def count_trained_on(training: Sequence[Example], held_out: Sequence[Example]) -> int:
    """Returns how many examples of the hold-out are among the training examples, token by token."""
    known = {(*example.ids, *example.labels) for example in training}
    return sum((*example.ids, *example.labels) in known for example in held_out)


def _check_something_is_new(
    training: Sequence[Example], held_out: Sequence[Example], config: FinetuneConfig
) -> None:
    if count_trained_on(training, held_out) == len(held_out):
        raise ValueError(
            f"all examples of eval_data={shown(config.eval_data)} are in the training data "
            f"{shown(config.data)} too, so the loss on them would not tell what the model makes of "
            "new ones: give other examples, or leave out eval_data to hold out a part of the data"
        )
