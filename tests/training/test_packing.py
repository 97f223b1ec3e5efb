"""Packed rows: every example has the logits, the loss and the gradients that it has alone."""

import math
import random
import signal
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from interrupted import in_step, run
from made_up import random_examples
from torch import Tensor, nn

import minilora
from minilora.huggingface.activation_checkpointing import gradient_checkpointing
from minilora.huggingface.efficient import efficient_training
from minilora.training import FinetuneConfig, Interrupted, finetune
from minilora.training.batches import forward_passes, make_batch, pick_examples
from minilora.training.data import IGNORE, Example
from minilora.training.loop import forward_backward, train
from minilora.training.packing import check_packing, collate_packed, pack, without_cache

LENGTHS = [3, 30, 5, 17, 9, 2, 12]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_every_sequence_is_in_one_row_and_no_row_is_too_long(lengths: list[int]) -> None:
    rows = pack(lengths, capacity=20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used) <= 20
    # No two rows fit into one: fewer than twice as many rows as tokens need.
    assert len(rows) == 1 or sum(used) > 10 * len(rows)
    assert pack(lengths, capacity=20) == rows


def test_a_packed_batch_restarts_positions_and_never_predicts_across_a_border() -> None:
    rows = [[Example([5, 6], [5, 6]), Example([7, 8, 9], [IGNORE, 8, 9])], [Example([4], [4])]]
    batch = collate_packed(rows, pad_id=1, multiple=4)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 1, 1], [4, 1, 1, 1, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 6]]
    hidden = [IGNORE] * 8
    assert batch["labels"].tolist() == [[IGNORE, 6, IGNORE, 8, 9, *hidden[:3]], hidden]
    assert "attention_mask" not in batch


def packed_and_alone(model: Any) -> tuple[Tensor, Tensor]:
    """The logits of some examples in one row, and each alone, [tokens, V]."""
    examples = random_examples([9, 4, 13, 1], vocabulary=90)
    batch = collate_packed([examples], 0, multiple=16)
    del batch["labels"]
    with torch.no_grad(), without_cache(model):
        row = model(**batch).logits[0, : 9 + 4 + 13 + 1]
        alone = [model(input_ids=torch.tensor([e.ids])).logits[0] for e in examples]
    return row, torch.cat(alone)


DECODERS = [n for n, a in ARCHITECTURES.items() if a.kind in ("decoder", "mixture of experts")]
RECURRENT = [n for n, a in ARCHITECTURES.items() if a.kind == "state space"]

# They make their masks without position_ids, or are no causal language model.
REFUSED = {
    "OPTForCausalLM",
    "BloomForCausalLM",
    "MptForCausalLM",
    "BioGptForCausalLM",
    "XGLMForCausalLM",
    "GptOssForCausalLM",
    "Qwen3NextForCausalLM",
    "SwitchTransformersForConditionalGeneration",
    *RECURRENT,
}
SAMPLE = {
    "LlamaForCausalLM",
    "Gemma3ForCausalLM",
    "GPT2LMHeadModel",
    "MixtralForCausalLM",
    "OPTForCausalLM",
    "BloomForCausalLM",
    "BioGptForCausalLM",
    "MambaForCausalLM",
    "Lfm2ForCausalLM",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SAMPLE else pytest.mark.soak)
        for name in (*DECODERS, *RECURRENT)
    ],
)
def test_an_architecture_computes_packed_examples_alone_or_is_refused(
    name: str, dtype: torch.dtype
) -> None:
    """The refusal decides on a few tokens; the logits of longer rows are the proof of both."""
    model = tiny_model(name)[0].to(dtype)
    if name in REFUSED:
        with pytest.raises(ValueError, match=rf"packing=True: {name} cannot take.*--no-packing"):
            check_packing(model)
        return
    check_packing(model)

    row, alone = packed_and_alone(model)
    # Rounding of two layers of sums of up to 40 products, measured below 5 units of the dtype.
    bound = 32 * torch.finfo(dtype).eps * alone.abs().max()
    assert (row - alone).abs().max() <= bound


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "MixtralForCausalLM"])
def test_an_efficient_model_computes_packed_examples_alone(name: str) -> None:
    """Its attention has blocks of its own, whose keys may be those of other examples."""
    model = tiny_model(name)[0]
    with efficient_training(model):
        check_packing(model)
        row, alone = packed_and_alone(model)
    # As for the plain model.
    assert (row - alone).abs().max() <= 32 * torch.finfo(torch.float32).eps * alone.abs().max()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM"])
def test_packed_logits_are_those_alone_in_float64(name: str) -> None:
    row, alone = packed_and_alone(tiny_model(name)[0].double())
    torch.testing.assert_close(row, alone, rtol=1e-12, atol=1e-12)


def leaking(model: Any) -> Any:
    """The model with a cache: transformers then takes a packed row for one sequence."""
    forward = model.forward
    model.forward = lambda **inputs: forward(**inputs | {"use_cache": True})
    return model


def shifted(model: Any) -> Any:
    """The model with positions that count on, and closed borders between the examples."""
    forward = model.forward

    def wrong(**inputs: Tensor) -> Any:
        positions = inputs["position_ids"] if "position_ids" in inputs else torch.zeros(1, 1)
        if (positions[:, 1:] == 0).any():
            sequence = (positions == 0).cumsum(-1)
            same = sequence[:, None, :, None] == sequence[:, None, None, :]
            inputs["attention_mask"] = same & torch.ones_like(same).tril()
            inputs["position_ids"] = torch.arange(positions.shape[1])[None]
        return forward(**inputs)

    model.forward = wrong
    return model


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("LlamaForCausalLM", leaking, "an example sees those before it"),
        ("GPT2LMHeadModel", shifted, "an example has other logits than alone"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_probe_finds_a_leak_and_wrong_positions(
    name: str, spoil: Callable[[Any], Any], reason: str, dtype: torch.dtype
) -> None:
    model = tiny_model(name)[0].to(dtype)
    check_packing(model)
    with pytest.raises(ValueError, match=reason):
        check_packing(spoil(model))


def test_the_probe_leaves_the_model_as_it_was(tiny_llama: Any) -> None:
    model = minilora.inject(minilora.quantize(tiny_llama()), r=2, dropout=0.5).train()
    model.model.layers[0].eval()
    model.config.use_cache = True
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    check_packing(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert model.config.use_cache
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_position_ids_is_refused() -> None:
    class Plain(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids

    with pytest.raises(ValueError, match=r"Plain cannot take packed sequences.*position_ids"):
        check_packing(Plain())


def adapted(model: nn.Module) -> nn.Module:
    """With adapters that are not zero."""
    minilora.inject(model, r=4)
    for p in minilora.adapter_parameters(model):
        p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    return model


def settings(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig("m", "d", "o", **({"max_length": 40, "batch_size": 3} | changes))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_step_has_the_loss_and_the_gradients_of_a_padded_one(
    tiny_llama: Any, checkpointing: bool
) -> None:
    """In float64, so that a difference is one of the mathematics."""
    found = []
    for packing in (False, True):
        model = adapted(tiny_llama()).double().train()
        config = settings(packing=packing, batch_size=2, grad_accum=4)
        picked = pick_examples(random_examples(LENGTHS), config, 0)
        with gradient_checkpointing(model) if checkpointing else nullcontext():
            loss = forward_backward(model, picked, config, 0, pad=0)
        found.append((loss, [p.grad for p in minilora.adapter_parameters(model)]))

    (padded, grads), (packed, packed_grads) = found
    assert math.isclose(padded, packed, rel_tol=1e-6)
    for a, b in zip(grads, packed_grads, strict=True):
        assert a is not None and b is not None
        # The loss's float32 rounding, 2^-24, of each token.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * a.abs().max().item())


def test_packing_needs_fewer_forward_passes_and_keeps_the_steps(tiny_llama: Any) -> None:
    examples = random_examples(LENGTHS)
    steps = {}
    for packing in (False, True):
        config = settings(packing=packing, grad_accum=2, epochs=2.0, clip=1e9)
        steps[packing] = list(train(adapted(tiny_llama()), examples, config, pad=0))
        picked = pick_examples(examples, config, 0)
        passes = forward_passes(picked, config)
        assert len(passes) == (1 if packing else 2)
        seen = sorted(i for packed in passes for row in packed for i, _ in row)
        assert seen == sorted(i for i, _ in picked)
        rows = [make_batch(packed, config, 0)["input_ids"].shape for packed in passes]
        assert all(shape[0] <= 3 and shape[1] <= 48 for shape in rows)

    for padded, packed in zip(steps[False], steps[True], strict=True):
        assert (padded.learned, padded.tokens) == (packed.learned, packed.tokens)
        # Sums of float32 in another order, through three updates of the adapters.
        assert math.isclose(padded.loss, packed.loss, rel_tol=1e-5)
        assert math.isclose(padded.grad_norm, packed.grad_norm, rel_tol=1e-3)


def test_the_loop_refuses_a_model_that_cannot_be_packed_before_the_first_step() -> None:
    model = minilora.inject(tiny_model("MambaForCausalLM")[0], r=2)
    with pytest.raises(ValueError, match="MambaForCausalLM cannot take packed sequences"):
        next(train(model, random_examples([5, 6], 90), settings(packing=True), pad=0))


def test_a_run_with_packing_learns_and_is_the_same_each_time(
    configure: Callable[..., FinetuneConfig], tmp_path: Any
) -> None:
    def trained(name: str, **changes: Any) -> Any:
        options = {"steps": 8, "batch_size": 2, "grad_accum": 4, "r": 4} | changes
        return finetune(configure(out=str(tmp_path / name), **options))

    packed, again = trained("a", packing=True), trained("b", packing=True)
    assert packed.eval_after < packed.eval_before
    assert [s.loss for s in packed.history] == [s.loss for s in again.history]
    padded = trained("c")
    # bfloat16 or float32, as the processor has: the first step's difference is rounding alone.
    assert math.isclose(padded.history[0].loss, packed.history[0].loss, rel_tol=1e-2)


def test_an_interrupted_run_with_packing_is_resumed_bit_for_bit(
    configure: Callable[..., FinetuneConfig], tmp_path: Any
) -> None:
    """With batches by length too, whose epochs of 16 examples end within steps of 6."""

    def config(name: str, **changes: Any) -> FinetuneConfig:
        options = {"steps": 4, "batch_size": 3, "grad_accum": 2, "r": 2, "samples": 0}
        chosen = {"packing": True, "group_by_length": True, "dropout": 0.1}
        return configure(out=str(tmp_path / name), **options | chosen | changes)

    random.seed(0)
    np.random.seed(0)
    whole = run(config("whole"))
    random.seed(0)
    np.random.seed(0)
    stop = partial(signal.raise_signal, signal.SIGTERM)
    with in_step(3, stop, accum=1), pytest.raises(Interrupted):
        finetune(config("stopped"))
    assert run(config("stopped", resume=True)).agrees(whole)
