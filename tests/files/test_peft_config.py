"""adapter_config.json: what is written, and which options are read, harmless or refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from minilora.files.peft_config import make_config, read_config
from minilora.files.peft_values import ConfigReader

# What a plain adapter says of itself.
OWN = {"r": 1, "lora_alpha": 2.0, "lora_dropout": 0.0}

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none"}


def written(folder: Path, **options: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(PLAIN | options))
    return path


def test_only_an_option_that_changes_the_function_is_refused(tmp_path: Path) -> None:
    harmless = {"task_type": "CAUSAL_LM", "target_modules": ["up"], "layers_to_transform": [1]}
    unset = {"use_dora": False, "bias": "none", "an option of tomorrow": None}
    assert read_config(written(tmp_path, **harmless, **unset), OWN) == PLAIN | harmless | unset

    path = written(tmp_path, use_dora=True, use_qalora=True, **harmless)
    with pytest.raises(ValueError, match=r"support: use_dora=True, use_qalora=True") as error:
        read_config(path, OWN)
    assert str(path) in str(error.value)


def test_every_default_of_peft_is_accepted(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the defaults in question are those of peft")
    config = peft.LoraConfig(target_modules=["up"])
    options = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if isinstance(getattr(config, field.name), str | int | float | bool | None)
    }
    options["peft_type"] = "LORA"
    assert read_config(written(tmp_path, **options), OWN)["r"] == config.r


def test_a_variant_and_its_config_have_to_agree(tmp_path: Path) -> None:
    variant = {**OWN, "use_dora": True}
    assert read_config(written(tmp_path, use_dora=True), variant)["use_dora"] is True
    with pytest.raises(ValueError, match="not of that class of adapter: no use_dora=True"):
        read_config(written(tmp_path), variant)
    with pytest.raises(ValueError, match="does not support: use_rslora=True"):
        read_config(written(tmp_path, use_dora=True, use_rslora=True), variant)


@pytest.mark.parametrize(
    ("layer", "alpha"),
    [("up", 1.0), ("a.up", 2.0), ("b.a.up", 2.0), ("ba.up", 3.0), ("a.up.down", 4.0)],
)
def test_the_first_pattern_that_matches_the_end_of_a_name_gives_its_alpha(
    layer: str, alpha: float
) -> None:
    config = {"alpha_pattern": {"^up": 1, "a.up": 2, "up": 3}, "lora_alpha": 4}
    assert ConfigReader(config).alpha(layer) == alpha


def adapter(r: int, alpha: float) -> dict[str, Any]:
    return {"r": r, "lora_alpha": alpha, "lora_dropout": 0.0}


def test_ranks_and_alphas_that_differ_from_the_first_become_patterns() -> None:
    adapters = {"a.up": adapter(2, 4.0), "up": adapter(3, 4.0), "down": adapter(2, 1.0)}
    config = make_config(nn.Module(), adapters, adapters.keys())
    assert (config["r"], config["lora_alpha"]) == (2, 4.0)
    assert config["rank_pattern"] == {"^up": 3}
    assert config["alpha_pattern"] == {"^down": 1.0}
    said = ConfigReader(config)
    assert said.alpha("down") == 1.0 and said.alpha("a.up") == 4.0
    assert [said.rank(name) for name in adapters] == [2, 3, 2]


def test_adapters_that_differ_in_what_a_config_says_once_are_refused() -> None:
    adapters = {"up": adapter(2, 4.0), "down": adapter(2, 4.0) | {"lora_dropout": 0.1}}
    with pytest.raises(ValueError, match=r"lora_dropout is 0.1 for down and 0.0 for up"):
        make_config(nn.Module(), adapters, adapters.keys())
    adapters = {"up": adapter(2, 4.0), "down": adapter(2, 4.0) | {"lora_bias": True}}
    with pytest.raises(ValueError, match="lora_bias is True for down and None for up"):
        make_config(nn.Module(), adapters, adapters.keys())
