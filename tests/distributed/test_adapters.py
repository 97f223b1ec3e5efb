"""Adapters of sharded models: the files of one process, and one error for all."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize, same_bits
from processes import run
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import minilora
from minilora.sharded import full

FILES = ["adapter_config.json", "adapter_model.safetensors"]
ROUNDED = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def whole_model(quantized: bool, seed: int = 1, r: int = 3, inject: bool = True) -> Any:
    """Sizes that two and four processes cannot share evenly; a norm is trained whole."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(10, 7), nn.LayerNorm(7), nn.Linear(7, 10)) for _ in range(2)]
    model = nn.Sequential(*blocks, nn.Linear(10, 3))
    if quantized:
        minilora.quantize(model)
    if inject:
        minilora.inject(model, r=r, lora_bias=True, train_also=["0.1"])
        randomize(model, seed=seed)
        with torch.no_grad():
            model[0][1].weight.add_(seed)
    return model


def sharded_model(*args: Any, policy: MixedPrecisionPolicy | None = None, **options: Any) -> Any:
    model = whole_model(*args, **options)
    policy = policy or MixedPrecisionPolicy()
    for block in (*model[:2], model):
        fully_shard(block, mp_policy=policy)
    return model


def message(call: Callable[[], Any]) -> str:
    with pytest.raises((OSError, ValueError, TypeError, RuntimeError)) as error:
        call()
    return f"{type(error.value).__name__}: {error.value}"


def save(rank: int, name: str) -> dict[str, Any]:
    """Saves what is sharded, and what was gathered for an evaluation in fewer bits."""
    folder = Path(name)
    said = []
    for quantized in (False, True):
        model = sharded_model(quantized)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # Each process names another folder; the first one alone writes.
            minilora.save_adapter(model, folder / f"sharded-{quantized}-{rank}")
        said.append([str(w.message) for w in caught if "do not serve" in str(w.message)])

        model = sharded_model(quantized, policy=ROUNDED)
        with torch.no_grad():
            model(torch.ones(1, 10))
        minilora.save_adapter(model, folder / f"evaluated-{quantized}-{rank}")
    return {"warnings": said}


def save_quantized(rank: int, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minilora.save_adapter(sharded_model(True), Path(name) / str(rank))


def save_errors(folder: Path) -> dict[str, Any]:
    model = sharded_model(False)
    (folder / "a file").touch()
    return {
        "not a folder": message(lambda: minilora.save_adapter(model, folder / "a file")),
        "no such adapter": message(lambda: minilora.save_adapter(model, folder, name="other")),
    }


def ddp(rank: int, name: str) -> None:
    model = DistributedDataParallel(whole_model(True))
    if rank == 0:
        minilora.save_adapter(model, Path(name) / "ddp")


def load(rank: int, name: str) -> dict[str, Any]:
    folder = Path(name)
    found: dict[str, Any] = {}
    for quantized in (False, True):
        model = sharded_model(quantized, seed=2)
        before = list(map(id, model.parameters()))
        minilora.load_adapter(model, folder / str(quantized))
        expected = whole_model(quantized).parameters()
        found[f"values, {quantized}"] = all(
            same_bits(full(p), q) for p, q in zip(model.parameters(), expected, strict=True)
        )
        found[f"same parameters, {quantized}"] = before == list(map(id, model.parameters()))

    paths = ["True", "nowhere"], ["True", "True of another run"], ["True", "True"]
    calls: dict[str, Callable[[], Any]] = {
        "missing on one": lambda: minilora.load_adapter(model, folder / paths[0][rank]),
        "not the same": lambda: minilora.load_adapter(model, folder / paths[1][rank]),
        "other rank": lambda: minilora.load_adapter(model, folder / "r=2", other_base=True),
        "inject": lambda: minilora.inject(model, name="second"),
        "quantize": lambda: minilora.quantize(sharded_model(False, inject=False)),
        "merge": lambda: minilora.merge(model),
        "merge_report": lambda: minilora.merge_report(model),
    }
    values = [full(p).clone() for p in model.parameters()]
    found["errors"] = {what: message(call) for what, call in calls.items()}
    found["unchanged"] = all(map(same_bits, map(full, model.parameters()), values))
    return found


def quantized_state(rank: int) -> dict[str, Any]:
    """What a quantized layer is when its parts are sharded."""
    expected = whole_model(True)
    found: dict[str, Any] = {}
    for policy in (None, ROUNDED):
        model = sharded_model(True, policy=policy)
        x = torch.ones(2, 10)
        model(x).sum().backward()
        model.zero_grad()
        state, wanted = model.state_dict(), expected.state_dict()
        found[f"values, {policy}"] = all(same_bits(full(state[k]), wanted[k]) for k in wanted)

    weight = model[2].weight
    found["weight"] = [str(weight.dtype), list(weight.shape), str(weight.device), weight.nbytes]
    found["repr"] = repr(model[2])

    other = sharded_model(True, seed=2)
    other.load_state_dict(model.state_dict())
    found["load_state_dict"] = same_bits(full(other[2].packed), expected[2].packed)

    for broadcast in (False, True):
        options = StateDictOptions(full_state_dict=True, cpu_offload=broadcast)
        gathered = get_model_state_dict(model, options=options)
        other = sharded_model(True, seed=2)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        set_model_state_dict(other, gathered, options=options)
        state = other.state_dict()
        found[f"distributed, {broadcast}"] = all(
            same_bits(full(state[k]), wanted[k]) for k in wanted
        )
    damaged = {**model.state_dict(), "2.nf4_layout": model[0][0].nf4_layout}
    found["damaged"] = message(lambda: other.load_state_dict(damaged))
    return found


def everything(rank: int, name: str) -> dict[str, Any]:
    ddp(rank, name)
    return {
        "save": save(rank, name),
        "save errors": save_errors(Path(name)),
        "load": load(rank, name),
        "quantized": quantized_state(rank),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process saves."""
    folder = tmp_path_factory.mktemp("saved")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "vLLM and llama.cpp do not serve", UserWarning)
        for quantized in (False, True):
            minilora.save_adapter(whole_model(quantized), folder / str(quantized))
        minilora.save_adapter(whole_model(True, seed=5), folder / "True of another run")
        minilora.save_adapter(whole_model(True, r=2), folder / "r=2")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[Any]:
    return run(2, everything, folder)


def same_files(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


def test_two_processes_save_the_bytes_of_one(folder: Path, found: list[Any]) -> None:
    for quantized in (False, True):
        for what in ("sharded", "evaluated"):
            assert same_files(folder / f"{what}-{quantized}-0", folder / str(quantized))
            assert not (folder / f"{what}-{quantized}-1").exists()
    assert same_files(folder / "ddp", folder / "True")
    # What PEFT and vLLM do not read is said once.
    assert [[len(texts) for texts in result["save"]["warnings"]] for result in found] == [
        [1, 1],
        [0, 0],
    ]


@pytest.mark.soak
def test_four_processes_save_the_bytes_of_one(folder: Path, tmp_path: Path) -> None:
    run(4, save_quantized, tmp_path)
    assert same_files(tmp_path / "0", folder / "True")
    assert len(list(tmp_path.iterdir())) == 1


def test_an_error_while_saving_is_one_in_all_processes(found: list[Any]) -> None:
    first, second = (result["save errors"] for result in found)
    assert "FileExistsError" in first["not a folder"]
    assert second["not a folder"].startswith("OSError: rank 0 failed: [Errno 17]")
    assert first["no such adapter"] == second["no such adapter"]


@pytest.mark.parametrize("quantized", [False, True])
def test_each_process_takes_its_part_of_a_file(found: list[Any], quantized: bool) -> None:
    for result in found:
        assert result["load"][f"values, {quantized}"]
        assert result["load"][f"same parameters, {quantized}"]


def test_a_file_that_one_process_cannot_read_is_loaded_by_none(found: list[Any]) -> None:
    first, second = (result["load"]["errors"] for result in found)
    assert first["missing on one"].startswith("FileNotFoundError: rank 1 failed: there is no")
    assert second["missing on one"].startswith("FileNotFoundError: there is no folder")
    for errors in (first, second):
        assert "is not the same on ranks 0 and 1" in errors["not the same"]
    assert all(result["load"]["unchanged"] for result in found)


@pytest.mark.parametrize(
    ("call", "way_out"),
    [
        ("other rank", "load an adapter with other parameters before fully_shard"),
        ("inject", "add adapters before fully_shard"),
        ("quantize", "quantize it before fully_shard"),
        ("merge", "save the adapter with minilora.save_adapter, and merge it in one process"),
        ("merge_report", "save the adapter with minilora.save_adapter"),
    ],
)
def test_what_would_need_new_parameters_is_refused(
    found: list[Any], call: str, way_out: str
) -> None:
    for result in found:
        error = result["load"]["errors"][call]
        assert error.startswith("ValueError: the model is sharded over several processes: ")
        assert way_out in error


def test_quantized_weights_are_sharded_and_gathered_bit_by_bit(found: list[Any]) -> None:
    for result in found:
        quantized = result["quantized"]
        values = [ok for name, ok in quantized.items() if name.startswith("values")]
        assert values == [True, True]


def test_a_sharded_quantized_layer_says_what_it_is(found: list[Any]) -> None:
    layer = whole_model(True)[2]
    weight = layer.weight
    expected = [str(weight.dtype), list(weight.shape), str(weight.device), weight.nbytes]
    for result in found:
        assert result["quantized"]["weight"] == expected
        assert result["quantized"]["repr"] == repr(layer)


def test_state_dicts_of_a_sharded_quantized_model_are_loaded(found: list[Any]) -> None:
    for result in found:
        quantized = result["quantized"]
        assert quantized["load_state_dict"]
        assert quantized["distributed, False"] and quantized["distributed, True"]
        assert "the state dict holds a [7, 10] weight" in quantized["damaged"]
