"""Named shapes are the models that they are called after."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import minilora
from minilora.huggingface.loading import empty_model
from minilora.reports.shapes import SHAPES, is_shape, shape_config

pytest.importorskip("transformers", reason="the shapes are models of transformers'")

# Parameters, as the models' cards and safetensors indices give them.
PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama": 1_100_048_384,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}

# Building a model with empty weights takes a second for every 50 blocks or so.
SAMPLE = ["llama-3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b", "smollm2-135m", "tinyllama"]


def test_every_shape_has_a_published_size() -> None:
    assert set(PARAMETERS) == set(SHAPES)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SAMPLE else pytest.mark.soak)
        for name in sorted(SHAPES)
    ],
)
def test_a_shape_has_as_many_parameters_as_its_model(name: str) -> None:
    assert sum(p.numel() for p in empty_model(shape_config(name)).parameters()) == PARAMETERS[name]


def test_a_shape_is_planned_as_the_config_that_it_is() -> None:
    by_name = minilora.plan("SmolLM2-135M", r=4, batch_size=2, length=64)
    by_config = minilora.plan(shape_config("smollm2-135m"), r=4, batch_size=2, length=64)
    assert by_name.model == "SmolLM2-135M"
    assert (by_name.bytes, by_name.rows) == (by_config.bytes, by_config.rows)


def test_a_folder_is_preferred_to_a_shape_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Callable[..., Any]
) -> None:
    tiny_llama().save_pretrained(tmp_path / "tinyllama")
    monkeypatch.chdir(tmp_path)
    assert minilora.plan("tinyllama").parameters == sum(
        p.numel() for p in tiny_llama().parameters()
    )


def test_a_name_that_is_nearly_one_is_answered_with_those_that_are() -> None:
    assert is_shape("Llama-65B") and not is_shape("llama-60b") and not is_shape(3)
    with pytest.raises(ValueError, match="llama-65b"):
        shape_config("llama-66b")
    with pytest.raises(ValueError, match=r"did you mean llama-65b.*, and llama-66b cannot be"):
        minilora.plan("llama-66b")
    with pytest.raises(ValueError, match=r"did you mean llama-3-8b\?\), and meta-llama/Meta"):
        minilora.plan("meta-llama/Meta-Llama-3-8B")


def test_a_folder_that_is_there_is_not_taken_for_a_misspelt_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama-66b").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^llama-66b/config\.json does not exist"):
        minilora.plan("llama-66b")
