"""Against peft as the oracle: the same logits in both directions, the same steps of training.

Its variants of LoRA are refused by name.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import CONFIG, adapters_of, attach_sizes, nested
from torch import Tensor, nn

import minilora
from minilora.lora import LoRA
from minilora.targets import adapter_names

# What save_adapter says of whole parameters and patterns is tested in test_peft_limits.py.
pytestmark = pytest.mark.filterwarnings("ignore:vLLM and llama.cpp do not serve:UserWarning")

peft = pytest.importorskip("peft", reason="peft is the oracle here: pip install -e .[dev]")
pytest.importorskip("transformers", reason="peft needs it")

IDS = torch.arange(36).reshape(3, 12) * 7 % 128

# peft adds (x A^T B^T) * s to the base's product, minilora accumulates s z B^T into it: one
# rounding of float32 less. Logits are sums of 64 terms and near one in size, behind two layers:
# 1e-5 is about 80 units in the last place.
TOLERANCE = 1e-5


def run(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(IDS).logits
    return out


def train(model: Any, parameters: list[nn.Parameter], steps: int, lr: float = 1e-2) -> list[float]:
    """AdamW, no dropout; returns the loss of every step."""
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.eval()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def close(found: Any, expected: Any, base: Any) -> None:
    assert (run(found) - run(expected)).abs().max() < TOLERANCE
    assert (run(base) - run(expected)).abs().max() > 100 * TOLERANCE, (
        "the adapter does nothing, so this compares nothing"
    )


PEFT: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"r": 3, "lora_alpha": 8, "target_modules": "all-linear"},
    "a pattern": {"r": 3, "target_modules": r".*\.1\..*(up|down)_proj"},
    "some layers": {
        "r": 3,
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "left out": {
        "r": 3,
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": ["layers.0.mlp.up_proj"],
    },
    "ranks": {
        "r": 4,
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "k_proj": 7},
    },
    "alphas": {
        "r": 4,
        "target_modules": ["q_proj", "k_proj"],
        "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 2, "k_proj": 7},
    },
    "alphas, the first match counts": {
        "target_modules": ["q_proj"],
        "alpha_pattern": {"layers.1.self_attn.q_proj": 1, "q_proj": 32},
    },
    "a whole head": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole norms and the embedding": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["input_layernorm", "embed_tokens"],
    },
    "a gaussian start": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "dropout": {"r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.1},
}


@pytest.mark.parametrize("case", PEFT)
def test_what_peft_trained_computes_the_same_here(
    case: str, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **PEFT[case]))
    train(model, trainable(model), 3)
    model.save_pretrained(tmp_path)
    ours = minilora.load_adapter(tiny_llama(), tmp_path)
    close(ours, model, tiny_llama())
    dropout = PEFT[case].get("lora_dropout", 0.0)
    assert all(adapter.dropout == dropout for adapter in adapters_of(ours).values())
    assert sum(p.numel() for p in trainable(ours)) == sum(p.numel() for p in trainable(model))


OURS: dict[str, dict[str, Any]] = {
    "all-linear": {"r": 4},
    "some": {"r": 3, "alpha": 5.5, "targets": ["q_proj", "mlp.down_proj"]},
    "one": {"r": 3, "targets": "layers.1.mlp.up_proj"},
    "the head": {"r": 3, "targets": ["lm_head", "k_proj"]},
    "a whole head": {"r": 3, "train_also": ["lm_head"]},
    "norms and the embedding": {"r": 3, "train_also": ["input_layernorm", "embed_tokens"]},
    "one norm": {"r": 3, "train_also": ["layers.1.input_layernorm"]},
}


@pytest.mark.parametrize("case", OURS)
def test_what_minilora_trained_computes_the_same_in_peft(
    case: str, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = minilora.inject(tiny_llama(), **OURS[case])
    train(model, minilora.adapter_parameters(model), 3)
    # A warning of peft's would be an error here.
    path = minilora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), path)
    close(theirs, model, tiny_llama())
    assert type(theirs.peft_config["default"]) is peft.LoraConfig


def test_peft_wraps_the_same_layers_with_the_same_ranks_and_alphas(tmp_path: Path) -> None:
    sizes = {"a.up": (2, 4.0), "up": (3, 9.0), "a.a.down": (2, 1.5)}
    model = attach_sizes(nested(), sizes)
    for adapter in adapters_of(model).values():
        nn.init.normal_(adapter.B)

    theirs = peft.PeftModel.from_pretrained(nested(), minilora.save_adapter(model, tmp_path))
    layers = {
        n: m
        for n, m in theirs.base_model.model.named_modules()
        if isinstance(m, peft.tuners.lora.Linear)
    }
    found = {n: (m.r["default"], m.lora_alpha["default"]) for n, m in layers.items()}
    assert found == sizes


def test_a_peft_classifier_loads_though_peft_names_heads_that_are_not_there(tmp_path: Path) -> None:
    import transformers

    def make() -> Any:
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 128,
        }
        return transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**sizes, num_labels=3, pad_token_id=0)
        )

    model = peft.get_peft_model(
        make(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    )
    for p in trainable(model):
        nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["classifier", "score"]
    close(minilora.load_adapter(make(), tmp_path), model, make())


def test_twenty_steps_of_adamw_take_the_same_losses_as_in_peft(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    def start() -> Any:
        return minilora.inject(tiny_llama(), r=4, alpha=8)

    ours = start()
    theirs = peft.PeftModel.from_pretrained(
        tiny_llama(), minilora.save_adapter(ours, tmp_path), is_trainable=True
    )
    found, expected = (
        train(ours, minilora.adapter_parameters(ours), 20),
        train(theirs, trainable(theirs), 20),
    )
    # float32 gradients differ in the last bits, and Adam divides by their size: the difference is
    # 1e-7 at first and grows with the steps.
    assert max(abs(f - e) for f, e in zip(found, expected, strict=True)) < 1e-4
    assert expected[-1] < expected[0] - 0.1, "nothing was learned, so this compares nothing"


def test_a_peft_adapter_round_trips_through_minilora(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    options = {**PEFT["ranks"], "alpha_pattern": {"k_proj": 3}, "modules_to_save": ["lm_head"]}
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    train(model, trainable(model), 3)
    model.save_pretrained(tmp_path / "theirs")
    ours = minilora.load_adapter(tiny_llama(), tmp_path / "theirs")
    back = peft.PeftModel.from_pretrained(
        tiny_llama(), minilora.save_adapter(ours, tmp_path / "ours")
    )
    assert torch.equal(run(back), run(model))


class RsLoRA(LoRA):
    """A variant, scaled by alpha / sqrt(r) (arXiv:2312.03732): all that it takes to exchange it."""

    @property
    def scale(self) -> float:
        return self.alpha / math.sqrt(self.r)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "use_rslora": True}


def test_a_variant_that_brings_its_own_option_goes_both_ways(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(), config)
    train(model, trainable(model), 3)
    model.save_pretrained(tmp_path / "theirs")

    ours = minilora.load_adapter(tiny_llama(), tmp_path / "theirs", adapter=RsLoRA)
    close(ours, model, tiny_llama())
    path = minilora.save_adapter(ours, tmp_path / "ours")
    close(peft.PeftModel.from_pretrained(tiny_llama(), path), model, tiny_llama())
    # Any adapter can have its scaling.
    close(minilora.load_adapter(tiny_llama(), path), model, tiny_llama())
    plain = minilora.save_adapter(minilora.inject(tiny_llama(), r=4), tmp_path / "plain")
    with pytest.raises(ValueError, match="not of that class of adapter: no use_rslora=True"):
        minilora.load_adapter(tiny_llama(), plain, adapter=RsLoRA, allow_zero=True)


# An init_lora_weights of these names moves a part of the base's weights into the adapter: on the
# unchanged base they compute a different model.
FOREIGN: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "target_parameters": {"target_parameters": ["mlp.experts"]},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights='pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights='olora'": {"init_lora_weights": "olora"},
    "init_lora_weights='corda'": {"init_lora_weights": "corda"},
    "init_lora_weights='loftq'": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "init_lora_weights='one of tomorrow'": {"init_lora_weights": "one of tomorrow"},
    "peft_type": {"peft_type": "LOHA"},
    "an option of tomorrow": {"an option of tomorrow": 3},
}


@pytest.mark.parametrize("option", FOREIGN)
def test_an_option_that_minilora_lacks_is_refused_by_name(
    option: str, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    train(model, trainable(model), 1)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert adapter_names(minilora.load_adapter(tiny_llama(), tmp_path))
    (tmp_path / CONFIG).write_text(json.dumps(config | FOREIGN[option]))
    fresh = tiny_llama()
    with pytest.raises(ValueError, match=CONFIG) as error:
        minilora.load_adapter(fresh, tmp_path)
    assert option in str(error.value)
    assert not adapter_names(fresh) and all(p.requires_grad for p in fresh.parameters())


def test_pissa_is_refused_because_it_would_compute_another_model(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(tiny_llama(), config)
    train(model, trainable(model), 1)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa'.*path_initial_model_for"):
        minilora.load_adapter(tiny_llama(), tmp_path)


# peft says what it does.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_adapter_on_an_embedding_is_refused_by_name(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = peft.get_peft_model(
        tiny_llama(),
        peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"),
    )
    train(model, trainable(model), 1)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.embed_tokens"):
        minilora.load_adapter(tiny_llama(), tmp_path)
