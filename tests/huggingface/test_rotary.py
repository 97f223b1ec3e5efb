"""Rotary embeddings in `efficient_training`: whose are replaced, with the same bits."""

import copy
import random
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the models are transformers'")

import torch
from architectures import ARCHITECTURES, tiny_model
from helpers import gaussian, same_bits
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from minilora.huggingface import rotary
from minilora.huggingface.efficient import efficient_training
from minilora.huggingface.rotary import EfficientRotary

NAME = "apply_rotary_pos_emb"

DECODERS = [n for n, a in ARCHITECTURES.items() if a.kind == "decoder"]
SAMPLE = ["LlamaForCausalLM", "GPTNeoXForCausalLM", "GlmForCausalLM"]
SAMPLE += sorted(random.Random(7).sample([n for n in DECODERS if n not in SAMPLE], 3))

# Those with the order of elements of GPT-NeoX, in the files of transformers.
REPLACED = {"LlamaForCausalLM": True, "GPTNeoXForCausalLM": True, "GlmForCausalLM": False}


def results(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    """The output, and the gradients of the weights that have one."""
    out = call(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(out.float().square().mean(), weights, allow_unused=True)
    return [out.detach(), *(g for g in found if g is not None)]


def check(name: str, dtype: torch.dtype) -> bool:
    """The bits with rotary embeddings replaced, and nothing else; returns whether they were."""
    model, call = tiny_model(name)
    model = model.to(dtype)
    expected = results(model, call)
    files = rotary.replace(model, dtype)
    try:
        assert all(isinstance(getattr(file, NAME), EfficientRotary) for file in files)
        found = results(model, call)
    finally:
        rotary.restore(files)
    assert not any(isinstance(getattr(file, NAME), EfficientRotary) for file in files)
    # Autograd adds zeros to a gradient, which makes a -0 a 0.
    assert all(map(torch.equal, found, expected))
    return bool(files)


@pytest.mark.parametrize("dtype", rotary.DTYPES, ids=str)
@pytest.mark.parametrize("name", SAMPLE)
def test_the_bits_of_a_model(name: str, dtype: torch.dtype) -> None:
    found = check(name, dtype)
    assert found == REPLACED.get(name, found)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", rotary.DTYPES, ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_the_bits_of_every_decoder(name: str, dtype: torch.dtype) -> None:
    check(name, dtype)


@pytest.fixture
def llama() -> Any:
    """A model, in whose file nothing is replaced before and after."""
    plain = modeling_llama.apply_rotary_pos_emb
    yield tiny_model("LlamaForCausalLM")[0]
    assert modeling_llama.apply_rotary_pos_emb is plain


def inputs(**options: Any) -> list[Tensor]:
    """q, k, cos and sin."""
    shapes = (2, 4, 6, 8), (2, 2, 6, 8), (1, 6, 8), (1, 6, 8)
    return [gaussian(*shape, seed=i, **options) for i, shape in enumerate(shapes)]


def test_every_other_call_goes_to_the_function_of_the_file(llama: nn.Module) -> None:
    q, k, cos, sin = inputs()
    calls: list[tuple[Any, ...]] = []

    def plain(*args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        return "plain"

    function = EfficientRotary(plain, torch.float32)
    # A slice of a head, another layout, cos and sin by name, and dtypes that are not all the same.
    by_name = {"cos": cos, "sin": sin}
    layout = [t.transpose(1, 2) for t in (q, k)]
    trained = cos.clone().requires_grad_()
    for args, kwargs in [
        ((q, k, cos[..., :4], sin[..., :4]), {}),
        ((*layout, cos, sin), {"unsqueeze_dim": 2}),
        ((*layout, cos, sin), {}),
        ((q, k), by_name),
        ((q, k, cos, sin, 1), {}),
        ((q, k[:1], cos, sin), {}),
        ((q, k, cos.double(), sin.double()), {}),
        (inputs(dtype=torch.bfloat16), {}),
        ((q, k, trained, sin), {}),
        ((q, None, cos, sin), {}),
    ]:
        assert function(*args, **kwargs) == "plain"
        assert len(calls[-1][0]) == len(args) and calls[-1][1] == kwargs
    with torch.autocast("cpu", torch.bfloat16):
        assert function(q, k, cos, sin) == "plain"
    assert len(calls) == 11
    expected = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    assert same_bits(function(q, k, cos, sin), expected) and len(calls) == 11


@pytest.mark.parametrize(
    "other",
    [
        lambda q, k, cos, sin: (q, k),
        lambda q, k, cos, sin: q,
        lambda q, cos, sin: q,
        lambda q, k, cos, sin: modeling_llama.apply_rotary_pos_emb(q, k, sin, cos),
        lambda q, k, cos, sin: modeling_llama.apply_rotary_pos_emb(*inputs(dtype=torch.float64)),
    ],
)
def test_a_function_with_other_results_stays(
    llama: nn.Module, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ModuleType("transformers.models.other")
    file.apply_rotary_pos_emb = other  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, file.__name__, file)
    monkeypatch.setattr(type(llama), "__module__", file.__name__)
    with efficient_training(llama):
        assert file.apply_rotary_pos_emb is other


def test_two_blocks_that_overlap_restore_the_function(llama: nn.Module) -> None:
    first, second = efficient_training(llama), efficient_training(copy.deepcopy(llama))
    assert first.__enter__().rotary
    assert not second.__enter__().rotary
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)


def test_another_function_that_was_put_there_meanwhile_stays(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*args: Any) -> None: ...

    with efficient_training(llama):
        # Afterwards the file has the function that it has here.
        monkeypatch.setattr(modeling_llama, NAME, other)
    assert modeling_llama.apply_rotary_pos_emb is other
    monkeypatch.undo()
    rotary.restore([modeling_llama])
