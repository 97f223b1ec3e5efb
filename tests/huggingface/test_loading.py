"""Loading a dense model: its dtype, its device, its errors, and the memory of its file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits

from minilora.huggingface.loading import (
    best_dtype,
    load_dense,
    pick_device,
    release_checkpoint_memory,
)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ("avx512_bf16", torch.bfloat16),
        ("amx_bf16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("avx2", torch.float32),
    ],
)
def test_a_cpu_gets_bfloat16_only_if_it_multiplies_it(
    capability: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    assert best_dtype(torch.device("cpu")) == dtype
    assert best_dtype(torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize(("available", "expected"), [(True, "cuda"), (False, "cpu")])
def test_the_default_device_is_the_gpu_if_available(
    available: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert pick_device(None) == torch.device(expected)
    assert pick_device("cpu") == torch.device("cpu")


def test_a_gpu_that_pytorch_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device='cuda:1': this PyTorch .* sees no GPU"):
        pick_device("cuda:1")


def test_a_folder_is_loaded_in_the_dtype_asked_for(folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_dense(folder, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert tokenizer.chat_template
    model, _ = load_dense(str(folder))
    assert {p.dtype for p in model.parameters()} == {best_dtype(torch.device("cpu"))}


def test_what_is_no_model_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be loaded as a causal language model") as error:
        load_dense(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(error.value)


def test_parameters_are_copied_bit_for_bit_and_ties_and_integers_stay(
    tiny_llama: Callable[..., Any],
) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.register_parameter(
        "packed", torch.nn.Parameter(torch.arange(4, dtype=torch.uint8), requires_grad=False)
    )
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}

    release_checkpoint_memory(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, p in model.named_parameters():
        was, address, bits = before[name]
        assert p is was and same_bits(p, bits)
        assert (p.data_ptr() == address) == (not p.is_floating_point())


@pytest.mark.parametrize(
    "name", ["foo", "xpu", "mps", "meta", "cpu:1", "", "CPU", "cuda:99", "9" * 9]
)
def test_an_unknown_device_is_refused_with_what_there_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"this machine has cpu, cuda:0, cuda:1$"):
        pick_device(name)


def test_mps_is_offered_where_pytorch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps") == torch.device("mps")
    with pytest.raises(ValueError, match="this machine has cpu, mps"):
        pick_device("xpu")
