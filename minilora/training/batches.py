"""From examples to batches: the hold-out split, the order of the examples, padding."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.training.config import FinetuneConfig
from minilora.training.data import IGNORE, Example

# Matrix products are compiled for each shape that occurs. Padding to a multiple of a few tokens
# keeps the number of shapes, and so the time and memory of compiling, small.
PAD_TO_MULTIPLE = 16

# How often one step may show an example. With 8 the default batch size serves even one example.
MOST_REPEATS = 8

# Examples of one optimizer step, each with its index in the training data.
Picked = Sequence[tuple[int, Example]]


def split_hold_out(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Splits the examples at random into (training, hold-out).

    Raises:
        ValueError: no example would be left to train on.
    """
    count = round(len(examples) * fraction)
    if count >= len(examples):
        raise ValueError(
            f"eval_fraction={fraction} leaves none of {len(examples)} examples to train on"
        )
    shuffled = [examples[i] for i in _permutation(len(examples), seed)]
    return shuffled[count:], shuffled[:count]


def _permutation(n: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(n, generator=generator).tolist()
    return order


def batch_order(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Returns the indices, among n examples, that make up batch `step` (0, 1, ...).

    The batches follow each other through an endless sequence of reshuffled epochs. The result is a
    function of the arguments alone, so that a run resumes at any step without replaying the ones
    before.
    """
    picked: list[int] = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, index = divmod(position, n)
        if not picked or index == 0:
            order = _permutation(n, zlib.crc32(f"{seed} {epoch}".encode()))
        picked.append(order[index])
    return picked


def check_step_size(examples: int, config: FinetuneConfig) -> None:
    """Raises ValueError if a step is so large that it would show the same examples again and again.

    Args:
        examples: number of training examples.
        config: batch_size and grad_accum.
    """
    per_step = config.batch_size * config.grad_accum
    if per_step > MOST_REPEATS * examples:
        raise ValueError(
            f"batch_size={config.batch_size} times grad_accum={config.grad_accum} is {per_step} "
            f"sequences per step, and there are {examples} training examples: a step may show each "
            f"at most {MOST_REPEATS} times, so lower batch_size or grad_accum"
        )


def pick_examples(examples: Sequence[Example], config: FinetuneConfig, step: int) -> Picked:
    """Returns the examples of an optimizer step (0, 1, ...), sorted by length.

    Sorted, the examples of a micro-batch have similar lengths, which saves padding. The sum of
    their gradients is the same in any order.

    Raises:
        ValueError: see `check_step_size`.
    """
    check_step_size(len(examples), config)
    per_step = config.batch_size * config.grad_accum
    order = batch_order(len(examples), per_step, config.seed, step)
    picked = [(i, examples[i]) for i in order]
    return sorted(picked, key=lambda pair: len(pair[1].ids))


def collate(examples: Sequence[Example], pad_id: int, multiple: int = 1) -> dict[str, Tensor]:
    """Pads examples on the right into one batch.

    Args:
        examples: the sequences of the batch.
        pad_id: the id of the padding token.
        multiple: the length of the batch is a multiple of this many tokens.

    Returns:
        input_ids, attention_mask and labels, each int64 [batch, length].
    """
    longest = max(len(example.ids) for example in examples)
    length = -(-longest // multiple) * multiple

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

    return {
        "input_ids": padded([example.ids for example in examples], pad_id),
        "attention_mask": padded([[1] * len(example.ids) for example in examples], 0),
        "labels": padded([example.labels for example in examples], IGNORE),
    }


def move_to(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the batch on the given device."""
    return {key: value.to(device) for key, value in batch.items()}
