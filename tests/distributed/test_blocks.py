"""Which modules of a model are its repeated blocks, and which models cannot be sharded."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import minilora
from minilora.distributed import repeated_blocks, shard, sharding
from minilora.distributed.sharding import blocks_together, grouped


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU())


class OtherBlock(nn.Module):
    """A block with a list of experts inside."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(block() for _ in range(2))


def model_of(**children: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(children))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (model_of(layers=nn.ModuleList([block(), block()])), ["layers.0", "layers.1"]),
        (model_of(layers=nn.ModuleList([block()])), ["layers.0"]),
        (model_of(layers=nn.ModuleList([OtherBlock(), block()])), ["layers.0", "layers.1"]),
        (nn.Sequential(nn.Embedding(8, 8), block(), block()), ["1", "2"]),
        (model_of(a=nn.ModuleList([block()]), b=nn.ModuleList([block()])), ["a.0", "b.0"]),
        (model_of(lists=nn.ModuleList([nn.ModuleList([block()])])), ["lists.0.0"]),
        (model_of(heads=nn.ModuleList([nn.Linear(8, 8)])), []),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), []),
    ],
    ids=["list", "of one", "of two kinds", "sequential", "two", "nested", "of layers", "an MLP"],
)
def test_blocks_are_found_from_the_modules(model: nn.Module, names: list[str]) -> None:
    assert list(repeated_blocks(model)) == names


def test_a_block_with_two_names_is_found_once() -> None:
    shared = block()
    assert list(repeated_blocks(nn.ModuleList([shared, block(), shared]))) == ["0", "1"]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("T5", ["encoder.block.0", "decoder.block.0"]),
        ("GPT2", ["transformer.h.0"]),
        ("Mixtral", ["model.layers.0"]),
        ("CLIPVision", ["encoder.layers.0"]),
    ],
)
def test_blocks_of_transformers_models(kind: str, names: list[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="these are its models")
    sizes = {
        "T5": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16},
        "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
        "Mixtral": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "CLIPVision": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    }
    ends = {"T5": "ForConditionalGeneration", "GPT2": "LMHeadModel", "Mixtral": "ForCausalLM"}
    config = getattr(transformers, f"{kind}Config")(**sizes[kind])
    with torch.device("meta"):
        model = getattr(transformers, kind + ends.get(kind, "Model"))(config)
    assert [n.removeprefix("vision_model.") for n in repeated_blocks(model)] == names


# Groups of blocks


def test_small_blocks_of_one_list_are_gathered_together() -> None:
    blocks = {f"encoder.{i}": nn.Linear(256, 256, bias=False) for i in range(5)}
    blocks |= {f"decoder.{i}": nn.Linear(256, 1024, bias=False) for i in range(2)}
    size = 256 * 256 * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "GATHERED", 2 * size)
        assert [len(group) for group in grouped(blocks)] == [2, 2, 1, 1, 1]
        assert (blocks_together(size), blocks_together(4 * size)) == (2, 1)
        patch.setattr(sharding, "GATHERED", 2 * size + 1)
        assert [len(group) for group in grouped(blocks)] == [3, 2, 1, 1]
        assert blocks_together(size) == 3
    assert [block for group in grouped(blocks) for block in group] == [*blocks.values()]


# Refusals


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def two_blocks() -> Any:
    return minilora.inject(nn.Sequential(block(), block()))


def test_without_a_process_group_the_way_out_is_named() -> None:
    with pytest.raises(ValueError, match=r"no process group: start the script with torchrun"):
        shard(two_blocks())


@pytest.mark.usefixtures("group")
def test_a_model_is_sharded_once() -> None:
    model = shard(two_blocks())
    with pytest.raises(ValueError, match=r"FSDPSequential is sharded already"):
        shard(model)


@pytest.mark.usefixtures("group")
def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no repeated blocks.*fully_shard on its"):
        shard(nn.Linear(8, 8))


@pytest.mark.usefixtures("group")
def test_a_scalar_is_refused_by_name() -> None:
    model = two_blocks()
    model[1].gate = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match=r"1\.gate is a scalar.*give it the shape \[1\]"):
        shard(model)
    assert type(model) is nn.Sequential


@pytest.mark.usefixtures("group")
def test_trained_parameters_of_two_dtypes_are_refused_by_name() -> None:
    model = two_blocks()
    model[1][0].bias = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"0\.0\.\S+ \(torch\.float32\) and 1\.0\.bias"):
        shard(model)
