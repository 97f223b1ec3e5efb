"""How long a sequence a model was made for, and that longer ones are refused."""

from types import SimpleNamespace
from typing import Any

import pytest

from minilora.huggingface.context import check_max_length, context_length

transformers = pytest.importorskip("transformers", reason="the configs are transformers'")

SCALED = {"factor": 4.0, "rope_theta": 1e4}
LLAMA = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def nested_config() -> Any:
    """An image and text model, whose positions are those of its text model."""
    config = transformers.Gemma3Config()
    config.text_config.max_position_embeddings = 300
    return config


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.LlamaConfig(max_position_embeddings=256), 256),
        (transformers.GPT2Config(n_positions=64), 64),
        (transformers.MptConfig(max_seq_len=100), 100),
        (transformers.BloomConfig(), None),
        (nested_config(), 300),
        (
            transformers.LlamaConfig(
                max_position_embeddings=256, rope_parameters=SCALED | {"rope_type": "linear"}
            ),
            1024,
        ),
        # Qwen states what it was trained on, and scales it; Llama 3 states what it was scaled to.
        (
            transformers.Qwen2Config(
                max_position_embeddings=256,
                rope_parameters=SCALED
                | {"rope_type": "yarn", "original_max_position_embeddings": 256},
            ),
            1024,
        ),
        (
            transformers.LlamaConfig(
                max_position_embeddings=131072,
                rope_parameters=LLAMA
                | {"rope_type": "llama3", "original_max_position_embeddings": 8192},
            ),
            131072,
        ),
        (SimpleNamespace(max_position_embeddings="many", n_positions=-1), None),
        (SimpleNamespace(max_position_embeddings=9, rope_scaling={"factor": float("inf")}), 9),
        (SimpleNamespace(max_position_embeddings=9, rope_scaling=[4]), 9),
        (
            SimpleNamespace(
                max_position_embeddings=9,
                rope_parameters={"full": {"factor": 2.0}, "sliding": {"rope_type": "default"}},
            ),
            18,
        ),
    ],
)
def test_the_context_is_what_the_config_says(config: Any, expected: int | None) -> None:
    assert context_length(config) == expected


def test_longer_sequences_than_the_context_are_refused() -> None:
    config = transformers.LlamaConfig(max_position_embeddings=256)
    check_max_length(config, 256, "my-model")
    check_max_length(transformers.BloomConfig(), 10**9, "my-model")
    with pytest.raises(ValueError, match=r"max_length=257 .* context of my-model, 256 tokens: set"):
        check_max_length(config, 257, "my-model")
