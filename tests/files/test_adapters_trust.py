"""Adapter files that somebody else wrote: they change what the config names, or nothing at all."""

import json
import os
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import CONFIG, WEIGHTS, randomize
from helpers import adapters_of, same_bits, snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minilora
from minilora.files.adapters import trained_on
from minilora.lora import LoRA

# What save_adapter says of whole parameters and patterns is tested in test_peft_limits.py.
pytestmark = pytest.mark.filterwarnings("ignore:vLLM and llama.cpp do not serve:UserWarning")


def base(quantized: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [("up", nn.Linear(8, 8)), ("norm", nn.LayerNorm(8)), ("down", nn.Linear(8, 8))]
    model = nn.Sequential(OrderedDict(layers))
    return minilora.quantize(model) if quantized else model


def saved(path: Path, model: nn.Module | None = None, **options: Any) -> Path:
    made = minilora.inject(base() if model is None else model, **{"r": 2, "alpha": 4.0} | options)
    return minilora.save_adapter(randomize(made), path)


def edit(
    path: Path, config: Mapping[str, Any] = {}, tensors: Mapping[str, Tensor | None] = {}
) -> Path:
    """Changes a folder and takes out the hashes, as in a file of PEFT's. None removes a tensor."""
    held = load_file(path / WEIGHTS) | {f"base_model.model.{k}": v for k, v in tensors.items()}
    save_file({key: tensor for key, tensor in held.items() if tensor is not None}, path / WEIGHTS)
    said = json.loads((path / CONFIG).read_text()) | config
    (path / CONFIG).write_text(json.dumps(said))
    return path


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def refused(model: nn.Module, path: Path, message: str, **options: Any) -> None:
    """Asserts that the folder is refused, and that nothing in the model has changed."""
    before, tensors = snapshot(model), values(model)
    said = [adapter.config() for adapter in adapters_of(model).values()]
    with pytest.raises(ValueError, match=message) as error:
        minilora.load_adapter(model, path, **options)
    assert str(path) in str(error.value) and str(error.value).isprintable()
    assert len(str(error.value)) < 2000
    assert snapshot(model) == before
    assert all(same_bits(tensor, tensors[key]) for key, tensor in model.state_dict().items())
    assert [adapter.config() for adapter in adapters_of(model).values()] == said


# What a file may not overwrite


@pytest.mark.parametrize("key", ["up.weight", "norm.weight", "down.bias"])
def test_a_parameter_that_the_config_does_not_name_is_not_overwritten(
    key: str, tmp_path: Path
) -> None:
    path = edit(saved(tmp_path), tensors={key: torch.zeros(base().get_parameter(key).shape)})
    refused(base(), path, f"the file has {key}, which modules_to_save does not name")


@pytest.mark.parametrize("key", ["packed", "absmax", "offset", "absmax2", "nf4_layout"])
def test_the_parts_of_a_quantized_weight_are_never_overwritten(key: str, tmp_path: Path) -> None:
    model = base(quantized=True)
    part = model.state_dict()[f"up.{key}"]
    path = edit(
        saved(tmp_path, base(quantized=True)),
        config={"modules_to_save": ["up"]},
        tensors={f"up.{key}": torch.zeros_like(part)},
    )
    refused(model, path, "part of a quantized weight|no parameter")


def test_the_parameters_of_another_adapter_are_never_overwritten(tmp_path: Path) -> None:
    path = edit(
        saved(tmp_path),
        config={"modules_to_save": ["up"]},
        tensors={"up.adapters.default.A": torch.zeros(2, 8)},
    )
    refused(minilora.inject(base(), r=2), path, "a parameter of an adapter")


def test_a_shared_parameter_with_two_values_is_refused(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = base()
        model.add_module("again", model.norm)
        return model

    path = edit(
        saved(tmp_path, tied(), train_also=["norm"]),
        config={"modules_to_save": ["norm", "again"]},
        tensors={"again.weight": torch.ones(8)},
    )
    refused(
        tied(), path, "norm.weight is shared, and the file has two values|again.weight is shared"
    )


# The model already has the adapter

BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "alpha is NaN": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "alpha is zero": ({"lora_alpha": 0}, "lora_alpha is 0, not a positive"),
    "alpha is negative": ({"lora_alpha": -1}, "lora_alpha"),
    "alpha is too large": ({"lora_alpha": 1e39}, "lora_alpha"),
    "alpha is huge": ({"lora_alpha": 10**400}, "lora_alpha"),
    "alpha is a text": ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    "alpha is true": ({"lora_alpha": True}, "lora_alpha is True"),
    "dropout": ({"lora_dropout": 1e9}, "lora_dropout is .*, not a probability"),
    "a second alpha": ({"alpha_pattern": {"up": 3, "down": float("inf")}}, "alpha_pattern"),
    "alphas in a list": ({"alpha_pattern": [3]}, r"alpha_pattern is \[3\], not a dict"),
    "a rank is a text": ({"rank_pattern": {"up": "2"}}, "rank_pattern"),
    "modules in a text": ({"modules_to_save": "norm"}, "modules_to_save is 'norm', not a list"),
    "targets in a dict": ({"target_modules": {"up": 1}}, "target_modules"),
    "another rank": ({"r": 3}, "up has r=3 in the config and r=2 in the tensors"),
    "another rank of one": ({"rank_pattern": {"down": 1}}, "down has r=1 in the config"),
    "fewer targets": ({"target_modules": ["up"]}, "an adapter for down, which target_modules"),
    "excluded": ({"exclude_modules": ["down"]}, "an adapter for down, which target_modules"),
    "a target is lost": ({"target_modules": "up|down|x"}, "the file has nothing for x"),
    "a saved module is lost": ({"modules_to_save": ["norm"]}, "the file has nothing for norm"),
    "escapes": ({"\x1b[2J\u202e": 1}, r"\\x1b\[2J\\u202e=1"),
    "a long text": ({"tomorrow": "a" * 100_000}, "tomorrow='aaa"),
}


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_config_that_contradicts_itself_or_the_tensors_changes_nothing(
    case: str, there: bool, tmp_path: Path
) -> None:
    config, message = BAD_VALUES[case]
    model = base()
    model.add_module("x", nn.Linear(8, 8))
    if there:
        minilora.inject(model, r=2, targets=["up", "down"])
    refused(model, edit(saved(tmp_path), config), message)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"down.lora_B.weight": torch.full((8, 2), float("nan"))}, "holds NaN or infinity"),
        ({"down.lora_A.weight": torch.full((2, 8), 1e300, dtype=torch.float64)}, "infinite in"),
        ({"down.lora_A.weight": torch.tensor(1.0)}, r"for down it has A \[\]"),
        ({"down.lora_A.weight": torch.ones(2, 8, dtype=torch.int32)}, "holds torch.int32"),
        ({"down.lora_A.weight": torch.ones(3, 8)}, "down: the file has A"),
        ({"down.lora_A.weight": None, "down.lora_B.weight": None}, "nothing for down"),
        ({"up.lora_C.weight": torch.ones(2)}, "C"),
        ({"norm.weight": torch.full((8,), float("inf"))}, "norm.weight: the file has NaN"),
        ({"norm.weight": torch.ones(8, dtype=torch.int64)}, "norm.weight: the file has torch.int"),
        ({"norm.weight": torch.ones(())}, r"norm.weight: the file has \[\]"),
        ({"b" * 5000: torch.ones(1)}, "a name of 5017 characters"),
        ({"base_model.model.up.lora_A.weight": torch.ones(2, 8)}, "twice"),
    ],
)
def test_bad_tensors_change_nothing(
    tensors: dict[str, Any], message: str, there: bool, tmp_path: Path
) -> None:
    model = minilora.inject(base(), r=2, train_also=["norm"]) if there else base()
    refused(model, edit(saved(tmp_path, train_also=["norm"]), tensors=tensors), message)


def test_an_adapter_is_overwritten_in_place(tmp_path: Path) -> None:
    """An optimizer that holds its parameters goes on."""
    path = saved(tmp_path, dropout=0.5)
    model = minilora.inject(base(), r=2)
    held = list(model.parameters())
    minilora.load_adapter(model, path)
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    adapters = adapters_of(model).values()
    assert [(adapter.alpha, adapter.dropout) for adapter in adapters] == [(4.0, 0.5)] * 2
    fresh = minilora.load_adapter(base(), path)
    assert all(map(same_bits, model.state_dict().values(), fresh.state_dict().values()))


def test_an_adapter_of_another_class_is_not_overwritten(tmp_path: Path) -> None:
    class Doubled(LoRA):
        @property
        def scale(self) -> float:
            return 2 * self.alpha / self.r

    model = minilora.inject(base(), r=2, adapter=Doubled)
    refused(model, saved(tmp_path), "the file has a LoRA, the model a Doubled")


def test_what_the_model_trains_as_a_whole_is_in_the_file(tmp_path: Path) -> None:
    model = minilora.inject(base(), r=2, train_also=["norm"])
    refused(model, saved(tmp_path), "nothing for norm.bias, which the model trains as a whole")


# Names


@pytest.mark.parametrize("name", ["\x1b[2J", "n" * 101, "\u202eabc"])
def test_an_adapter_of_an_unprintable_name_needs_another(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, name=name)
    refused(base(), path, "choose another with name=")
    assert minilora.load_adapter(base(), path, "mine")


# What the adapter was trained on


def test_an_adapter_is_loaded_on_the_base_that_it_was_trained_on(tmp_path: Path) -> None:
    dense, packed = saved(tmp_path / "dense"), saved(tmp_path / "4-bit", base(quantized=True))
    told = trained_on(packed)
    assert told is not None and told.quantized
    assert str(told.usual) == "nf4 (blocks of 64, double-quantized)"
    assert str(trained_on(dense).usual) == "dense"  # type: ignore[union-attr]

    assert minilora.load_adapter(base(), dense)
    assert minilora.load_adapter(base(quantized=True), packed)
    refused(base(), packed, "(up|down) was nf4 .*, and is dense in this model.*other_base=True")
    refused(base(quantized=True), dense, "(up|down) was dense, and is nf4")
    coarse = minilora.quantize(base(), block_size=32, double_quant=False)
    refused(coarse, packed, r"and is nf4 \(blocks of 32, not double-quantized\)")
    for model, path in [(base(), packed), (base(quantized=True), dense), (coarse, packed)]:
        assert adapters_of(minilora.load_adapter(model, path, other_base=True))


def test_every_layer_of_a_mixed_model_has_its_format_back(tmp_path: Path) -> None:
    path = saved(tmp_path, minilora.quantize(base(), ["up"]))
    assert minilora.load_adapter(minilora.quantize(base(), ["up"]), path)
    refused(minilora.quantize(base(), ["down"]), path, "up was nf4|down was dense")
    refused(base(), path, "up was nf4")


def test_a_file_that_does_not_say_is_loaded_on_any_base(tmp_path: Path) -> None:
    path = edit(saved(tmp_path, base(quantized=True)))
    assert trained_on(path) is None
    assert minilora.load_adapter(base(), path)


# Patterns


@pytest.mark.parametrize("option", ["alpha_pattern", "rank_pattern", "target_modules"])
@pytest.mark.parametrize("pattern", ["((u|p|up)+)+[^a-z]", "(?:x|(?:(up|u|p)*)*)[0-9]*[xyz.]"])
def test_a_pattern_that_would_hang_is_refused_by_name(
    option: str, pattern: str, tmp_path: Path
) -> None:
    pytest.importorskip("regex", reason="patterns with repetitions are matched by regex")

    def long() -> nn.ModuleDict:
        return nn.ModuleDict({60 * "up": nn.Linear(8, 8)})

    value = pattern if option == "target_modules" else {pattern: 2}
    path = edit(saved(tmp_path, long()), {option: value})
    start = time.perf_counter()
    refused(long(), path, "takes too long to match")
    assert time.perf_counter() - start < 20, "it took as long as the pattern asks for"


# The same bytes, and the mode of the umask

TWICE = """
import sys, torch, minilora
from torch import nn

torch.manual_seed(0)
model = minilora.inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), r=2)
minilora.save_adapter(model, sys.argv[1])
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    found = set()
    for i in range(4):
        folder = tmp_path / str(i)
        subprocess.run([sys.executable, "-c", TWICE, str(folder)], check=True, timeout=120)
        found.add(tuple((p.name, p.read_bytes()) for p in sorted(folder.iterdir())))
    assert len(found) == 1


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_both_files_have_the_mode_that_the_umask_gives(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        folder = saved(tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in folder.iterdir()}
    assert modes == {CONFIG: 0o666 & ~umask, WEIGHTS: 0o666 & ~umask}


def test_a_link_at_a_temporary_name_is_not_followed(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "adapter"
    victim.write_text("mine")
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / f".{name}.partial").symlink_to(victim)
    saved(folder)
    assert victim.read_text() == "mine" and minilora.load_adapter(base(), folder)


def test_a_failed_save_keeps_what_a_killed_one_left_for_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill between the two renames, the new weights are needed until a save succeeds."""
    saved(tmp_path)
    replace: Callable[..., Any] = Path.replace
    pid = os.fork()
    if pid == 0:

        def last_act(path: Path, target: Path) -> None:
            replace(path, target)
            os._exit(0)

        Path.replace = last_act  # type: ignore[assignment, method-assign]
        saved(tmp_path, alpha=9.0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0

    def full(_: int) -> None:
        raise OSError("No space left on device")

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, "fsync", full)
            saved(tmp_path, alpha=5.0)
        assert adapters_of(minilora.load_adapter(base(), tmp_path))["up"].alpha == 9.0
    saved(tmp_path, alpha=5.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
