"""What save_adapter says of files that PEFT, vLLM or llama.cpp do not take as they are."""

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_files import randomize
from torch import Tensor, nn

import minilora
from minilora.files import peft_limits


def said(model: nn.Module, folder: Path) -> str:
    """What saving warns of, as one text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        minilora.save_adapter(model, folder)
    assert all(warning.category is UserWarning for warning in caught)
    assert all(warning.filename == __file__ for warning in caught), "not blamed on the caller"
    return "\n".join(str(warning.message) for warning in caught)


def blocks(*names: str, model_type: str | None = None) -> Any:
    """Layers of these names, of a model of this type."""
    model: Any = nn.Module()
    for name in names:
        *parents, last = name.split(".")
        holder = model
        for parent in parents:
            if parent not in holder._modules:
                holder.add_module(parent, nn.Module())
            holder = holder.get_submodule(parent)
        holder.add_module(last, nn.Linear(8, 8))
    if model_type is not None:
        model.config = SimpleNamespace(model_type=model_type)
    return model


# Options of inject, and what is said; "" for nothing.
SERVED: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({"r": 2, "dropout": 0.1}, ""),
    "some layers": ({"targets": ["1.up"]}, ""),
    "ranks": ({"rank_pattern": {"up": 3}, "alpha_pattern": {"up": 16}}, "rank_pattern, of which"),
    "alphas": ({"alpha_pattern": {"1.up": 3}}, "alpha_pattern, of which"),
    "both": ({"rank_pattern": {"up": 3}}, "rank_pattern and alpha_pattern, of which"),
    "a whole module": ({"train_also": ["head"], "targets": ["up"]}, r"modules_to_save: head\.bias"),
    "a bias": ({"train_also": ["1.up.bias"]}, "bias='lora_only': 1.up.bias"),
    "biases of B": ({"lora_bias": True}, "lora_bias"),
}


@pytest.mark.parametrize("case", SERVED)
def test_what_vllm_and_llama_cpp_do_not_serve_is_said(case: str, tmp_path: Path) -> None:
    options, message = SERVED[case]
    model = minilora.inject(blocks("0.up", "1.up", "1.down", "head"), **options)
    text = said(model, tmp_path)
    assert bool(text) == bool(message)
    if message:
        expected = f"vLLM and llama.cpp do not serve everything of this adapter: .*{message}"
        with pytest.warns(UserWarning, match=f"(?s){expected}.*minilora.merge makes a model"):
            minilora.save_adapter(model, tmp_path)


LIMITS: dict[str, tuple[str, list[str], str]] = {
    "mamba": ("mamba", ["0.out_proj", "0.in_proj"], "refuses 0.out_proj"),
    "falcon_h1": (
        "falcon_h1",
        ["0.out_proj", "1.out_proj", "2.out_proj"],
        "0.out_proj, 1.out_proj",
    ),
    "deepseek": (
        "deepseek_v3",
        ["0.mlp.gate_proj", "0.q_proj"],
        "takes 0.mlp.gate_proj for experts",
    ),
    "qwen3_next": ("qwen3_next", ["0.shared.down_proj"], "takes 0.shared.down_proj for experts"),
    "minimax": ("minimax", ["0.w1", "0.q_proj"], "takes 0.w1 for experts"),
}


@pytest.mark.parametrize("case", LIMITS)
def test_what_peft_does_otherwise_is_said(case: str, tmp_path: Path) -> None:
    model_type, names, message = LIMITS[case]
    model = minilora.inject(blocks(*names, model_type=model_type), r=2)
    text = said(model, tmp_path)
    assert f"in a model of type {model_type} it" in text and message in text

    others = blocks("0.q_proj", "0.v_proj", model_type=model_type)
    assert said(minilora.inject(others, r=2), tmp_path) == ""
    assert said(minilora.inject(blocks(*names, model_type="llama"), r=2), tmp_path) == ""


def test_a_layer_of_several_names_is_said_to_be_adapted_under_one_in_peft(tmp_path: Path) -> None:
    model = blocks("up", "down", model_type="zamba")
    model.again = model.up
    assert "has an adapter under the first, not again" in said(
        minilora.inject(model, r=2), tmp_path
    )


class Twice(nn.Module):
    """A layer, or a block with one, in two places."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.a = make()
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.tanh(self.a(x)))
        return y


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(8, 8)


# What a model holds twice, and the name that is said to have no adapter in PEFT; "" for none.
TWICE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a layer": (layer, "b"),
    "a compiled layer": (lambda: torch.compile(layer(), backend="eager"), "b"),
    "a layer of a block": (lambda: nn.Sequential(layer()), ""),
    "a layer twice in a block": (lambda: Twice(layer), "a.b"),
}


# Of the second name of a parameter, which the file holds once.
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.parametrize("case", TWICE)
def test_peft_adapts_the_first_place_of_a_layer_alone(case: str, tmp_path: Path) -> None:
    """PEFT is the oracle: it computes something else just where that is said."""
    peft = pytest.importorskip("peft", reason="peft is the oracle here: pip install -e .[dev]")
    make, missed = TWICE[case]
    ours = randomize(minilora.inject(Twice(make), r=2))
    assert (f"under the first, not {missed}" if missed else "") in (text := said(ours, tmp_path))
    assert bool(text) == bool(missed)

    # PEFT does not know the names of compiled layers.
    dense = Twice(layer if "compiled" in case else make)
    theirs = peft.PeftModel.from_pretrained(dense, tmp_path).eval()
    x = torch.linspace(-1, 1, 16).view(2, 8)
    with torch.no_grad():
        equal = torch.allclose(ours(x), theirs(x), rtol=0, atol=1e-5)
    assert equal == (not missed)


def test_peft_refuses_what_is_said_of_it(tmp_path: Path) -> None:
    """The oracle for the tables: PEFT itself, on real models of transformers."""
    peft = pytest.importorskip("peft", reason="peft is the oracle here: pip install -e .[dev]")
    transformers = pytest.importorskip("transformers", reason="its models are in question")

    def model(name: str, **options: Any) -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
        config = transformers.AutoConfig.for_model(name, **sizes, **options)
        return transformers.AutoModelForCausalLM.from_config(config)

    mamba = {"state_size": 4, "intermediate_size": 16, "time_step_rank": 2}
    adapted = minilora.inject(model("mamba", **mamba), r=2, targets=["in_proj", "out_proj"])
    assert "refuses backbone.layers.0.mixer.out_proj" in said(adapted, tmp_path / "mamba")
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        peft.PeftModel.from_pretrained(model("mamba", **mamba), tmp_path / "mamba")

    moe = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 2, "head_dim": 8}
    moe |= {"moe_intermediate_size": 8, "intermediate_size": 8, "mlp_only_layers": [0]}
    adapted = minilora.inject(model("qwen3_moe", **moe), r=2, targets=["q_proj", "down_proj"])
    assert "takes model.layers.0.mlp.down_proj for experts" in said(adapted, tmp_path / "moe")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(model("qwen3_moe", **moe), tmp_path / "moe")
    found = [n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert found == ["model.layers.0.self_attn.q_proj"]


def test_the_tables_are_those_of_the_installed_peft() -> None:
    pytest.importorskip("peft", reason="peft is the oracle here: pip install -e .[dev]")
    import inspect

    from peft.tuners import tuners_utils
    from peft.utils import transformers_weight_conversion as conversion

    source = inspect.getsource(tuners_utils._check_lora_target_modules_mamba)
    assert all(f'"{name}"' in source for name in peft_limits.STATE_SPACE_MODELS)
    assert all(f'"{name}"' in source for name in peft_limits.STATE_SPACE_LAYERS)

    assert conversion._MOE_TARGET_MODULE_MAPPING.keys() == peft_limits.EXPERTS.keys()
    for kind, taken in peft_limits.EXPERTS.items():
        assert conversion._MOE_TARGET_MODULE_MAPPING[kind].keys() == taken
        patterns = conversion._MODEL_TO_CONVERSION_PATTERN.items()
        types = {name for name, pattern in patterns if pattern == kind}
        converted = {
            n for n in types if conversion.get_checkpoint_conversion_mapping(n) is not None
        }
        assert converted == peft_limits.MODELS_WITH_EXPERTS[kind]
