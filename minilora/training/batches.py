"""From examples to batches: the hold-out split, the order of the examples, padding, packing."""

import zlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from minilora.training.config import FinetuneConfig
from minilora.training.data import IGNORE, Example
from minilora.training.packing import collate_packed, pack

# Matrix products are compiled for each shape that occurs. Padding to a multiple of a few tokens
# keeps the number of shapes, and so the time and memory of compiling, small.
PAD_TO_MULTIPLE = 16

# How often one step may show an example. With 8 the default batch size serves even one example.
MOST_REPEATS = 8

# With `group_by_length`, the number of steps whose examples are sorted together. More would save
# little: the lengths in one of 50 batches span a fiftieth of all lengths.
STEPS_PER_GROUP = 50

# Examples of one optimizer step, each with its index in the training data.
Picked = Sequence[tuple[int, Example]]

# The rows of one forward pass: one example each, or several if they are packed.
Rows = list[Picked]


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


def batch_order(
    n: int, batch_size: int, seed: int, step: int, lengths: tuple[int, ...] | None = None
) -> list[int]:
    """Returns the indices, among n examples, that make up batch `step` (0, 1, ...).

    The batches follow each other through an endless sequence of reshuffled epochs. The result is a
    function of the arguments alone, so that a run resumes at any step without replaying the ones
    before.

    Args:
        n: number of examples.
        batch_size: number of examples in a batch.
        seed, step: as in the config, and counted from 0.
        lengths: of the examples, in tokens: a batch holds examples of similar length. None: in any
            order.
    """
    picked: list[int] = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, index = divmod(position, n)
        if not picked or index == 0:
            order = _epoch_order(n, batch_size, seed, epoch, lengths)
        picked.append(order[index])
    return picked


@lru_cache(maxsize=2)
def _epoch_order(
    n: int, batch_size: int, seed: int, epoch: int, lengths: tuple[int, ...] | None
) -> list[int]:
    """The order of all examples in an epoch, in which each occurs once."""
    order = _permutation(n, zlib.crc32(f"{seed} {epoch}".encode()))
    if lengths is None:
        return order

    # The first examples complete the batch that the epoch before has begun.
    begun = -epoch * n % batch_size
    whole = begun + max(0, n - begun) // batch_size * batch_size
    size = STEPS_PER_GROUP * batch_size
    batches: list[list[int]] = []
    for start in range(begun, whole, size):
        group = order[start : min(start + size, whole)]
        group.sort(key=lengths.__getitem__)
        for first in range(0, len(group), batch_size):
            batches.append(group[first : first + batch_size])

    # Or every group would begin with its short examples.
    shuffled = _permutation(len(batches), zlib.crc32(f"{seed} {epoch} batches".encode()))
    middle = [i for batch in shuffled for i in batches[batch]]
    return [*order[:begun], *middle, *order[whole:]]


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
    lengths = None
    if config.group_by_length:
        lengths = tuple(len(example.ids) for example in examples)
    order = batch_order(len(examples), per_step, config.seed, step, lengths)
    picked = [(i, examples[i]) for i in order]
    return sorted(picked, key=lambda pair: len(pair[1].ids))


def forward_passes(
    picked: Picked, config: FinetuneConfig, *, rank: int = 0, ranks: int = 1
) -> list[Rows]:
    """Returns the rows of each forward pass of a step.

    A pass has `batch_size` rows at most: of one example each, or packed, of as many as fit into
    `max_length` tokens. Packing changes how many passes there are, and no gradient: the examples of
    the step are the same, and each computes what it computes alone.

    Of several processes, each takes every n-th example, so that their lengths are alike, and each
    makes the same number of passes.

    Args:
        picked: the examples of the step, for all processes together.
        config: `batch_size`, `packing` and `max_length`.
        rank, ranks: of the process, and the number of all.
    """
    shares = [_in_passes(picked[k::ranks], config) for k in range(ranks)]
    return _split(shares[rank], max(map(len, shares)))


def _in_passes(picked: Picked, config: FinetuneConfig) -> list[Rows]:
    """The rows of each forward pass."""
    rows: Rows = [[pair] for pair in picked]
    if config.packing:
        lengths = [len(example.ids) for _, example in picked]
        rows = [[picked[i] for i in row] for row in pack(lengths, config.max_length)]
    size = config.batch_size
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _split(passes: list[Rows], count: int) -> list[Rows]:
    """Halves the largest passes until there are so many; there are at least as many examples."""
    while len(passes) < count:
        largest = max(range(len(passes)), key=lambda i: (len(passes[i]), len(passes[i][0])))
        rows = passes[largest]
        if len(rows) > 1:
            halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        else:
            halves = [[rows[0][: len(rows[0]) // 2]], [rows[0][len(rows[0]) // 2 :]]]
        passes = [*passes[:largest], *halves, *passes[largest + 1 :]]
    return passes


def make_batch(rows: Rows, config: FinetuneConfig, pad_id: int) -> dict[str, Tensor]:
    """Returns the batch of a forward pass: see `collate` and `collate_packed`."""
    examples = [[example for _, example in row] for row in rows]
    if config.packing:
        return collate_packed(examples, pad_id, PAD_TO_MULTIPLE)
    return collate([row[0] for row in examples], pad_id, PAD_TO_MULTIPLE)


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
