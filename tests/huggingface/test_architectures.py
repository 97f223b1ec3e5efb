"""Many architectures of transformers, dense and in NF4: all of it works, or is refused by name.

`make test` takes a sample; `make soak` every architecture, and compares the table in the docs.
"""

import random
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the models are transformers'")
pytest.importorskip("peft", reason="peft reads the adapters too: pip install -e .[dev]")

from architecture_table import PAGE, row_of, table
from architectures import ARCHITECTURES, tiny_model
from journey import Journey, travel
from torch import nn

import minilora

# Those that have something of their own to be refused or warned of, and some of each kind.
ALWAYS = (
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "MixtralForCausalLM",
    "MambaForCausalLM",
    "RwkvForCausalLM",
    "WavLMForCTC",
    "SiglipVisionModel",
    "BartForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
)
KINDS = sorted({architecture.kind for architecture in ARCHITECTURES.values()})


def sample(per_kind: int = 1) -> list[str]:
    """The same for every run: names and workers have to agree on it."""
    choice = random.Random(13)
    found = set(ALWAYS)
    for kind in KINDS:
        names = sorted(n for n, a in ARCHITECTURES.items() if a.kind == kind and n not in found)
        found |= {*choice.sample(names, min(per_kind, len(names)))}
    return [name for name in ARCHITECTURES if name in found]


def check(name: str, quantized: bool, folder: Path) -> Journey:
    journey = travel(name, quantized, folder)
    assert journey.complete or journey.refused
    assert journey.layers or not journey.complete
    return journey


def stored_rows() -> dict[str, str]:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {row.split("`")[1]: row for row in rows}


@pytest.mark.parametrize("name", sample())
def test_a_sample_works_or_is_refused_by_name(name: str, tmp_path: Path) -> None:
    dense, quantized = (check(name, q, tmp_path) for q in (False, True))
    assert row_of(dense, quantized) == stored_rows()[name]


@pytest.mark.soak
def test_every_architecture_works_or_is_refused_by_name(tmp_path: Path) -> None:
    """The page says what happened; `python tests/tools/architecture_table.py` writes it."""
    assert len(ARCHITECTURES) >= 62
    assert table(tmp_path) == PAGE.read_text()


def test_the_page_has_every_architecture() -> None:
    assert list(stored_rows()) == list(ARCHITECTURES)


# The experts of Switch Transformers are linear layers.
MIXTURES = [
    name
    for name, architecture in ARCHITECTURES.items()
    if architecture.kind == "mixture of experts" and not name.startswith("Switch")
]


OWN_ROUTER = ("PhimoeForCausalLM", "Llama4ForCausalLM")


@pytest.mark.parametrize("name", MIXTURES)
def test_the_share_of_the_experts_is_said(name: str) -> None:
    model, _ = tiny_model(name)
    stacked = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
    parameters = {id(p): p.numel() for m in stacked for p in m.parameters() if p.ndim == 3}
    share = sum(parameters.values()) / sum(p.numel() for p in model.parameters())
    assert share > 0.3

    said = re.escape(f"{share:.0%} of the parameters")
    # A router of a class of its own is refused before.
    exclude = ["router"] if name in OWN_ROUTER else []
    for call in (minilora.plan, minilora.quantize, minilora.inject):
        with pytest.raises(ValueError, match=said):
            call(tiny_model(name)[0], exclude=exclude, strict=True)  # type: ignore[operator]
    with pytest.warns(UserWarning, match=said):
        assert minilora.plan(model, exclude=exclude).unreached == sum(parameters.values())
    with pytest.warns(UserWarning, match=said):
        minilora.quantize(model, exclude=exclude)
    with pytest.warns(UserWarning, match=said):
        minilora.inject(model, r=1, exclude=exclude)


HEADS = {
    "LlamaForCausalLM": {"lm_head"},
    "ElectraForPreTraining": {"discriminator_predictions.dense_prediction"},
    "BertForMaskedLM": {"cls.predictions.decoder"},
    "BertForSequenceClassification": {"classifier"},
    "LlamaForSequenceClassification": {"score"},
    "ViTForImageClassification": {"classifier"},
    "RwkvForCausalLM": {"head"},
    "WhisperForConditionalGeneration": {"proj_out"},
    "BioGptForCausalLM": {"output_projection"},
    "XLNetLMHeadModel": {"lm_loss"},
    "DistilBertForMaskedLM": {"vocab_projector"},
}


@pytest.mark.filterwarnings("ignore:.*of the parameters are matrices outside of:UserWarning")
@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_left_out_whatever_its_name(name: str) -> None:
    model, _ = tiny_model(name)
    adapted = {row.name for row in minilora.plan(model).rows}
    left = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - adapted
    assert HEADS[name] <= left
    # Whoever names a head means it.
    head = sorted(HEADS[name])[0]
    minilora.inject(model, r=1, targets=[head])
    found: Any = model.get_submodule(head)
    assert isinstance(found, minilora.LoRALinear)


def test_the_oracle_of_the_matrix_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that adds a little more than it should is found at the first station."""
    forward = minilora.LoRA.forward
    monkeypatch.setattr(minilora.LoRA, "forward", lambda self, x: forward(self, x) + 1e-6)
    with pytest.raises(AssertionError, match="inject changes the output"):
        travel("LlamaForCausalLM", False, tmp_path)
