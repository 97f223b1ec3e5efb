"""Gradient checkpointing: the same bits for fewer bytes. And adapters that no gradient reaches stop a run with their names."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import minilora
from minilora.huggingface.loading import gradient_checkpointing
from minilora.training import loop as recipe
from minilora.training.data import IGNORE, Example, collate
from minilora.training.loop import FinetuneConfig, finetune, token_losses, train


def examples(count: int = 8, length: int = 40) -> list[Example]:
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 128, (length - i,), generator=g).tolist() for i in range(count)]
    return [
        Example(i, [IGNORE] * 10 + i[10:], where=f"my.jsonl:{n}")
        for n, i in enumerate(ids, start=1)
    ]


def adapted(model: Any, *, quantize: bool = True, dropout: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(0)
    model = minilora.inject(
        minilora.quantize(model) if quantize else model, r=4, dropout=dropout, **options
    ).train()
    for p in minilora.adapter_parameters(model):  # B too: at zero it would hide A's gradient
        nn.init.normal_(p, std=0.1)
    return model


CONFIG = FinetuneConfig("", "", "", steps=3, batch_size=2, grad_accum=2, lr=1e-2)


# ---- the same bits


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_gradients_and_random_state_are_the_same_to_the_bit(
    quantize: bool, dropout: float, dtype: torch.dtype, tiny_llama: Any
) -> None:
    found = []
    for block in (nullcontext, gradient_checkpointing):
        model = adapted(tiny_llama().to(dtype), quantize=quantize, dropout=dropout)
        with block() if block is nullcontext else block(model):
            loss = token_losses(model, collate(examples(), 0))
            loss.backward()
            gradients = [p.grad.clone() for p in minilora.adapter_parameters(model)]
            after_one = torch.get_rng_state()
            model.zero_grad()
            steps = list(train(model, examples(), CONFIG, pad=0))
        found.append(
            (
                loss.detach(),
                *gradients,
                after_one,
                torch.tensor([(s.loss, s.grad_norm) for s in steps]),
            )
        )
        found[-1] += (*minilora.adapter_parameters(model), torch.get_rng_state())
    assert all(map(torch.equal, *found))
    assert all(bool(g.any()) for g in found[0][1 : 1 + len(gradients)])  # the first layer's too


def test_fewer_bytes_wait_for_the_backward(tiny_llama: Any) -> None:
    def bytes_saved(model: Any) -> int:
        storages: dict[int, int] = {}
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            loss = token_losses(model, collate(examples(), 0))
        assert (
            loss.requires_grad
        )  # all that was saved is alive until here: no address is counted for two
        return sum(storages.values())

    model = adapted(tiny_llama())
    everything = bytes_saved(model)
    with gradient_checkpointing(model):
        inputs_alone = bytes_saved(model)
    hidden = 8 * 40 * 64 * 4  # batch, length, width, float32: a block's input
    assert inputs_alone >= 2 * hidden  # the hooks did see what is kept
    assert inputs_alone < everything / 3


def test_the_model_is_as_it_was_afterwards_and_nothing_is_cast(tiny_llama: Any) -> None:
    model = adapted(tiny_llama().to(torch.bfloat16))

    def look() -> tuple[Any, ...]:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        return (
            [(n, p.dtype, p.requires_grad) for n, p in model.named_parameters()],
            hooks,
            model.config.use_cache,
        )

    before = look()
    with gradient_checkpointing(model):
        inside = look()
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert (
        inside[:2] == before[:2]
    )  # no hook that makes the embeddings need a gradient: torch.compile cannot trace it
    assert look() == before and not any(
        getattr(m, "gradient_checkpointing", False) for m in model.modules()
    )


def test_a_model_that_has_none_is_refused_by_name() -> None:
    with (
        pytest.raises(ValueError, match="Sequential has no gradient checkpointing: leave it out"),
        gradient_checkpointing(nn.Sequential(nn.Linear(4, 4))),
    ):
        pass


@pytest.mark.parametrize(
    ("quantize", "asked", "used"),
    [(True, None, 1), (False, None, 0), (True, False, 0), (False, True, 1), (True, True, 1)],
)
def test_finetune_uses_it_where_the_base_is_quantized_or_as_it_is_told(
    quantize: bool,
    asked: bool | None,
    used: int,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(
        "\n".join(
            json.dumps({"text": f"say {word} and {word} again"})
            for word in ("yes", "no", "perhaps")
        )
    )
    entered = []

    @contextmanager
    def spy(model: Any) -> Iterator[None]:
        entered.append(model)
        with gradient_checkpointing(model):
            yield

    monkeypatch.setattr(recipe, "gradient_checkpointing", spy)
    out = str(tmp_path / "out")
    settings: dict[str, Any] = {
        "steps": 1,
        "batch_size": 2,
        "max_length": 40,
        "eval_fraction": 0.0,
        "quantize": quantize,
    }
    finetune(FinetuneConfig(str(folder), str(data), out, **settings, checkpointing=asked))
    assert len(entered) == used


# ---- adapters that no gradient reaches


def stopped(model: Any) -> str:
    before = [p.clone() for p in minilora.adapter_parameters(model)]
    with pytest.raises(ValueError, match="adapters got no gradient in the first step") as caught:
        next(train(model, examples(), CONFIG, pad=0))
    assert all(map(torch.equal, before, minilora.adapter_parameters(model)))
    return str(caught.value)


def test_at_the_start_the_zero_gradient_of_a_is_no_reason_to_stop(tiny_llama: Any) -> None:
    model = minilora.inject(tiny_llama(), r=4)
    assert next(train(model, examples(), CONFIG, pad=0)).step == 1


def test_a_frozen_path_is_named(tiny_llama: Any) -> None:
    model = minilora.inject(tiny_llama(), r=4, targets=["q_proj", "v_proj"])
    model.model.layers[1].self_attn.v_proj.register_forward_hook(
        lambda module, inputs, output: output.detach()
    )
    message = stopped(model)
    assert "(1 of them): model.layers.1.self_attn.v_proj. " in message and "detached" in message


def test_checkpointing_that_passes_no_gradient_is_named(tiny_llama: Any) -> None:
    model = minilora.inject(tiny_llama(), r=4, targets=["q_proj", "lm_head"])
    with gradient_checkpointing(model):
        for layer in model.model.layers:  # what transformers did by default for years
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)
        with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
            message = stopped(model)
    assert (
        "(2 of them): model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj. " in message
        and "reentrant" in message
    )


def test_a_loss_that_goes_round_the_head_is_named(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fused(model: Any, batch: dict[str, Tensor]) -> Tensor:
        hidden = model.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
        logits = hidden[:, :-1] @ model.lm_head.weight.T
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )

    monkeypatch.setattr(recipe, "token_losses", fused)
    message = stopped(minilora.inject(tiny_llama(), r=4, targets=["q_proj", "lm_head"]))
    assert "(1 of them): lm_head. " in message and "lm_head.weight" in message


def test_where_no_adapter_at_all_is_reached_the_first_names_are_given(tiny_llama: Any) -> None:
    model = minilora.inject(tiny_llama(), r=4)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.detach())
    message = stopped(model)
    assert (
        "(14 of them): model.layers.0.self_attn.q_proj, " in message and " and 6 more. " in message
    )
