"""Options of a LoraConfig together, both directions; PEFT trains, saves and loads: the oracle."""

import itertools
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import CONFIG, WEIGHTS, adapters_of, contents
from helpers import same_bits, snapshot
from torch import nn
from two_blocks import X, make, output, trained

import minilora

peft = pytest.importorskip("peft", reason="peft is the oracle here: pip install -e .[dev]")
pytest.importorskip("transformers", reason="peft needs it")

pytestmark = [
    # What save_adapter says of whole parameters and patterns is tested in test_peft_limits.py.
    pytest.mark.filterwarnings("ignore:vLLM and llama.cpp do not serve:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*rank:UserWarning"),
    # What PEFT says of options that mean nothing in this model.
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*exclude_modules:UserWarning"),
]

TOLERANCE = 1e-5


def close(found: Any, expected: Any) -> None:
    assert (output(found) - output(expected)).abs().max() < TOLERANCE
    assert (output(make()) - output(expected)).abs().max() > 100 * TOLERANCE, "nothing is compared"


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "targets": [
        {"target_modules": ["up", "down", "head"]},
        {"target_modules": r"model\.layers\.\d\.(up|down)"},
        {"target_modules": "all-linear", "exclude_modules": ["1.down"]},
        {"target_modules": ["up", "down"], "layers_to_transform": [1]},
        {"target_modules": ["up"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["up", "layers.0.down"], "exclude_modules": r".*\.1\.up"},
    ],
    "ranks": [
        {"r": 2},
        {"r": 16, "lora_alpha": 5},
        {"r": 3, "rank_pattern": {"layers.1.up": 2, "down": 5}},
        {"r": 3, "alpha_pattern": {"^model.layers.0.up": 7, "head": 1}, "rank_pattern": {"up": 1}},
    ],
    "scaling": [{}, {"use_rslora": True}, {"lora_bias": True}],
    "bias": [{}, {"bias": "all"}, {"bias": "lora_only"}],
    "whole": [{}, {"modules_to_save": ["norm"]}, {"modules_to_save": ["1.norm", "layers.0.down"]}],
}
ALL = [
    dict(itertools.chain(*(c.items() for c in case)))
    for case in itertools.product(*OPTIONS.values())
]
SAMPLE = random.Random(0).sample(range(len(ALL)), 60)
CASES = [pytest.param(i, marks=() if i in SAMPLE else pytest.mark.soak) for i in range(len(ALL))]


# PEFT says that a pattern matches no layer that has an adapter, and that a merge won't be possible.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*merging LoRA weights won't be possible:UserWarning")
@pytest.mark.parametrize("index", CASES)
def test_options_together_compute_the_same_in_both_directions(index: int, tmp_path: Path) -> None:
    options = ALL[index]
    theirs = trained(peft.get_peft_model(make(), peft.LoraConfig(**options)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = minilora.load_adapter(make(), tmp_path / "theirs")
    close(ours, theirs)
    count = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in theirs.parameters() if p.requires_grad)

    path = minilora.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make(), path, is_trainable=True)
    close(back, theirs)
    fresh = minilora.load_adapter(make(), path)
    assert same_bits(output(fresh), output(ours))
    assert [p.requires_grad for p in fresh.parameters()] == [
        p.requires_grad for p in ours.parameters()
    ]
    assert minilora.save_adapter(fresh, tmp_path / "again")
    assert contents(tmp_path / "again")[1] == contents(path)[1]

    with minilora.disabled(ours):
        assert same_bits(output(ours), output(make()))
    assert same_bits(output(minilora.eject(ours)), output(make()))


# Odd and possible.
EDGES: dict[str, dict[str, Any]] = {
    "an entry that is the end of names": {"target_modules": ["up"], "modules_to_save": ["orm"]},
    "a block whole, with layers that are named": {
        "target_modules": ["up", "down"],
        "modules_to_save": ["layers.0"],
    },
    "a block whole, and all biases": {
        "target_modules": ["up"],
        "bias": "all",
        "modules_to_save": ["layers.0"],
    },
    "a layer that is named and whole": {
        "target_modules": ["up", "head"],
        "modules_to_save": ["head"],
    },
    "a module that is not there": {"target_modules": ["up"], "modules_to_save": ["classifier"]},
    "all-linear in capitals": {"target_modules": "ALL-LINEAR"},
    "a full name, in spite of the blocks": {
        "target_modules": ["model.layers.0.up"],
        "layers_to_transform": [1],
    },
    "several names for blocks": {
        "target_modules": ["up"],
        "layers_to_transform": [0],
        "layers_pattern": ["blocks", "layers"],
    },
    "an empty name for blocks": {
        "target_modules": ["up"],
        "layers_to_transform": [1],
        "layers_pattern": [],
    },
    "ties where nothing is tied": {"target_modules": ["up"], "ensure_weight_tying": True},
    "rsLoRA, a bias of B and all others": {
        "target_modules": ["up"],
        "lora_bias": True,
        "use_rslora": True,
        "bias": "all",
    },
    "an orthogonal start": {"target_modules": ["up"], "init_lora_weights": "orthogonal", "r": 4},
    "a gaussian start": {"target_modules": ["up"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("case", EDGES)
def test_odd_options_compute_the_same_in_both_directions(case: str, tmp_path: Path) -> None:
    theirs = trained(peft.get_peft_model(make(), peft.LoraConfig(**EDGES[case])))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = minilora.load_adapter(make(), tmp_path / "theirs")
    close(ours, theirs)
    path = minilora.save_adapter(ours, tmp_path / "ours")
    close(peft.PeftModel.from_pretrained(make(), path), theirs)
    assert same_bits(output(minilora.load_adapter(make(), path)), output(ours))


def test_whole_modules_inside_each_other_are_refused_as_peft_cannot_read_them(
    tmp_path: Path,
) -> None:
    config = peft.LoraConfig(target_modules=["up"], modules_to_save=["layers.0.norm", "layers.0"])
    trained(peft.get_peft_model(make(), config)).save_pretrained(tmp_path)
    with pytest.raises(KeyError):
        peft.PeftModel.from_pretrained(make(), tmp_path)
    with pytest.raises(ValueError, match=r"model.layers.0 and model.layers.0.norm inside of it"):
        minilora.load_adapter(make(), tmp_path)


# What no module of modules_to_save can name: parts of a module, names that are the ends of others,
# modules with adapters inside, layers that have an adapter themselves.
WHOLE: dict[str, list[str]] = {
    "a bias alone": ["layers.0.norm.bias"],
    "a name that others end in": ["norm"],
    "the root's norm": ["norm.weight"],
    "parameters of a block": ["layers.0.gain", "layers.1.gain"],
    "a parameter of the model": ["scale"],
    "the weight of an adapted layer": ["layers.0.up"],
    "the bias of an adapted layer": ["layers.1.up.bias"],
    "all biases": ["bias"],
    "a head without an adapter": ["head"],
    "all of a block": ["layers.0"],
    "a block and what is in it": ["layers.1", "layers.1.norm", "layers.0.norm"],
}


@pytest.mark.parametrize("case", WHOLE)
def test_whatever_is_trained_whole_is_the_same_in_peft(case: str, tmp_path: Path) -> None:
    names = WHOLE[case]
    if names == ["bias"]:
        names = [name for name, _ in make().named_parameters() if name.endswith("bias")]
    model = trained(minilora.inject(make(), r=2, targets=["up", "down"], train_also=names))
    path = minilora.save_adapter(model, tmp_path)
    close(peft.PeftModel.from_pretrained(make(), path), model)
    close(minilora.load_adapter(make(), path), model)


def test_the_option_bias_says_which_biases_are_trained(tmp_path: Path) -> None:
    def option(names: list[str]) -> str:
        model = minilora.inject(make(), r=2, targets=["up", "down"], train_also=names)
        said: str = json.loads((minilora.save_adapter(model, tmp_path) / CONFIG).read_text())[
            "bias"
        ]
        return said

    every = [name for name, _ in make().named_parameters() if name.endswith("bias")]
    assert option(every) == "all"
    assert option(["layers.0.up.bias", "layers.1.up.bias"]) == "lora_only"
    assert option(["layers.0.norm", "head"]) == "none"


def test_a_buffer_that_changed_is_refused_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    def normed() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).eval()

    model = peft.get_peft_model(
        normed(), peft.LoraConfig(target_modules=["0"], modules_to_save=["1"])
    )
    trained(model).save_pretrained(tmp_path / "same")
    ours = minilora.load_adapter(normed(), tmp_path / "same")
    assert (output(ours) - output(model)).abs().max() < TOLERANCE

    model.train()(X)
    model.save_pretrained(tmp_path / "moved")
    fresh = normed()
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=r"other values for 1.running_mean, a buffer"):
        minilora.load_adapter(fresh, tmp_path / "moved")
    assert snapshot(fresh) == before


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_converted_to_plain_lora_is_the_same_here(
    start: str, rslora: bool, tmp_path: Path
) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["up", "down"], init_lora_weights=start, use_rslora=rslora
    )
    model = peft.get_peft_model(make(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    trained(model)
    expected = output(model)
    with warnings.catch_warnings():
        # PEFT says that it reads two adapters at once.
        warnings.simplefilter("ignore")
        where = str(tmp_path / "start")
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=where)
    ours = minilora.load_adapter(make(), tmp_path / "out")
    assert (output(ours) - expected).abs().max() < TOLERANCE
    assert {adapter.r for adapter in adapters_of(ours).values()} == {4}

    model.save_pretrained(tmp_path / "unconverted")
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}' .*save it from PEFT"):
        minilora.load_adapter(make(), tmp_path / "unconverted")


def test_rs_lora_is_a_scaling_that_any_adapter_can_have(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["up"], use_rslora=True)
    trained(peft.get_peft_model(make(), config)).save_pretrained(tmp_path)
    for adapter in adapters_of(minilora.load_adapter(make(), tmp_path)).values():
        assert adapter.scale == pytest.approx(5 / 3**0.5, rel=1e-15)


def test_a_pickled_adapter_is_refused_with_the_way_out(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["up"])
    model = trained(peft.get_peft_model(make(), config))
    model.save_pretrained(tmp_path, safe_serialization=False)
    fresh = make()
    before = snapshot(fresh)
    with pytest.raises(FileNotFoundError, match=r"adapter_model.bin is a pickle.*save_pretrained"):
        minilora.load_adapter(fresh, tmp_path)
    assert snapshot(fresh) == before

    # The way out.
    peft.PeftModel.from_pretrained(make(), tmp_path).save_pretrained(tmp_path)
    close(minilora.load_adapter(make(), tmp_path), model)


def test_a_config_and_tensors_that_disagree_about_biases_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = trained(peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["up"])))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_bias": True}))
    with pytest.raises(ValueError, match=r"layers.0.up: the file has A .* the model .*B.bias"):
        minilora.load_adapter(make(), tmp_path)

    (tmp_path / CONFIG).write_text(json.dumps(config))
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.model.layers.0.up.base_layer.bias"
    save_file(tensors | {key: torch.ones(12)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"has model.layers.0.up.bias, which modules_to_save"):
        minilora.load_adapter(make(), tmp_path)
    # PEFT's copy of what the base has.
    save_file(tensors | {key: make().model.layers[0].up.bias.detach()}, tmp_path / WEIGHTS)
    assert not minilora.load_adapter(make(), tmp_path).model.layers[0].up.bias.requires_grad
