"""What "all-linear" leaves out: heads, whatever their name; and what is no linear layer at all."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minilora
from minilora.targets import (
    adapted_layers,
    heads,
    kept_in_float32,
    linear_layers,
    unreached_matrices,
)

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
}


def transformers_model(config: str, kind: str, **options: Any) -> Any:
    import transformers

    made = getattr(transformers, config)(**SMALL | options)
    return getattr(transformers, kind)(made)


# A model, and the heads that "all-linear" leaves out.
HEADS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "llama": (lambda: transformers_model("LlamaConfig", "LlamaForCausalLM"), {"lm_head"}),
    "llama, tied": (
        lambda: transformers_model("LlamaConfig", "LlamaForCausalLM", tie_word_embeddings=True),
        {"lm_head"},
    ),
    "llama, classifier": (
        lambda: transformers_model("LlamaConfig", "LlamaForSequenceClassification"),
        {"score"},
    ),
    "llama without a head": (lambda: transformers_model("LlamaConfig", "LlamaModel"), set()),
    "bert, classifier": (
        lambda: transformers_model("BertConfig", "BertForSequenceClassification"),
        {"classifier"},
    ),
    "bert, questions": (
        lambda: transformers_model("BertConfig", "BertForQuestionAnswering"),
        {"qa_outputs"},
    ),
    "bert, masked": (
        lambda: transformers_model("BertConfig", "BertForMaskedLM"),
        {"cls.predictions.decoder", "cls.predictions.transform.dense"},
    ),
    "bert without a head": (lambda: transformers_model("BertConfig", "BertModel"), set()),
    "whisper, classifier": (
        lambda: transformers_model(
            "WhisperConfig",
            "WhisperForAudioClassification",
            d_model=16,
            encoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=32,
        ),
        {"classifier", "projector"},
    ),
    "behind a wrapper": (
        lambda: nn.DataParallel(transformers_model("BertConfig", "BertForSequenceClassification")),
        {"module.classifier"},
    ),
    "vit": (
        lambda: transformers_model(
            "ViTConfig", "ViTForImageClassification", image_size=16, patch_size=8
        ),
        {"classifier"},
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_all_linear_means_every_linear_layer_but_the_heads(case: str) -> None:
    make, expected = HEADS[case]
    every = set(linear_layers(make()))
    assert heads(make()) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(adapted_layers(minilora.inject(make(), r=2))) == every - expected
        quantized = minilora.quantize(make())
    in_4_bits = {n for n, m in quantized.named_modules() if isinstance(m, minilora.NF4Linear)}
    assert in_4_bits == every - expected


class Tied(nn.Module):
    """Nothing of transformers': a projection that shares the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.unembed = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)
        self.unembed.weight = self.embed.weight


class Tells(nn.Module):
    """A model that tells its output embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.to_words = nn.Linear(8, 8), nn.Linear(8, 9)

    def get_output_embeddings(self) -> nn.Module:
        return self.to_words


def test_a_head_is_known_by_what_it_is() -> None:
    assert heads(Tied()) == {"unembed"}
    assert heads(Tells()) == {"to_words"}
    assert heads(nn.Sequential(nn.Linear(8, 8))) == set()
    # Whoever names a head means it.
    assert set(adapted_layers(minilora.inject(Tells(), r=2, targets="to_words"))) == {"to_words"}
    assert type(minilora.quantize(Tells(), ["up", "to_words"]).to_words) is minilora.NF4Linear


def test_what_transformers_keeps_in_float32_is_not_quantized_but_adapted() -> None:
    import transformers

    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    model = transformers.T5ForConditionalGeneration(config)
    kept = kept_in_float32(model)
    assert {name.rpartition(".")[2] for name in kept} == {"wo"}
    quantized = {n for n, m in minilora.quantize(model).named_modules() if hasattr(m, "packed")}
    assert quantized and not quantized & kept
    assert kept < set(adapted_layers(minilora.inject(model, r=2)))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = (
            nn.Parameter(torch.randn(4, 16, 8)),
            nn.Parameter(torch.randn(4, 8, 8)),
        )


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.experts, self.conv = nn.Linear(8, 8), Experts(), nn.Conv1d(8, 8, 3)
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.q_proj(x)
        return y


@pytest.mark.parametrize(
    ("call", "done"), [(minilora.quantize, "quantized"), (minilora.inject, "adapted")]
)
def test_experts_are_counted_and_named(call: Any, done: str) -> None:
    model = Mixture()
    assert set(unreached_matrices(model)) == {"experts.gate_up", "experts.down"}
    count = sum(p.numel() for p in model.parameters())
    share = sum(p.numel() for p in unreached_matrices(model).values()) / count
    names = r"experts\.gate_up, experts\.down \(2 in all\)"
    message = rf"^{share:.0%} of the parameters are matrices .* are not {done}: {names}"
    with pytest.warns(UserWarning, match=message) as caught:
        call(model)
    assert caught[0].filename == __file__, "the warning should point at the caller"

    fresh = Mixture()
    keys = list(fresh.state_dict())
    with pytest.raises(ValueError, match=message):
        call(fresh, strict=True)
    assert list(fresh.state_dict()) == keys
    # Whoever names the layers knows.
    call(Mixture(), targets="q_proj", strict=True)


def test_the_share_is_the_same_after_quantizing() -> None:
    model = Mixture()
    with pytest.warns(UserWarning) as first:
        minilora.quantize(model)
    with pytest.warns(UserWarning) as second:
        minilora.inject(model, r=2)
    assert str(first[0].message)[:4] == str(second[0].message)[:4]


class DbrxExpertGLU(nn.Module):
    """The weights of all experts in one matrix, [experts * out, in], as DBRX has them."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w1_bias = nn.Parameter(torch.randn(32, 8)), nn.Parameter(torch.randn(4, 8))


def test_experts_in_one_matrix_and_conv1d_are_counted_and_a_trifle_is_not_worth_a_word() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"q": nn.Linear(8, 8), "ffn": DbrxExpertGLU(), "c": Conv1D(8, 8)})
    assert set(unreached_matrices(model)) == {"ffn.w1", "c.weight"}
    with pytest.raises(ValueError, match="matrices outside of linear layers"):
        minilora.inject(model, r=2, strict=True)

    model = nn.ModuleDict({"q": nn.Linear(64, 64), "bilinear": nn.Bilinear(2, 2, 2)})
    assert set(unreached_matrices(model)) == {"bilinear.weight"}
    minilora.inject(model, r=2, strict=True)
