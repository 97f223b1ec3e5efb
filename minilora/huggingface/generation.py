"""Greedy generation, for trying out a model and for measuring it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minilora.huggingface.context import context_length
from minilora.huggingface.messages import one_line


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


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer: Any, prompt: str | list[dict[str, str]], *, limit: int = 128
) -> str:
    """Returns the model's greedy answer.

    Of the model's generation config only the end-of-text tokens are used: sampling, beams and
    penalties that it may ask for are not greedy.

    Args:
        model, tokenizer: a causal language model of transformers.
        prompt: a text, or the turns of a conversation. A text becomes a user's turn if the
            tokenizer has a chat template, and is continued as it is otherwise.
        limit: maximum number of new tokens.

    Raises:
        ValueError: the prompt is empty, has tokens that the model does not know, or leaves no
            space in the model's context for `limit` new tokens; the chat template fails.
    """
    if limit < 1:
        raise ValueError(f"max_new_tokens={limit}: must be at least 1")
    inputs = _encode(tokenizer, prompt)
    prompt_length = inputs["input_ids"].shape[1]
    _check_prompt(model, inputs["input_ids"], limit)

    inputs = inputs.to(next(model.parameters()).device)
    with _greedy(model, pad_id(tokenizer), limit) as options:
        tokens = model.generate(**inputs, **options)  # type: ignore[operator]
    answer = tokenizer.decode(tokens[0, prompt_length:], skip_special_tokens=True)
    return str(answer).strip()


@contextmanager
def _greedy(model: Any, pad: int, limit: int) -> Iterator[dict[str, int]]:
    """Inside the block the model is in eval mode and its generation config is a greedy one."""
    from transformers import GenerationConfig

    theirs, was_training = model.generation_config, model.training
    ends = theirs.eos_token_id
    for token in ends if isinstance(ends, list) else [ends]:
        if token is not None and (type(token) is not int or not 0 <= token < 2**31):
            raise ValueError(
                f"the model's generation_config.json: eos_token_id={one_line(ends, 80)} is no token"
            )
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=pad,
    )
    model.eval()
    try:
        yield {"max_new_tokens": limit}
    finally:
        model.train(was_training)
        model.generation_config = theirs


def _check_prompt(model: Any, ids: Tensor, limit: int) -> None:
    length = ids.shape[1]
    if not length:
        raise ValueError("the prompt is empty: the model has nothing to answer to")

    known = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= known:
        raise ValueError(
            f"the tokenizer gives token {int(ids.max())} and the model knows {known}: "
            "they do not belong together"
        )
    context = context_length(model.config)
    if context is not None and length + limit > context:
        raise ValueError(
            f"the prompt has {length} tokens, and with max_new_tokens={limit} it exceeds the "
            f"model's context of {context}: shorten the prompt, or give a lower max_new_tokens"
        )


def _encode(tokenizer: Any, prompt: str | list[dict[str, str]]) -> Any:
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")

    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return apply_template(tokenizer, turns, **options)


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
