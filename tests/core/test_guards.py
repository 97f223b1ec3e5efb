"""What would go wrong in silence: saving what reloads as something else, a weight that is read."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minilora

IDS = torch.arange(24).reshape(2, 12) * 5 % 128


def test_save_pretrained_is_refused_while_there_is_an_adapter(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = minilora.inject(tiny_llama(), r=2)
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"minilora\.save_adapter"):
            each.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()

    with torch.no_grad():
        expected = minilora.merge(model)(IDS).logits
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(again(IDS).logits, expected)


def test_save_pretrained_is_refused_for_a_model_quantized_in_place(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = minilora.quantize(tiny_llama())
    with pytest.raises(ValueError, match=r"minilora\.save_quantized"):
        model.save_pretrained(tmp_path / "model")
    minilora.inject(model, r=2)
    with pytest.raises(ValueError, match=r"minilora\.save_adapter"):
        model.save_pretrained(tmp_path / "model")
    minilora.eject(model)
    with pytest.raises(ValueError, match=r"minilora\.save_quantized"):
        model.save_pretrained(tmp_path / "model")
    minilora.merge(minilora.inject(model, r=2))
    model.save_pretrained(tmp_path / "model")


def test_a_model_inside_another_is_guarded_as_well(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    wrapped = nn.DataParallel(minilora.inject(tiny_llama(), r=2))
    quantized = minilora.quantize(tiny_llama())
    for part in (wrapped.module, wrapped.module.model):
        with pytest.raises(ValueError, match=r"minilora\.save_adapter"):
            part.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"minilora\.save_quantized"):
        quantized.model.save_pretrained(tmp_path / "model")
    minilora.eject(wrapped.module)
    wrapped.module.model.save_pretrained(tmp_path / "model")


def test_an_ejected_model_saves_as_before(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = minilora.eject(minilora.inject(tiny_llama(), r=2))
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)


def test_a_quantizer_is_released_when_nothing_is_in_4_bits_any_more(
    tiny_llama: Callable[..., Any],
) -> None:
    class Quantizer:
        def remove_quantization_config(self, model: Any) -> None:
            del model.hf_quantizer

    for targets in ("all-linear", "q_proj"):
        model = minilora.quantize(tiny_llama())
        model.hf_quantizer = Quantizer()
        minilora.merge(minilora.inject(model, r=2, targets=targets))
        assert hasattr(model, "hf_quantizer") == (targets == "q_proj")


READS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "linear": F.linear,
    "matmul": lambda x, w: x @ w,
    "from the left": lambda x, w: w @ x,
    "addmm": lambda x, w: torch.addmm(x, x, w),
}


@pytest.mark.parametrize("read", READS)
def test_a_4_bit_weight_that_is_read_as_a_tensor_says_so(read: str) -> None:
    layer = minilora.NF4Linear.from_linear(nn.Linear(64, 64))
    with pytest.raises(TypeError, match=r"no tensor: the model reads a layer's weight .*exclude="):
        READS[read](torch.randn(2, 64), layer.weight)


@pytest.mark.parametrize("attribute", ["T", "t", "div_", "data"])
def test_a_4_bit_weight_has_no_attributes_of_a_tensor(attribute: str) -> None:
    weight = minilora.quantize_nf4(torch.randn(64, 64))
    assert not hasattr(weight, attribute)
    with pytest.raises(
        AttributeError, match=rf"^{attribute} was asked of a 4-bit weight, .*exclude="
    ):
        getattr(weight, attribute)
    assert torch.equal(copy.deepcopy(weight).packed, weight.packed)
