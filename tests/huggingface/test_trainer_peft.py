"""Twenty steps of Trainer give what peft + bitsandbytes give; and peft on top of our layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapters_of, same_bits
from trainers import adapter_trainer, arguments, interrupted, losses, rows, trainable

import minilora
from minilora import NF4Linear, NF4Weight
from minilora.targets import linear_layers

transformers = pytest.importorskip("transformers", reason="the trainer is transformers' own")
peft = pytest.importorskip("peft", reason="the oracle is peft")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

Make = Callable[..., Any]
DATA = rows(count=16)
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def dense_folder(path: Path) -> None:
    """A random Llama whose rows are whole blocks.

    Where a block crosses rows, bitsandbytes 0.50.2 decodes other values on the CPU than it encoded.
    """
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)


def their_model(folder: Path, nested: bool) -> Any:
    """A model of bitsandbytes' 4-bit layers with peft's adapters, B = 0."""
    pytest.importorskip("bitsandbytes", reason="the oracle is bitsandbytes")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    torch.manual_seed(5)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS)
    return peft.get_peft_model(model, lora)


def weight_of(their_layer: Any) -> NF4Weight:
    """The weight that a layer of bitsandbytes' holds, with the same bytes."""
    weight = their_layer.weight
    state = weight.quant_state
    inner = state.state2
    return NF4Weight(
        weight.data.reshape(-1),
        state.absmax,
        None if inner is None else inner.absmax,
        None if inner is None else state.offset,
        state.shape,
        state.dtype,
        state.blocksize,
    )


def our_model(folder: Path, theirs: Any, nested: bool) -> Any:
    """The same bytes in NF4Linear layers, and adapters with the same A."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    minilora.quantize(model, double_quant=nested)
    layers = theirs.base_model.model
    for name, layer in linear_layers(model).items():
        if isinstance(layer, NF4Linear):
            weight = weight_of(layers.get_submodule(name).base_layer)
            layer.load_state_dict(NF4Linear(weight).state_dict())
            assert same_bits(layer.weight.packed, weight.packed)
    minilora.inject(model, r=4, alpha=8)
    with torch.no_grad():
        for name, adapter in adapters_of(model).items():
            adapter.A.copy_(layers.get_submodule(name).lora_A["default"].weight)
    return model


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_twenty_steps_agree_with_peft_and_bitsandbytes(nested: bool, tmp_path: Path) -> None:
    dense_folder(tmp_path / "base")
    options = {"max_steps": 20, "logging_strategy": "steps", "logging_steps": 1}
    options |= {"learning_rate": 1e-3, "weight_decay": 0.01}

    theirs = their_model(tmp_path / "base", nested)
    ours = our_model(tmp_path / "base", theirs, nested)
    args = arguments(tmp_path / "out", **options)
    their_trainer = transformers.Trainer(model=theirs, args=args, train_dataset=DATA)
    our_trainer = adapter_trainer()(model=ours, args=args, train_dataset=DATA)
    for trainer in (their_trainer, our_trainer):
        trainer.train()

    expected, found = losses(their_trainer), losses(our_trainer)
    assert len(found) == 20 and expected[-1] < expected[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=0)

    layers = theirs.base_model.model
    for name, adapter in adapters_of(ours).items():
        layer = layers.get_submodule(name)
        for mine, other in ((adapter.A, layer.lora_A), (adapter.B, layer.lora_B)):
            assert other["default"].weight.any()
            torch.testing.assert_close(mine, other["default"].weight, atol=1e-5, rtol=0)


def test_interrupted_and_resumed_gives_the_same_twenty_steps(
    tiny_llama: Make, tmp_path: Path
) -> None:
    options = {"max_steps": 20, "save_strategy": "steps", "save_steps": 5}

    def trainer(folder: str) -> Any:
        model = minilora.inject(minilora.quantize(tiny_llama()), r=4, alpha=8)
        args = arguments(tmp_path / folder, **options)
        return adapter_trainer()(model=model, args=args, train_dataset=DATA)

    whole = trainer("whole")
    whole.train()
    interrupted(trainer("stopped"), step=14)
    resumed = trainer("stopped")
    resumed.train(resume_from_checkpoint=True)
    expected = trainable(whole.model)
    assert all(torch.equal(p, expected[name]) for name, p in trainable(resumed.model).items())
