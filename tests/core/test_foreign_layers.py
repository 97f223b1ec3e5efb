"""A model into which another library has put its layers: refused by name, with the way out."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import minilora


def with_peft(tiny_llama: Callable[..., Any]) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    return peft.get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize("call", [minilora.quantize, minilora.inject])
@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.base_model.model], ids=["whole", "base"])
def test_a_model_with_adapters_of_peft(
    tiny_llama: Callable[..., Any], call: Any, part: Callable[[Any], Any]
) -> None:
    model = with_peft(tiny_llama)
    keys = list(model.state_dict())
    with pytest.raises(TypeError, match=r"is of peft: call merge_and_unload\(\)"):
        call(part(model))
    assert list(model.state_dict()) == keys
    call(model.merge_and_unload())


@pytest.mark.parametrize("call", [minilora.quantize, minilora.inject])
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_layers_of_bitsandbytes(call: Any, kind: str) -> None:
    layers = pytest.importorskip("bitsandbytes").nn
    model = nn.Sequential(nn.Linear(64, 64), getattr(layers, kind)(64, 64))
    with pytest.raises(TypeError, match=rf"^1 \({kind}\) is of bitsandbytes: .*minilora\.load"):
        call(model)
    # They may stay what they are.
    call(model, exclude=["1"])
    assert type(model[1]) is getattr(layers, kind)
