"""Generation, for trying out a model and for measuring it: one prompt, or many at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from minilora.huggingface.context import context_length
from minilora.huggingface.messages import one_line
from minilora.huggingface.sampling import GREEDY, Draws, Sampling
from minilora.huggingface.streaming import TextStream
from minilora.kernels.reference.lora import frozen_adapters

# A text, or the turns of a conversation: {"role": ..., "content": ...}.
Prompt = str | list[dict[str, str]]


class ContextExceededError(ValueError):
    """A prompt and its answer would have more tokens than the model was made for.

    Attributes:
        length: number of tokens of the prompt.
        limit: maximum number of new tokens.
        context: the model's.
    """

    def __init__(self, length: int, limit: int, context: int) -> None:
        super().__init__(
            f"the prompt has {length} tokens, and with max_new_tokens={limit} it exceeds the "
            f"model's context of {context}: shorten the prompt, or give a lower max_new_tokens"
        )
        self.length = length
        self.limit = limit
        self.context = context


def pad_id(tokenizer: Any) -> int:
    """Returns the id to pad with: the padding token, or the end-of-text token if there is none.

    Padded positions are masked, so the choice does not affect the result.

    Raises:
        ValueError: the tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(
        "the tokenizer has neither a padding nor an end-of-text token: set pad_token or eos_token "
        "in its tokenizer_config.json"
    )


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    *,
    limit: int = 128,
    sampling: Sampling = GREEDY,
) -> str:
    """Returns the model's answer: the most likely token at every step, or a sample.

    Of the model's generation config only the end-of-text tokens are used: the sampling, beams and
    penalties that it may ask for are not.

    Args:
        model, tokenizer: a causal language model of transformers.
        prompt: a text, or the turns of a conversation. A text becomes a user's turn if the
            tokenizer has a chat template, and is continued as it is otherwise.
        limit: maximum number of new tokens.
        sampling: how each token is chosen.

    Raises:
        ValueError: the prompt is empty, has tokens that the model does not know, or leaves no
            space in the model's context for `limit` new tokens; the chat template fails.
    """
    check_limit(limit)
    tokens = _encode(model, tokenizer, prompt, limit)
    (answer,) = _answers(model, tokenizer, [tokens], limit, Draws(sampling, [0]))
    return answer


def stream(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    write: Callable[[str], object],
    *,
    limit: int = 128,
    sampling: Sampling = GREEDY,
) -> str:
    """Returns what `generate` returns, and hands on its text while it is produced.

    Args:
        model, tokenizer, prompt, limit, sampling: see `generate`.
        write: called with each part of the text, which holds whole characters; together they are
            the answer. An error that it raises ends the generation, as Ctrl-C does: the model is
            as before.

    Raises:
        ValueError: as `generate`, before anything is written.
    """
    check_limit(limit)
    tokens = _encode(model, tokenizer, prompt, limit)
    draws = Draws(sampling, [0])
    (answer,) = _answers(model, tokenizer, [tokens], limit, draws, write)
    return answer


def generate_batch(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    limit: int = 128,
    batch_size: int = 8,
    sampling: Sampling = GREEDY,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """Returns the model's answer to each prompt, several of them computed at once.

    The i-th answer (from 0) is that of `generate` with the seed `sampling.seed + i`, whatever the
    batch size; but sums are rounded differently in a batch, so that in 16 bits two tokens that are
    almost equally likely may change places.

    Args:
        model, tokenizer, limit, sampling: see `generate`.
        prompts: texts, or turns of conversations.
        batch_size: number of prompts at a time. Prompts of similar lengths go together.
        progress: called after each batch with the number of its prompts.

    Raises:
        ValueError: as `generate`, before any answer is computed; the message says which prompt.
    """
    check_limit(limit)
    check_batch_size(batch_size)
    if isinstance(prompts, str):
        raise TypeError("prompts is one text: give a list of prompts, or call generate")

    tokens = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            tokens.append(_encode(model, tokenizer, prompt, limit))
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error

    answers = [""] * len(tokens)
    by_length = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    for start in range(0, len(tokens), batch_size):
        batch = by_length[start : start + batch_size]
        draws = Draws(sampling, batch)
        found = _answers(model, tokenizer, [tokens[i] for i in batch], limit, draws)
        for i, answer in zip(batch, found, strict=True):
            answers[i] = answer
        if progress:
            progress(len(batch))
    return answers


@torch.no_grad()
def _answers(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    limit: int,
    draws: Draws,
    write: Callable[[str], object] | None = None,
) -> list[str]:
    """The answers to the prompts of one batch, which are padded on the left.

    Args:
        write: what the text of a single answer is handed on to while it is produced.
    """
    pad, ends = pad_id(tokenizer), _end_tokens(model)
    decode = partial(_decode, tokenizer, ends)
    longest = max(map(len, prompts))
    rows = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]

    device = next(model.parameters()).device
    inputs = {
        "input_ids": torch.tensor(rows, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
    options = {
        "max_new_tokens": limit,
        "logits_processor": [draws],
        "streamer": TextStream(decode, write) if write else None,
    }
    with _logits_decide(model, pad, ends), _contiguous_input_of_the_head(model), frozen_adapters():
        tokens = model.generate(**inputs, **options)
    return [decode(row[longest:]) for row in tokens.tolist()]


def _decode(tokenizer: Any, ends: list[int], tokens: list[int]) -> str:
    """The text of an answer's tokens, without its end and what follows: the padding of a batch."""
    length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    text = tokenizer.decode(
        tokens[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text).strip()


def _end_tokens(model: Any) -> list[int]:
    """The tokens that end an answer, of the model's generation config."""
    named = model.generation_config.eos_token_id
    ends = [token for token in (named if isinstance(named, list) else [named]) if token is not None]
    for token in ends:
        if type(token) is not int or not 0 <= token < 2**31:
            raise ValueError(
                "the model's generation_config.json: "
                f"eos_token_id={one_line(named, 80)} is not a valid token id"
            )
    return ends


@contextmanager
def _logits_decide(model: Any, pad: int, ends: list[int]) -> Iterator[None]:
    """Inside the block the model is in eval mode, and generates the argmax of each step's logits.

    `Draws` makes this a sample by adding noise to them. The model's own generation config is not
    used.
    """
    from transformers import GenerationConfig

    theirs, was_training = model.generation_config, model.training
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ends or None, pad_token_id=pad
    )
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        model.generation_config = theirs


@contextmanager
def _contiguous_input_of_the_head(model: Any) -> Iterator[None]:
    """Inside the block the output head multiplies all prompts of a batch with one weight.

    transformers gives it the last positions as a view, hidden[:, -1:]. For a view and a frozen
    weight torch.matmul expands the weight per prompt: 0.9 s and 300 MB for a vocabulary of 49,152,
    instead of 10 ms.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def check_limit(limit: int) -> None:
    """Raises ValueError unless it is a number of new tokens."""
    if limit < 1:
        raise ValueError(f"max_new_tokens={limit}: must be at least 1")


def check_batch_size(batch_size: int) -> None:
    """Raises ValueError unless it is a number of prompts."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")


def _encode(model: Any, tokenizer: Any, prompt: Prompt, limit: int) -> list[int]:
    """The tokens of a prompt that can be answered."""
    _check_characters(prompt)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        encoded = apply_template(tokenizer, turns, add_generation_prompt=True, return_dict=True)
    elif isinstance(prompt, str):
        encoded = tokenizer(prompt)
    else:
        raise ValueError(
            "the tokenizer has no chat template, so that a conversation cannot be written as a "
            "text: give the prompt as one text"
        )
    tokens = list(encoded["input_ids"])
    _check_prompt(model, tokens, limit)
    return tokens


def _check_characters(prompt: Prompt) -> None:
    turns = [{"content": prompt}] if isinstance(prompt, str) else prompt
    for turn in turns:
        try:
            str(turn.get("content")).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the prompt contains an unpaired surrogate at position {error.start}: it is not "
                "UTF-8 text"
            ) from error


def _check_prompt(model: Any, tokens: list[int], limit: int) -> None:
    if not tokens:
        raise ValueError("the prompt is empty")

    known = model.get_input_embeddings().weight.shape[0]
    if max(tokens) >= known:
        raise ValueError(
            f"the tokenizer gives token {max(tokens)}, and the model's vocabulary has {known} "
            "tokens: they do not belong together"
        )
    context = context_length(model.config)
    if context is not None and len(tokens) + limit > context:
        raise ContextExceededError(len(tokens), limit, context)


def apply_template(tokenizer: Any, turns: list[dict[str, str]], **options: Any) -> Any:
    """Returns what a tokenizer's chat template makes of a conversation.

    Raises:
        ValueError: the template fails. It is a program, which transformers runs in a sandbox, and
            it can fail in any way.
    """
    try:
        return tokenizer.apply_chat_template(turns, **options)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"the tokenizer's chat template fails for this conversation: {one_line(reason)}"
        ) from error
