"""target_modules mean exactly the adapted layers to PEFT, among modules of any kind."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import adapters_of, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minilora
from minilora.files.peft_targets import base_modules, target_modules

peft = pytest.importorskip("peft", reason="peft is the oracle here: pip install -e .[dev]")

# Parts of names of which some are the ends of others.
PARTS = ["up", "down", "a", "0", "1", "10", "q_proj", "proj"]


def meant(targets: list[str] | str, modules: list[str]) -> set[str]:
    """What PEFT adapts of these modules."""
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(target_modules=targets)
    return {name for name in modules if check_target_module_exists(config, name)}


@given(st.data())
@settings(max_examples=300)
def test_peft_adapts_exactly_the_layers_that_were_adapted(data: st.DataObject) -> None:
    name = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join)
    leaves = data.draw(st.lists(name, min_size=1, max_size=12, unique=True))
    ends = [tuple(leaf.split(".")[: i + 1]) for leaf in leaves for i in range(leaf.count(".") + 1)]
    modules = sorted({".".join(end) for end in ends})
    adapted = data.draw(st.lists(st.sampled_from(modules), min_size=1, unique=True))

    targets = target_modules(adapted, modules)
    assert meant(targets, modules) == set(adapted)
    # The shortest: an entry that loses its first part means more.
    for entry in targets if isinstance(targets, list) else []:
        shorter = entry.partition(".")[2]
        assert not shorter or meant([shorter], modules) - set(adapted)


def test_many_entries_still_mean_the_same_where_peft_shortens_them() -> None:
    """From 20 entries on, PEFT looks for fewer names by itself."""
    from peft.tuners.tuners_utils import _find_minimal_target_modules as shortened

    layers = [f"layers.{i}.{name}" for i in range(12) for name in ("q_proj", "k_proj", "v_proj")]
    adapted = [name for i, name in enumerate(layers) if i % 5]
    targets = target_modules(adapted, layers)
    assert len(targets) > 20
    others = set(layers) - set(adapted)
    assert meant(sorted(shortened(targets, others)), layers) == set(adapted)


class Both(nn.Module):
    """Layers of one name and several kinds: linear, convolution, embedding, containers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.ModuleDict({"proj": nn.Embedding(16, 8)})
        self.conv = nn.ModuleDict({"proj": nn.Conv1d(8, 8, 1)})
        self.block = nn.ModuleDict({"proj": nn.Linear(8, 8), "0": nn.Linear(8, 8)})
        self.steps = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.blocks = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(8, 8)}) for _ in range(2)])
        self.proj = nn.Sequential(nn.Linear(8, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv["proj"](self.tokens["proj"](ids).transpose(1, 2)).transpose(1, 2)
        x = self.steps(self.block["0"](self.block["proj"](x).tanh()))
        for block in self.blocks:
            x = block["proj"](x).tanh()
        y: Tensor = self.proj(x)
        return y


LAYERS = ["block.proj", "block.0", "steps.0", "steps.2", "blocks.0.proj", "blocks.1.proj", "proj.0"]
SOME = [list(c) for n in (1, 2, 7) for c in itertools.combinations(LAYERS, n)]


@pytest.mark.parametrize("layers", SOME, ids=", ".join)
def test_other_kinds_of_layers_of_the_same_name_get_no_adapter_in_peft(
    layers: list[str], tmp_path: Path
) -> None:
    def chosen(name: str, _: nn.Module) -> bool:
        return name in layers

    model = randomize(minilora.inject(Both(), r=2, targets=chosen)).eval()
    assert set(base_modules(model)) == {name for name, _ in Both().named_modules() if name}
    path = minilora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Both(), path).eval()
    found = [n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert sorted(found) == sorted(layers)
    ids = torch.arange(12).view(2, 6)
    assert (theirs(ids) - model(ids)).abs().max() < 1e-5
    assert adapters_of(minilora.load_adapter(Both(), path)).keys() == set(layers)


def test_the_language_model_of_a_vision_model_is_named_without_its_tower(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="a model of its is needed")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text: dict[str, Any] = {
        **sizes,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 3, 3],
    }
    tower = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=tower)

    def make() -> Any:
        torch.manual_seed(0)
        return transformers.Qwen2VLForConditionalGeneration(config)

    def of_the_text(name: str, _: nn.Module) -> bool:
        return "language_model" in name

    model = randomize(minilora.inject(make(), r=2, targets=of_the_text)).eval()
    theirs = peft.PeftModel.from_pretrained(make(), minilora.save_adapter(model, tmp_path)).eval()
    named = theirs.base_model.model.named_modules()
    assert {n for n, m in named if hasattr(m, "lora_A")} == adapters_of(model).keys()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        found, expected = (m(input_ids=ids).logits for m in (theirs, model))
    assert (found - expected).abs().max() < 1e-5
