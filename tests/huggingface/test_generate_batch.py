"""A batch of prompts: the answers are those of the prompts one by one, whatever the batches are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from minilora.huggingface import Sampling, generate, generate_batch, load_dense

PROMPTS = ["say yes", "x", "a much longer prompt than the others are", "say no", "", "say yes"]


@pytest.fixture(scope="module")
def llama(folder: Path) -> tuple[Any, Any]:
    return load_dense(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def gpt2(llama: tuple[Any, Any]) -> tuple[Any, Any]:
    """Learned positions, which left padding would move, and no chat template."""
    import copy

    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=258, n_positions=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
        bos_token_id=257, eos_token_id=256,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
    tokenizer = copy.deepcopy(llama[1])
    tokenizer.chat_template = None
    return model, tokenizer


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 0.9, seed=3)])
def test_the_answers_are_those_of_the_prompts_one_by_one(
    kind: str, batch_size: int, sampling: Sampling, request: pytest.FixtureRequest
) -> None:
    model, tokenizer = request.getfixturevalue(kind)
    prompts = [p for p in PROMPTS if p or kind == "llama"]
    side, state = tokenizer.padding_side, torch.get_rng_state()
    expected = [
        generate(
            model,
            tokenizer,
            prompt,
            limit=12,
            sampling=Sampling(sampling.temperature, sampling.top_p, sampling.seed + number),
        )
        for number, prompt in enumerate(prompts)
    ]
    assert len(set(expected)) >= len(set(prompts)) - 1, "the prompts must tell the answers apart"
    found = generate_batch(
        model, tokenizer, prompts, limit=12, batch_size=batch_size, sampling=sampling
    )
    assert found == expected
    assert tokenizer.padding_side == side and torch.equal(torch.get_rng_state(), state)


def test_an_answer_that_ends_early_is_not_padded(llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    # The first token of one answer ends it; the padding after it would be a letter.
    first = generate(model, tokenizer, "say yes", limit=1)
    ends = tokenizer(first)["input_ids"][0]
    theirs, pad = model.generation_config.eos_token_id, tokenizer.pad_token
    model.generation_config.eos_token_id = ends
    tokenizer.pad_token = "A"
    try:
        found = generate_batch(model, tokenizer, ["x", "say yes"], limit=6)
        expected = [generate(model, tokenizer, prompt, limit=6) for prompt in ("x", "say yes")]
    finally:
        model.generation_config.eos_token_id = theirs
        tokenizer.pad_token = pad
    assert found == expected and found[1] == "" and found[0]


def test_the_head_sees_contiguous_values_and_no_hook_stays(
    llama: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = llama
    head = model.get_output_embeddings()
    forward, hooks = head.forward, dict(head._forward_pre_hooks)
    seen: list[bool] = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.is_contiguous())
        return forward(x)  # type: ignore[no-any-return]

    monkeypatch.setattr(head, "forward", watched)
    generate_batch(model, tokenizer, ["say yes", "x"], limit=3)
    assert seen and all(seen)
    assert head._forward_pre_hooks == hooks


def test_turns_and_texts_may_be_mixed_and_no_prompts_have_no_answers(
    llama: tuple[Any, Any],
) -> None:
    model, tokenizer = llama
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say yes"}]
    found = generate_batch(model, tokenizer, [turns, "say yes"], limit=5)
    assert found == [generate(model, tokenizer, prompt, limit=5) for prompt in (turns, "say yes")]
    assert generate_batch(model, tokenizer, []) == []


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        (["x", "y", ""], {}, "prompt 3: the prompt is empty"),
        (["x", "y" * 120], {}, "prompt 2: the prompt has 120 tokens.* context of 128"),
        (["x", [{"role": "user", "content": "x"}]], {}, "prompt 2: the tokenizer has no chat"),
        (["x"], {"batch_size": 0}, "batch_size=0"),
        (["x"], {"limit": 0}, "max_new_tokens=0"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_named_before_any_is(
    prompts: Any, options: Any, said: str, gpt2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = gpt2
    monkeypatch.setattr(model, "generate", None)
    with pytest.raises(ValueError, match=said):
        generate_batch(model, tokenizer, prompts, **{"limit": 20, **options})


def test_one_text_is_no_list_of_prompts(gpt2: Any) -> None:
    with pytest.raises(TypeError, match="prompts is one text"):
        generate_batch(*gpt2, "say yes")
