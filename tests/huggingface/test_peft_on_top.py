"""peft on top of our 4-bit layers: refused by name, and trained with the mapping of the docs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapters_of

import minilora
from minilora import NF4Linear, QLoRALinear
from minilora.targets import linear_layers

peft = pytest.importorskip("peft", reason="PEFT is what is put on top")

Make = Callable[..., Any]
IDS = torch.arange(12).reshape(2, 6)
LAYERS = ["q_proj", "v_proj", "down_proj"]


def mapped(*layers: str) -> Any:
    """A config with the one-line mapping."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(layers))
    config._register_custom_module({NF4Linear: peft.tuners.lora.layer.Linear})
    return config


def on_top(model: Any, *layers: str) -> Any:
    with pytest.warns(UserWarning, match="Unsupported layer type .*NF4Linear"):
        return peft.get_peft_model(model, mapped(*layers))


@pytest.mark.parametrize("injected", [False, True])
def test_peft_refuses_our_layers_by_name(injected: bool, tiny_llama: Make) -> None:
    model = minilora.quantize(tiny_llama())
    if injected:
        minilora.inject(model, r=2)
    before = {name: type(module) for name, module in model.named_modules()}
    kind = (QLoRALinear if injected else NF4Linear).__name__
    with pytest.raises(ValueError, match=rf"(?s)Target module {kind}\(.*is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert {name: type(module) for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match="No `target_modules`"):
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))


def test_the_mapping_trains_as_inject_does(tiny_llama: Make, tmp_path: Path) -> None:
    base = minilora.quantize(tiny_llama())
    expected = base(IDS).logits
    theirs = on_top(base, *LAYERS)
    assert torch.equal(theirs(IDS).logits, expected)

    ours = minilora.inject(minilora.quantize(tiny_llama()), r=4, alpha=8, targets=LAYERS)
    with torch.no_grad():
        for name, adapter in adapters_of(ours).items():
            adapter.A.copy_(theirs.base_model.model.get_submodule(name).lora_A["default"].weight)

    for model in (ours, theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
    assert not torch.allclose(ours(IDS).logits, expected, atol=1e-2)
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, atol=1e-5, rtol=0)

    # What the mapping trained is an ordinary adapter, which merges here.
    theirs.save_pretrained(tmp_path)
    again = minilora.quantize(tiny_llama())
    minilora.load_adapter(again, tmp_path)
    torch.testing.assert_close(again(IDS).logits, ours(IDS).logits, atol=1e-5, rtol=0)
    minilora.merge(again)
    torch.testing.assert_close(again(IDS).logits, ours(IDS).logits, atol=1e-5, rtol=0)


def test_merging_with_peft_fails_and_changes_nothing(tiny_llama: Make) -> None:
    model = minilora.quantize(tiny_llama())
    expected = model(IDS).logits
    theirs = on_top(model, "q_proj")
    with pytest.raises((AttributeError, TypeError)):
        theirs.merge_adapter()
    with theirs.disable_adapter():
        assert torch.equal(theirs(IDS).logits, expected)
    assert all(
        not isinstance(layer, torch.nn.Linear)
        for name, layer in linear_layers(theirs).items()
        if name.endswith("q_proj.base_layer")
    )
