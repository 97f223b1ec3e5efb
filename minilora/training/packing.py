r"""Packing: several examples in one row, each computed as if it were alone.

A batch of sequences of unequal length is padded to the longest one. Packed, the sequences follow
each other in rows of at most `max_length` tokens, and little is left to pad. No example may see
another, and each has the positions that it has alone:

    row        a0 a1 a2 b0 b1 c0 c1 c2 c3 .. ..       .. padding, a sequence of its own
    position    0  1  2  0  1  0  1  2  3  0  1

This is the form that transformers reads without an attention mask: from positions that start again
it makes a mask that is causal within each example and closed between them, for sliding windows too.
Not every architecture does so. Some have positions of their own, and a recurrent layer carries its
state across the border, so `check_packing` tries it out on the model itself.
"""

import inspect
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minilora.huggingface.messages import one_line
from minilora.training.data import IGNORE, Example

# The examples of the probe, and their tokens. A leak that rounding hides in one of them shows in
# another; `efficient_training` leaves the attention of shorter ones to PyTorch.
_ROWS, _LENGTH = 4, 20

# At least so many logits of each token are compared, if the vocabulary has them.
_WORDS = 1024

# Rounding differs with the shape of the batch: by a few times as much as between a row in a batch
# and the same row alone, and by so many units in the last place where those happen to be equal.
_NOISE, _UNITS = 4, 16


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distributes sequences over as few rows as best-fit decreasing needs; returns their indices.

    The longest sequence comes first, and each goes into the fullest row that it fits into. The
    result depends on the arguments alone.

    Args:
        lengths: of the sequences, none longer than a row.
        capacity: number of tokens in a row.

    Example:
        >>> pack([3, 6, 4, 2, 5], capacity=10)
        [[1, 2], [4, 0, 3]]
    """
    rows: list[list[int]] = []
    # (free tokens, row), in order.
    free: list[tuple[int, int]] = []
    longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for index in longest_first:
        length = lengths[index]
        at = bisect_left(free, (length, 0))
        if at == len(free):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left, row = free.pop(at)
        rows[row].append(index)
        insort(free, (left - length, row))
    return rows


def collate_packed(
    rows: Sequence[Sequence[Example]], pad_id: int, multiple: int = 1
) -> dict[str, Tensor]:
    """Makes one batch of rows that each hold several examples.

    The first token of an example is no label: the last one of the example before it in the row
    would be asked to predict it.

    Args:
        rows: the examples of each row, in their order.
        pad_id: the id of the padding token.
        multiple: the length of the batch is a multiple of this many tokens.

    Returns:
        input_ids, position_ids and labels, each int64 [rows, length]. There is no attention_mask:
        transformers looks for packed sequences only where none is given.
    """
    lengths = [sum(len(example.ids) for example in row) for row in rows]
    longest = max(lengths)
    length = -(-longest // multiple) * multiple

    shape = len(rows), length
    ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORE)
    positions = torch.zeros(shape, dtype=torch.long)
    for i, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example.ids)
            here = i, slice(start, end)
            ids[here] = torch.tensor(example.ids)
            labels[here] = torch.tensor(example.labels)
            labels[i, start] = IGNORE
            positions[here] = torch.arange(end - start)
            start = end
        positions[i, start:] = torch.arange(length - start)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Inside the block the model keeps no keys and values for generation.

    With such a cache transformers does not look for packed sequences.
    """
    config: Any = getattr(model, "config", None)
    configs = [config, getattr(config, "get_text_config", lambda: None)()]
    before = [(c, c.use_cache) for c in configs if hasattr(c, "use_cache")]
    for c, _ in before:
        c.use_cache = False
    try:
        yield
    finally:
        for c, use_cache in before:
            c.use_cache = use_cache


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Raises ValueError unless a packed example has the logits that it has alone.

    The model computes a few tokens: examples behind others in a row, behind yet others, and alone.
    Other tokens before it may change no bit of an example's logits, and being alone no more than
    rounding does. The model is left in the mode, training or evaluation, that it was in.

    Args:
        model: a causal language model from transformers.

    Raises:
        ValueError: it cannot take packed sequences. The message names the model and the reason.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, vocab_size=64))
        >>> check_packing(model)
    """
    parameters = inspect.signature(model.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    if "position_ids" not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise _refusal(model, "for which its forward would need position_ids")

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with without_cache(model):
            reason = _reason_against(model)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _refusal(model, f"on which it fails ({one_line(error)})") from error
    finally:
        for module, training in modes:
            module.training = training
    if reason is not None:
        raise _refusal(model, reason)


def _refusal(model: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"packing=True: {type(model).__name__} cannot take packed sequences, {reason}: "
        "set packing=False (--no-packing)"
    )


def _reason_against(model: nn.Module) -> str | None:
    """What the model does wrong with packed sequences, if anything."""
    before, others, examples = _probe_tokens(model)
    positions = torch.arange(_LENGTH, device=examples.device).expand_as(examples)
    restarting = torch.cat([positions, positions], dim=1)

    def logits(ids: Tensor, **arguments: Tensor) -> Tensor:
        """Of the examples, for a part of the vocabulary, each less their mean."""
        found: Tensor = model(input_ids=ids, **arguments).logits
        every = max(1, found.shape[-1] // _WORDS)
        found = found[:_ROWS, -_LENGTH:, ::every].cpu().double()
        return found - found.mean(dim=-1, keepdim=True)

    def packed_after(before: Tensor) -> Tensor:
        return logits(torch.cat([before, examples], dim=1), position_ids=restarting)

    def batched_with(others: Tensor) -> Tensor:
        ids = torch.cat([examples, others])
        return logits(ids, attention_mask=torch.ones_like(ids))

    # Other tokens before it change no bit of an example, or as little as those of another row do:
    # experts multiply the tokens of all rows together, and round by their number.
    packed, batched = packed_after(before), batched_with(before)
    unrelated = _distance(batched, batched_with(others))
    if _distance(packed, packed_after(others)) > _NOISE * unrelated:
        return "in which an example sees those before it"

    alone = logits(examples, position_ids=positions)
    bound = _NOISE * _distance(batched, alone)
    bound += _UNITS * _unit_in_the_last_place(model) * alone.abs().max().item()
    if _distance(packed, alone) > bound:
        return "in which an example has other logits than alone"
    return None


def _probe_tokens(model: Any) -> tuple[Tensor, ...]:
    """Three times some examples of random tokens, [_ROWS, _LENGTH]."""
    embeddings = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    # Special tokens are the first or the last of a vocabulary.
    least = len(embeddings) // 4
    most = max(len(embeddings) // 2, least + 1)
    ids = torch.randint(least, most, (3, _ROWS, _LENGTH), generator=generator)
    return ids.to(embeddings.device).unbind()


def _unit_in_the_last_place(model: nn.Module) -> float:
    """Of a number between 1 and 2, in the dtype that the model computes in."""
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return torch.finfo(dtypes[0]).eps


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
