"""Names without what wrappers add: in a model by the wrappers' types, in a file by their place."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import adapters_of, contents, randomize
from torch import nn

import minilora
from minilora.files.names import PEFT_PREFIX, canonical_names, names_in_file


class Tree(nn.Module):
    """Children by dotted name, each an nn.Linear, called in turn."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names = names
        for name in names:
            *parents, last = name.split(".")
            holder: nn.Module = self
            for parent in parents:
                if parent not in holder._modules:
                    holder.add_module(parent, nn.Module())
                holder = holder.get_submodule(parent)
            holder.add_module(last, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> Any:
        for name in self.names:
            x = self.get_submodule(name)(x).tanh()
        return x


# Children that are called what wrappers call theirs.
CHILDREN = [
    ("module.up",),
    ("module.up", "up"),
    ("base_model.model.up",),
    ("base_model.model.up", "up"),
    ("base_model.up", "model.up"),
    ("module.module.up", "module.up", "up"),
    ("a.module.up", "a.up"),
    ("base_layer.up", "up.base_layer"),
]
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda model: model,
    "data parallel": nn.DataParallel,
    "compiled": torch.compile,
    "both": lambda model: torch.compile(nn.DataParallel(model)),
}


# torch.compile's own imports
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("names", CHILDREN, ids=", ".join)
def test_a_child_keeps_its_name_whatever_it_is_called(
    names: tuple[str, ...], wrapper: str, tmp_path: Path
) -> None:
    model = minilora.inject(Tree(*names), r=2, alpha=3.0)
    randomize(model)
    wrap = WRAPPERS[wrapper]
    path = minilora.save_adapter(wrap(model), tmp_path / "wrapped")
    keys = {f"{PEFT_PREFIX}{name}.lora_{end}.weight" for name in names for end in "AB"}
    assert contents(path)[2].keys() == keys

    plain = Tree(*names)
    minilora.load_adapter(wrap(plain), path)
    x = torch.randn(3, 4)
    assert torch.equal(plain(x), model(x))
    assert adapters_of(plain).keys() == set(names)


@pytest.mark.parametrize("names", CHILDREN, ids=", ".join)
def test_peft_finds_the_same_layers(names: tuple[str, ...], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is the oracle here: pip install -e .[dev]")
    model = randomize(minilora.inject(Tree(*names), r=2, alpha=3.0))
    theirs = peft.PeftModel.from_pretrained(Tree(*names), minilora.save_adapter(model, tmp_path))
    x = torch.randn(3, 4)
    assert (theirs(x) - model(x)).abs().max() < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(minilora.load_adapter(Tree(*names), tmp_path / "theirs")(x), model(x))


def test_a_model_inside_a_peft_model_has_its_own_names() -> None:
    peft = pytest.importorskip("peft", reason="PEFT's wrappers are in question")
    inner = Tree("up", "base_model.down")
    model = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["up"]))
    names = canonical_names(model)
    assert names["base_model.model.base_model.down.weight"] == "base_model.down.weight"


def test_two_names_that_are_one_without_wrappers_are_an_error(tmp_path: Path) -> None:
    model = nn.DataParallel(minilora.inject(Tree("up"), r=2))
    model.up = nn.Linear(4, 4)
    for call in (minilora.save_adapter, minilora.load_adapter):
        with pytest.raises(ValueError, match=r"module.up and up are both 'up': rename one"):
            call(model, tmp_path)


# torch.compile's own imports
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_layer_without_a_name_is_refused_and_saved_inside_another_module(
    wrapper: str, tmp_path: Path
) -> None:
    wrap, model = WRAPPERS[wrapper], randomize(minilora.inject(nn.Sequential(nn.Linear(4, 4)), r=2))
    path = minilora.save_adapter(model, tmp_path / "whole")
    layer = wrap(model[0])
    with pytest.raises(ValueError, match=r"the LoRALinear is the model itself.*nn.Sequential\("):
        minilora.save_adapter(layer, path)

    again = minilora.save_adapter(nn.Sequential(layer), tmp_path / "again")
    assert contents(again)[:2] == contents(path)[:2]
    base = minilora.eject(copy.deepcopy(model))[0]
    minilora.load_adapter(nn.Sequential(wrap(base)), path)
    x = torch.randn(3, 4)
    assert torch.equal(base(x), model(x))


def test_a_wrappers_own_state_and_a_shared_module_have_names() -> None:
    model = torch.optim.swa_utils.AveragedModel(Tree("up"))
    assert canonical_names(model)["n_averaged"] == "n_averaged"
    tree = Tree("up")
    tree.again = tree.up
    assert canonical_names(tree)["again.weight"] == "again.weight"


KNOWN = {"up", "module.up", "base_model.model.up", "a.up", "a._orig_mod.up", "x.base_layer.up"}
KEYS: dict[str, tuple[list[str], list[str]]] = {
    "PEFT's": ([PEFT_PREFIX + "up", PEFT_PREFIX + "a.up"], ["up", "a.up"]),
    "no prefix": (["up", "a.up"], ["up", "a.up"]),
    "PEFT's prefix before a child of that name": (
        [PEFT_PREFIX + PEFT_PREFIX + "up", PEFT_PREFIX + "up"],
        [PEFT_PREFIX + "up", "up"],
    ),
    "DDP": (["module.up", "module.a.up"], ["up", "a.up"]),
    "DDP, where a child is called module": (["module.module.up", "module.up"], ["module.up", "up"]),
    "a child called module": ([PEFT_PREFIX + "module.up"], ["module.up"]),
    "DDP around PEFT": (["module." + PEFT_PREFIX + "module.up"], ["module.up"]),
    "compiled, in PEFT": ([PEFT_PREFIX + "_orig_mod.a.up"], ["a.up"]),
    "FSDP inside": (["_fsdp_wrapped_module.a._fsdp_wrapped_module.up"], ["a.up"]),
    "checkpointed": ([PEFT_PREFIX + "a._checkpoint_wrapped_module.up"], ["a.up"]),
    "a child of a wrapper's name": ([PEFT_PREFIX + "a._orig_mod.up"], ["a._orig_mod.up"]),
    "PEFT's base layer": ([PEFT_PREFIX + "a.base_layer.up"], ["a.up"]),
    "a child called base_layer": ([PEFT_PREFIX + "x.base_layer.up"], ["x.base_layer.up"]),
    "unknown": ([PEFT_PREFIX + "module.down"], ["module.down"]),
    "nothing": ([], []),
}


@pytest.mark.parametrize("case", KEYS)
def test_a_key_of_a_file_means_a_name_of_the_model(case: str) -> None:
    keys, names = KEYS[case]
    assert list(names_in_file(keys, KNOWN).values()) == names
