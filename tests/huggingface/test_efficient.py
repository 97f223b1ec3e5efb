"""`efficient_training`: the same result from fewer bytes, and everything undone on exit.

What is replaced is found by its structure and by comparison.
"""

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the models are transformers'")

import torch
import transformers
from architectures import ARCHITECTURES, VOCABULARY, tiny_model
from helpers import same_bits
from live_memory import kept_bytes
from torch import Tensor, nn

import minilora
from minilora.huggingface import attention
from minilora.huggingface.activation_checkpointing import gradient_checkpointing
from minilora.huggingface.attention import is_supported
from minilora.huggingface.efficient import Replaced, efficient_training
from minilora.huggingface.efficient_modules import EfficientModule

# Those that run in float64: not the mixtures of experts, and not XGLM, whose mask overflows.
DECODERS = [n for n, a in ARCHITECTURES.items() if a.kind == "decoder" and "XGLM" not in n]
SAMPLE = ["LlamaForCausalLM", "GemmaForCausalLM", "Qwen3ForCausalLM", "Olmo2ForCausalLM"]
SAMPLE += sorted(random.Random(5).sample([n for n in DECODERS if n not in SAMPLE], 4))

DTYPES = [torch.float32, torch.bfloat16]


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A Llama of two layers with grouped-query attention, adapters, and lengths above 16."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(dtype).train()
    minilora.inject(model, r=2, seed=1)
    for layer in minilora.adapter_parameters(model):
        layer.data += 0.01
    return model


def batch(length: int = 40, padding: int = 0) -> dict[str, Tensor]:
    ids = torch.arange(2 * length).reshape(2, length) * 7 % (VOCABULARY - 8) + 4
    real = torch.ones_like(ids)
    real[1, length - padding :] = 0
    return {"input_ids": ids, "attention_mask": real, "labels": ids.where(real.bool(), -100)}


def step(model: Any, given: dict[str, Tensor]) -> list[Tensor]:
    """The loss and the gradients of the adapters."""
    loss = model(**given).loss
    return [loss.detach(), *torch.autograd.grad(loss, minilora.adapter_parameters(model))]


def classes(model: nn.Module) -> list[Any]:
    return [(name, type(module), id(module)) for name, module in model.named_modules()]


def logits(model: Any, padding: int = 0) -> Tensor:
    given = batch(padding=padding)
    del given["labels"]
    with torch.no_grad():
        found: Tensor = model(**given).logits[given["attention_mask"].bool()]
    return found


def check_architecture(name: str, dtype: torch.dtype) -> None:
    """Exact in float64: the logits in the block are no further from it than the plain ones."""
    model = tiny_model(name)[0].to(dtype)
    exact = logits(copy.deepcopy(model).double(), 7)
    before, config = classes(model), copy.deepcopy(model.config)

    plain = logits(model, 7)
    with efficient_training(model):
        found = logits(model, 7)

    assert classes(model) == before and model.config == config
    error, allowed = ((t.double() - exact).norm() for t in (found, plain))
    # A few roundings in another order are no difference: see test_attention.py.
    assert error <= 1.25 * allowed + 16 * 2**-24 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SAMPLE)
def test_logits_are_as_exact(name: str, dtype: torch.dtype) -> None:
    check_architecture(name, dtype)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_as_exact_for_every_decoder(name: str, dtype: torch.dtype) -> None:
    check_architecture(name, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [0, 9])
def test_gradients_are_as_exact(padding: int, dtype: torch.dtype) -> None:
    model = llama(dtype)
    given = batch(padding=padding)
    exact = step(copy.deepcopy(model).double(), given)
    plain = step(model, given)
    with efficient_training(model) as replaced:
        found = step(model, given)
    assert replaced == Replaced(is_supported(dtype), True, 5, 2)

    def error(of: list[Tensor]) -> float:
        parts = [(t.double() - e).square().sum() for t, e in zip(of[1:], exact[1:], strict=True)]
        return sum(parts).sqrt().item()  # type: ignore[union-attr]

    size = sum(e.square().sum() for e in exact[1:]).sqrt().item()  # type: ignore[union-attr]
    assert error(found) <= 1.1 * error(plain) + 16 * 2**-24 * size
    torch.testing.assert_close(
        found[0], plain[0], rtol=0, atol=5e-7 if dtype is DTYPES[0] else 2e-2
    )


def test_less_is_kept_for_the_backward() -> None:
    """Byte for byte in bfloat16."""
    model = llama(torch.bfloat16)
    given = batch(64)
    plain = kept_bytes(lambda: model(**given), model)
    with efficient_training(model):
        found = kept_bytes(lambda: model(**given), model)

    tokens, hidden, width = 128, 48, 72
    # x in bfloat16 in place of float32. The first of five norms is behind the frozen embedding.
    norms = 4 * 2 * hidden
    # In each of two layers act(g).
    assert plain - found == tokens * (norms + 2 * 2 * width)


def test_a_norm_that_is_trained_computes_as_before() -> None:
    model = llama()
    weight = model.model.norm.weight.requires_grad_()
    loss = model(**batch()).loss
    (expected,) = torch.autograd.grad(loss, weight)
    with efficient_training(model):
        (found,) = torch.autograd.grad(model(**batch()).loss, weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.any()


def test_an_error_inside_the_block_restores_everything() -> None:
    model = llama()
    before = classes(model)
    with pytest.raises(RuntimeError, match="in the step"), efficient_training(model):
        assert classes(model) != before
        assert model.config._attn_implementation == attention.NAME
        raise RuntimeError("in the step")
    assert classes(model) == before and model.config._attn_implementation == "sdpa"


def test_an_inner_block_changes_and_restores_nothing() -> None:
    model = llama()
    with efficient_training(model):
        inside = classes(model)
        with efficient_training(model) as again:
            assert str(again) == "nothing"
        assert classes(model) == inside
        assert model.config._attn_implementation == attention.NAME


def test_a_model_with_eager_attention_keeps_it() -> None:
    model = llama(attn_implementation="eager")
    with efficient_training(model) as replaced:
        assert not replaced.attention and model.config._attn_implementation == "eager"


def test_an_attention_with_other_results_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe finds it: here one without a mask, that sees the future."""

    def sees_everything(*args: Any, **options: Any) -> tuple[Tensor, None]:
        return attention.attention_forward(*args, **{**options, "is_causal": False})

    monkeypatch.setattr(attention, "NAME", "minilora_wrong")
    monkeypatch.setattr(attention, "register", lambda: _register("minilora_wrong", sees_everything))
    model = llama()
    with efficient_training(model) as replaced:
        assert not replaced.attention and model.config._attn_implementation == "sdpa"


def _register(name: str, function: Callable[..., Any]) -> str:
    transformers.AttentionInterface.register(name, function)
    transformers.AttentionMaskInterface.register(name, lambda *args, **options: None)
    return name


def test_the_probe_draws_nothing_and_runs_no_hook_of_a_norm() -> None:
    model = llama()
    calls: list[nn.Module] = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, *_: calls.append(module))
    state = torch.get_rng_state()
    with efficient_training(model):
        # Twice: the attention is compared on the whole model.
        assert len(calls) == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_copies_and_pickles_have_the_plain_classes() -> None:
    model = llama()
    before = [(name, kind) for name, kind, _ in classes(model)]
    with efficient_training(model):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.model.norm))):
            assert not any(isinstance(module, EfficientModule) for module in other.modules())
        copied = copy.deepcopy(model)
        assert list(copied.state_dict()) == list(model.state_dict())
    assert [(name, kind) for name, kind, _ in classes(copied)] == before


def test_checkpointing_recomputes_the_same_bits() -> None:
    model, given = llama(torch.bfloat16), batch(padding=5)
    with efficient_training(model):
        expected = step(model, given)
        with gradient_checkpointing(model):
            found = step(model, given)
    assert all(map(same_bits, found, expected))


def test_dropout_of_the_adapters_draws_the_same() -> None:
    model, given = llama(), batch()
    minilora.eject(model)
    minilora.inject(model, r=2, dropout=0.5, seed=1)
    found = []
    for block in (efficient_training, gradient_checkpointing):
        torch.manual_seed(0)
        with block(model):
            found.append(step(model, given))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_it_generates_the_same_tokens() -> None:
    model = llama().eval()
    given = {"input_ids": batch(20)["input_ids"], "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**given)
    with efficient_training(model):
        assert torch.equal(model.generate(**given), expected)


def test_an_adapter_and_a_model_are_saved_as_outside(tmp_path: Path) -> None:
    model = llama()
    with efficient_training(model):
        minilora.save_adapter(model, tmp_path / "inside")
        config = model.config.to_json_string()
    minilora.save_adapter(model, tmp_path / "outside")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "inside" / name).read_bytes() == (
            tmp_path / "outside" / name
        ).read_bytes()
    assert config == model.config.to_json_string() and attention.NAME not in config


def test_compile_traces_the_plain_model() -> None:
    model, given = llama(), batch()
    with efficient_training(model):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        found = step(compiled, given)
    expected = step(model, given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_under_autocast_it_computes_as_before() -> None:
    model, given = llama(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model, given)
        with efficient_training(model):
            found = step(model, given)
    assert all(map(same_bits, found[:1], expected[:1]))


def test_quantized_layers() -> None:
    model = llama(torch.bfloat16)
    minilora.eject(model)
    minilora.quantize(model)
    minilora.inject(model, r=2)
    exact = step(model, batch())
    with efficient_training(model) as replaced:
        found = step(model, batch())
    assert replaced == Replaced(is_supported(torch.float32), True, 5, 2)
    assert (found[0] - exact[0]).abs() < 2e-2
