"""A bfloat16 checkpoint in a float32 model: no float32 copy of a weight, and the same codes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from torch import Tensor

import minilora
from minilora.huggingface import quantizer

transformers = pytest.importorskip("transformers", reason="the quantizer is for its models")

STORED = (torch.float32, torch.bfloat16, torch.float16)
IDS = torch.arange(24).reshape(2, 12) * 5 % 128


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(IDS).logits
    return out


@pytest.mark.parametrize("wanted", STORED, ids=str)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_codes_do_not_depend_on_who_widens(
    stored: torch.dtype,
    wanted: torch.dtype,
    tiny_llama: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_llama().to(stored).save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained
    handed_over: set[torch.dtype] = set()

    def quantize_nf4(weight: Tensor, *form: Any) -> Any:
        handed_over.add(weight.dtype)
        return minilora.quantize_nf4(weight, *form)

    monkeypatch.setattr(quantizer, "quantize_nf4", quantize_nf4)
    found = read(tmp_path, dtype=wanted, quantization_config=minilora.NF4Config())
    expected = minilora.quantize(read(tmp_path, dtype=wanted))

    widened = (stored, wanted) == (torch.bfloat16, torch.float32)
    assert handed_over == {torch.bfloat16 if widened else wanted}
    theirs = expected.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    assert all(same_bits(tensor, theirs[name]) for name, tensor in found.state_dict().items())
    assert found.model.layers[0].mlp.up_proj.weight.dtype == wanted
    assert same_bits(logits(found), logits(expected))
    assert "_get_dtype_plan" not in vars(found)
