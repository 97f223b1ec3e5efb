"""The hash of a base: it sees every value, and not where or how the values are stored."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import contents, interrupt

import minilora
from minilora.training import FinetuneConfig, finetune
from minilora.training.base import sha256_of_base


def test_a_changed_base_is_refused_when_a_run_is_resumed(
    resumable: Callable[..., FinetuneConfig], folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(folder, tmp_path / "model")
    interrupt(resumable(model=str(model)), 2)
    weights = load_file(model / "model.safetensors")
    scaled = {key: 1.3 * tensor for key, tensor in weights.items()}
    save_file(scaled, model / "model.safetensors", metadata={"format": "pt"})
    before = contents(Path(resumable().out))
    with pytest.raises(ValueError, match=r"model is not the base that .*step-00000002"):
        finetune(resumable(model=str(model), resume=True))
    assert contents(Path(resumable().out)) == before


@pytest.mark.parametrize("quantize", [False, True])
def test_every_value_counts_and_the_dtype_does_not(quantize: bool, tiny_llama: Any) -> None:
    model, narrow = tiny_llama().bfloat16().float(), tiny_llama().bfloat16()
    if quantize:
        minilora.quantize(model)
        minilora.quantize(narrow)
    before = sha256_of_base(model)
    assert sha256_of_base(narrow) == before
    for tensor in model.state_dict().values():
        flat = tensor.view(-1).view(torch.uint8)
        flat[-1] ^= 1
        changed = sha256_of_base(model) != before
        flat[-1] ^= 1
        assert changed or tensor.dtype == torch.int64
    assert sha256_of_base(model) == before
