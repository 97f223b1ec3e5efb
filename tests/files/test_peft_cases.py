"""PEFT's own cases for LoRA, both directions: equal, or refused by name, and never wrong.

The configurations are those of TEST_CASES in PEFT's tests/test_custom_models.py with a LoraConfig.
PEFT's code is the oracle: it trains and saves what minilora loads, and loads what minilora saves.
"""

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapters_of, snapshot
from torch import Tensor, nn

import minilora

peft = pytest.importorskip("peft", reason="peft is the oracle here: pip install -e .[dev]")
pytest.importorskip("transformers", reason="peft needs it")

pytestmark = [
    # What save_adapter says of whole parameters and patterns is tested in test_peft_limits.py.
    pytest.mark.filterwarnings("ignore:vLLM and llama.cpp do not serve:UserWarning"),
    # PEFT's ranks of 8 on a layer of two outputs.
    pytest.mark.filterwarnings("ignore:.*rank:UserWarning"),
]

# Both sides compute W x + s B A x in float32 and in another order: sums of 20 terms near one.
TOLERANCE = 1e-5


def mlp() -> nn.Module:
    layers = OrderedDict(lin0=nn.Linear(10, 20), relu=nn.ReLU(), lin1=nn.Linear(20, 2))
    return nn.Sequential(layers)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(10, 2), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lin0(self.mha(x, x, x)[0])
        return y


def embedding_and_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layers = OrderedDict(emb=nn.Embedding(100, 5), conv1d=Conv1D(1, 5))
    return nn.Sequential(OrderedDict(**layers, flat=nn.Flatten(), lin0=nn.Linear(10, 2)))


def convolution(name: str, conv: nn.Module, features: int) -> nn.Module:
    layers = OrderedDict([(name, conv), ("flat", nn.Flatten()), ("lin0", nn.Linear(features, 2))])
    return nn.Sequential(layers)


class OwnParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 2)
        self.weight = nn.Parameter(torch.randn(2, 10))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lin0(x) + x @ self.weight.T
        return y


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "MLP": (mlp, lambda: torch.arange(90).view(9, 10).float() / 90),
    "EmbConv1D": (embedding_and_conv1d, lambda: torch.arange(90).view(45, 2)),
    "Conv1d": (
        lambda: convolution("conv1d", nn.Conv1d(1, 1, 2), 9),
        lambda: torch.arange(90).view(9, 1, 10) / 90,
    ),
    "Conv2d": (
        lambda: convolution("conv2d", nn.Conv2d(5, 10, 3), 90),
        lambda: torch.arange(250).view(2, 5, 5, 5) / 250,
    ),
    "Conv2dGroups": (
        lambda: convolution("conv2d", nn.Conv2d(8, 8, 3, groups=4), 72),
        lambda: torch.arange(400).view(2, 8, 5, 5) / 400,
    ),
    "Conv2dGroups2": (
        lambda: convolution("conv2d", nn.Conv2d(8, 8, 3, groups=2), 72),
        lambda: torch.arange(400).view(2, 8, 5, 5) / 400,
    ),
    "Conv3d1x1": (
        lambda: convolution("conv3d", nn.Conv3d(5, 10, 1), 1250),
        lambda: torch.arange(1250).view(2, 5, 5, 5, 5) / 1250,
    ),
    "Conv3d": (
        lambda: convolution("conv3d", nn.Conv3d(5, 10, 3), 270),
        lambda: torch.arange(1250).view(2, 5, 5, 5, 5) / 1250,
    ),
    "MHA": (Attention, lambda: torch.arange(90).view(9, 10).float() / 90),
    "parameters": (OwnParameters, lambda: torch.arange(90).view(9, 10).float() / 90),
}

Case = tuple[str, dict[str, Any]]
BOTH = ["lin0", "lin1"]

# Plain LoRA on linear layers: equal both ways.
EQUAL: dict[str, Case] = {
    "Vanilla MLP 1": ("MLP", {"target_modules": "lin0"}),
    "Vanilla MLP 2": ("MLP", {"target_modules": ["lin0"]}),
    "Vanilla MLP 3": ("MLP", {"target_modules": ["lin1"]}),
    "Vanilla MLP 4": ("MLP", {"target_modules": BOTH}),
    "Vanilla MLP 5": ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "Vanilla MLP 6": (
        "MLP",
        {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1},
    ),
    "Vanilla MLP 1 with lora_b bias": (
        "MLP",
        {"target_modules": BOTH, "lora_bias": True, "lora_alpha": 32},
    ),
    # Only the start and what is trained are other than in plain LoRA.
    "Vanilla MLP 1 with MiCA": (
        "MLP",
        {"target_modules": ["lin0"], "init_lora_weights": "mica", "r": 4},
    ),
}

DORA = {"use_dora": True}
CONV_BIAS = {"lora_bias": True, "lora_alpha": 32}
VELORA: dict[str, Any] = {"num_groups": 2, "init_type": "random"}

# Other methods and other layers: refused, and the error has this in it.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Vanilla MLP 7 with DoRA": ("MLP", {"target_modules": ["lin0"], **DORA}, "use_dora=True"),
    "Vanilla MLP 8 with DoRA": ("MLP", {"target_modules": BOTH, **DORA}, "use_dora=True"),
    "Vanilla MLP 9 with DoRA": (
        "MLP",
        {"target_modules": "lin1", "lora_alpha": 32, **DORA},
        "use_dora=True",
    ),
    "Vanilla MLP 1 with KaSA": (
        "MLP",
        {"target_modules": ["lin0"], "kasa_config": {}, "r": 4},
        "kasa_config=",
    ),
    "Vanilla MLP 10 with VeLoRA": (
        "MLP",
        {"target_modules": ["lin0"], "velora_config": VELORA},
        "velora_config=",
    ),
    "Vanilla MLP 11 with VeLoRA": (
        "MLP",
        {"target_modules": BOTH, "velora_config": VELORA | {"init_type": "batch_average"}},
        "velora_config=",
    ),
    "Vanilla MLP 12 with VeLoRA": (
        "MLP",
        {
            "target_modules": ["lin0"],
            "velora_config": VELORA | {"init_type": "batch_average_once"},
        },
        "velora_config=",
    ),
    "Vanilla MLP 1 with Monteclora": (
        "MLP",
        {"target_modules": ["lin0"], "monteclora_config": {"num_samples": 2}},
        "monteclora_config=",
    ),
    # PEFT sets fan_in_fan_out for Conv1D, whose weight is transposed.
    "Embedding + Conv1D 1": ("EmbConv1D", {"target_modules": ["conv1d"]}, "fan_in_fan_out=True"),
    "Embedding + Conv1D 2": ("EmbConv1D", {"target_modules": ["emb"]}, "emb"),
    "Embedding + Conv1D 3": ("EmbConv1D", {"target_modules": ["emb", "conv1d"]}, "fan_in_fan_out"),
    "Embedding + Conv1D 1 DoRA": (
        "EmbConv1D",
        {"target_modules": ["conv1d"], **DORA},
        "use_dora=True",
    ),
    "Embedding + Conv1D 2 DoRA": (
        "EmbConv1D",
        {"target_modules": ["emb"], **DORA},
        "use_dora=True",
    ),
    "Embedding + Conv1D 3 DoRA": (
        "EmbConv1D",
        {"target_modules": ["emb", "conv1d"], **DORA},
        "use_dora=True",
    ),
    "Embedding + Conv1D 1 trainable_tokens": (
        "EmbConv1D",
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}},
        "trainable_token_indices=",
    ),
    "Conv1d": ("Conv1d", {"target_modules": ["conv1d"]}, "conv1d"),
    "Conv1d with DoRA": ("Conv1d", {"target_modules": ["conv1d"], **DORA}, "use_dora=True"),
    "Conv2d 1": ("Conv2d", {"target_modules": ["conv2d"]}, "conv2d"),
    "Conv2d 2": ("Conv2d", {"target_modules": ["conv2d", "lin0"]}, "conv2d"),
    "Conv2d 1 with DoRA": ("Conv2d", {"target_modules": ["conv2d"], **DORA}, "use_dora=True"),
    "Conv2d 2 with DoRA": (
        "Conv2d",
        {"target_modules": ["conv2d", "lin0"], **DORA},
        "use_dora=True",
    ),
    "Conv2d Groups": ("Conv2dGroups", {"target_modules": ["conv2d"]}, "conv2d"),
    "Conv2d Groups with DoRA": (
        "Conv2dGroups",
        {"target_modules": ["conv2d"], **DORA},
        "use_dora=True",
    ),
    "Conv2d Groups2": ("Conv2dGroups2", {"target_modules": ["conv2d"]}, "conv2d"),
    "Conv2d Groups2 with DoRA": (
        "Conv2dGroups2",
        {"target_modules": ["conv2d"], **DORA},
        "use_dora=True",
    ),
    "Conv2d 1 with lora_b bias": (
        "Conv2d",
        {"target_modules": ["conv2d"], **CONV_BIAS},
        "conv2d",
    ),
    "Conv3d 1": ("Conv3d", {"target_modules": ["conv3d"]}, "conv3d"),
    "Conv3d 2": ("Conv3d", {"target_modules": ["conv3d", "lin0"]}, "conv3d"),
    "Conv3d 1 with DoRA": ("Conv3d", {"target_modules": ["conv3d"], **DORA}, "use_dora=True"),
    "Conv3d 2 with DoRA": (
        "Conv3d",
        {"target_modules": ["conv3d", "lin0"], **DORA},
        "use_dora=True",
    ),
    "Conv3d 1x1": ("Conv3d1x1", {"target_modules": ["conv3d"]}, "conv3d"),
    "Conv3d 1x1 with DoRA": (
        "Conv3d1x1",
        {"target_modules": ["conv3d"], **DORA},
        "use_dora=True",
    ),
    "Conv3d 1 with lora_b bias": (
        "Conv3d",
        {"target_modules": ["conv3d"], **CONV_BIAS},
        "conv3d",
    ),
    "MHA 1": ("MHA", {"target_modules": ["mha"]}, "mha"),
    "MHA 2": ("MHA", {"target_modules": ["mha", "lin0"]}, "mha"),
    "parameters 1": (
        "parameters",
        {"target_parameters": ["lin0.weight"]},
        "target_parameters=",
    ),
    "parameters 2": (
        "MLP",
        {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"]},
        "target_parameters=",
    ),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def output(name: str, model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(MODELS[name][1]())
    return out


def trained(model: nn.Module) -> nn.Module:
    """What training leaves: other values for everything that is trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def saved_by_peft(name: str, options: Mapping[str, Any], folder: Path) -> Any:
    nested: dict[str, Any] = {"kasa_config": peft.KasaConfig, "velora_config": peft.VeloraConfig}
    nested["monteclora_config"] = peft.MontecloraConfig
    made = {k: nested[k](**v) if k in nested else v for k, v in options.items()}
    with warnings.catch_warnings():
        # PEFT says what it does with embeddings, groups of a convolution and Conv1D.
        warnings.simplefilter("ignore")
        model: Any = trained(peft.get_peft_model(make(name), peft.LoraConfig(**made)))
        model.save_pretrained(folder)
    return model.eval()


def close(name: str, found: Any, expected: Any) -> None:
    out = output(name, expected)
    assert (output(name, found) - out).abs().max() < TOLERANCE
    assert (output(name, make(name)) - out).abs().max() > 1000 * TOLERANCE, "nothing is compared"


@pytest.mark.parametrize("case", EQUAL)
def test_a_plain_case_that_peft_saved_computes_the_same_here(case: str, tmp_path: Path) -> None:
    name, options = EQUAL[case]
    theirs = saved_by_peft(name, options, tmp_path / "theirs")
    ours = minilora.load_adapter(make(name), tmp_path / "theirs")
    close(name, ours, theirs)

    # And back: what minilora writes of it computes the same in PEFT.
    path = minilora.save_adapter(ours, tmp_path / "ours")
    close(name, peft.PeftModel.from_pretrained(make(name), path), theirs)


# The same cases, as minilora's options say them.
WRITTEN: dict[str, Case] = {
    "Vanilla MLP 1": ("MLP", {"targets": "lin0"}),
    "Vanilla MLP 3": ("MLP", {"targets": ["lin1"]}),
    "Vanilla MLP 4": ("MLP", {"targets": BOTH}),
    "Vanilla MLP 5": ("MLP", {"targets": ["lin0"], "train_also": ["lin1"]}),
    "Vanilla MLP 6": ("MLP", {"targets": ["lin0"], "alpha": 4, "dropout": 0.1}),
    "Vanilla MLP 1 with lora_b bias": ("MLP", {"targets": BOTH, "lora_bias": True, "alpha": 32}),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_a_plain_case_that_minilora_saved_computes_the_same_in_peft(
    case: str, tmp_path: Path
) -> None:
    name, options = WRITTEN[case]
    ours = trained(minilora.inject(make(name), r=8, **options))
    path = minilora.save_adapter(ours, tmp_path)
    close(name, peft.PeftModel.from_pretrained(make(name), path), ours)

    # PEFT understands the same options as in the case itself.
    config, expected = peft.LoraConfig.from_pretrained(path), EQUAL[case][1]
    asked = expected["target_modules"]
    assert config.target_modules == set([asked] if isinstance(asked, str) else asked)
    for option in ("lora_dropout", "lora_bias", "modules_to_save"):
        assert getattr(config, option) == expected.get(option, peft.LoraConfig().to_dict()[option])


@pytest.mark.parametrize("case", REFUSED)
def test_another_case_is_refused_by_name_and_changes_nothing(case: str, tmp_path: Path) -> None:
    name, options, named = REFUSED[case]
    saved_by_peft(name, options, tmp_path)
    model = make(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as error:
        minilora.load_adapter(model, tmp_path)
    assert re.search(named, str(error.value))
    assert snapshot(model) == before and not adapters_of(model)
