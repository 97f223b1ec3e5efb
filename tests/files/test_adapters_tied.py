"""Whole parameters of a model whose head is its embedding: both directions, against peft."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import WEIGHTS, contents
from helpers import same_bits, snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor

import minilora

peft = pytest.importorskip("peft", reason="peft is the oracle here: pip install -e .[dev]")
transformers = pytest.importorskip("transformers", reason="its models tie their embeddings")

pytestmark = [
    # What save_adapter says of whole parameters is tested in test_peft_limits.py.
    pytest.mark.filterwarnings("ignore:vLLM and llama.cpp do not serve:UserWarning"),
    # PEFT says what it does with tied weights.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying:UserWarning"),
]

# Logits of sums of 32 terms near one, behind two layers, in float32.
TOLERANCE = 1e-5
IDS = torch.arange(24).view(2, 12) * 5 % 64


def make(tied: bool = True, vocabulary: int = 64) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
    config = transformers.LlamaConfig(
        **sizes, **heads, vocab_size=vocabulary, tie_word_embeddings=tied
    )
    return transformers.LlamaForCausalLM(config).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(IDS).logits
    return out


def trained(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def close(found: Any, expected: Any) -> None:
    assert (logits(found) - logits(expected)).abs().max() < TOLERANCE
    assert (logits(make()) - logits(expected)).abs().max() > 0.1, "nothing is compared"


PEFT: dict[str, dict[str, Any]] = {
    "the head": {"modules_to_save": ["lm_head"]},
    "the embedding": {"modules_to_save": ["embed_tokens"]},
    "both, each its own": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "both, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "the head and a norm": {"modules_to_save": ["lm_head", "model.norm"]},
    "an adapter on the head": {"target_modules": ["q_proj", "lm_head"]},
    "an adapter on the head, the embedding whole": {
        "target_modules": ["q_proj", "lm_head"],
        "modules_to_save": ["embed_tokens"],
    },
}


@pytest.mark.parametrize("case", PEFT)
def test_what_peft_saved_computes_the_same_here_and_goes_back(case: str, tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | PEFT[case]
    theirs = trained(peft.get_peft_model(make(), peft.LoraConfig(**options)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = minilora.load_adapter(make(), tmp_path / "theirs")
    close(ours, theirs)

    path = minilora.save_adapter(ours, tmp_path / "ours")
    close(peft.PeftModel.from_pretrained(make(), path), theirs)
    assert same_bits(logits(minilora.load_adapter(make(), path)), logits(ours))

    with minilora.disabled(ours):
        assert same_bits(logits(ours), logits(make()))
    minilora.eject(ours)
    assert same_bits(logits(ours), logits(make()))
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


OURS = [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], ["norm", "lm_head"]]


@pytest.mark.parametrize("also", OURS, ids=", ".join)
@pytest.mark.parametrize("targets", ["q_proj", "all-linear", ["q_proj", "lm_head"]], ids=str)
def test_what_minilora_saved_computes_the_same_in_peft(
    targets: Any, also: list[str], tmp_path: Path
) -> None:
    model = trained(minilora.inject(make(), r=2, targets=targets, train_also=also))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    path = minilora.save_adapter(model, tmp_path / "a")
    close(peft.PeftModel.from_pretrained(make(), path), model)

    fresh = minilora.load_adapter(make(), path)
    assert same_bits(logits(fresh), logits(model))
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    again = minilora.save_adapter(fresh, tmp_path / "b")
    assert contents(again)[:2] == contents(path)[:2]

    minilora.load_adapter(model, path)
    assert same_bits(logits(fresh), logits(model))
    with minilora.disabled(fresh):
        assert same_bits(logits(fresh), logits(make()))


def test_an_embedding_with_more_rows_comes_with_the_adapter(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(66)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        trained(peft.get_peft_model(model, config)).save_pretrained(tmp_path / "adapter")

    def resized() -> Any:
        other = make()
        torch.manual_seed(5)
        other.resize_token_embeddings(66)
        return other

    ours = minilora.load_adapter(resized(), tmp_path / "adapter")
    assert (logits(ours) - logits(model)).abs().max() < TOLERANCE
    assert ours.lm_head.weight is ours.model.embed_tokens.weight

    # PEFT loads it into what both share, under either name.
    file = tmp_path / "adapter" / WEIGHTS
    tensors = load_file(file)
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, file)
    theirs = peft.PeftModel.from_pretrained(resized(), tmp_path / "adapter")
    ours = minilora.load_adapter(resized(), tmp_path / "adapter")
    assert (logits(ours) - logits(theirs)).abs().max() < TOLERANCE
    assert (logits(ours) - logits(model)).abs().max() < TOLERANCE


def test_an_adapter_with_a_whole_head_is_swapped_and_refused_where_it_has_less(
    tmp_path: Path,
) -> None:
    paths = {}
    for also in ((), ("lm_head",)):
        model = trained(minilora.inject(make(), r=2, targets="q_proj", train_also=also))
        paths[also] = minilora.save_adapter(model, tmp_path / f"with {len(also)}")
        expected = logits(model)

    swapped = minilora.load_adapter(make(), paths[()])
    minilora.load_adapter(swapped, paths[("lm_head",)])
    assert same_bits(logits(swapped), expected)
    before = snapshot(swapped)
    with pytest.raises(ValueError, match=r"nothing for lm_head.weight, which the model trains as"):
        minilora.load_adapter(swapped, paths[()])
    assert snapshot(swapped) == before
    assert same_bits(logits(minilora.eject(swapped)), logits(make()))


def test_weights_that_peft_does_not_tie_are_read_as_the_file_says(tmp_path: Path) -> None:
    # T5's embedding has four names, and ensure_weight_tying ties none of them to its copy.
    def t5() -> Any:
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32}
        config = transformers.T5Config(**sizes, num_layers=1, num_heads=2, decoder_start_token_id=0)
        return transformers.T5ForConditionalGeneration(config).eval()

    def output(model: Any) -> Tensor:
        ids = torch.arange(8).reshape(1, 8)
        with torch.no_grad():
            out: Tensor = model(input_ids=ids, decoder_input_ids=ids).logits
        return out

    config = peft.LoraConfig(
        r=2, target_modules=["q"], modules_to_save=["shared"], ensure_weight_tying=True
    )
    theirs = trained(peft.get_peft_model(t5(), config))
    theirs.save_pretrained(tmp_path)
    ours = minilora.load_adapter(t5(), tmp_path)
    assert (output(ours) - output(theirs)).abs().max() < TOLERANCE
    assert (output(t5()) - output(theirs)).abs().max() > 0.1
    with minilora.disabled(ours):
        assert torch.equal(output(ours), output(t5()))
