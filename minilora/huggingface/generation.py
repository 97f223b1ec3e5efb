"""Greedy generation, for trying out a model and for measuring it."""

from typing import Any

import torch
from torch import nn


def pad_id(tokenizer: Any) -> int:
    """Returns the id to pad with: the padding token, or the end-of-text token if there is none.

    Padded positions are masked, so the choice does not affect the result.
    """
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return int(tokenizer.eos_token_id)


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer: Any, prompt: str | list[dict[str, str]], *, limit: int = 128
) -> str:
    """Returns the model's greedy answer.

    Args:
        model, tokenizer: a causal language model of transformers.
        prompt: a text, or the turns of a conversation. A text becomes a user's turn if the
            tokenizer has a chat template, and is continued as it is otherwise.
        limit: maximum number of new tokens.
    """
    inputs = _encode(tokenizer, prompt).to(next(model.parameters()).device)
    prompt_length = inputs["input_ids"].shape[1]

    was_training = model.training
    model.eval()
    tokens = model.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=pad_id(tokenizer),
    )
    model.train(was_training)

    answer = tokenizer.decode(tokens[0, prompt_length:], skip_special_tokens=True)
    return str(answer).strip()


def _encode(tokenizer: Any, prompt: str | list[dict[str, str]]) -> Any:
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")

    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(
        turns,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
