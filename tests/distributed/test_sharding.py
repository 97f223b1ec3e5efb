"""Sharded models: what each process holds, and that they train as one process would."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import same_bits
from processes import run
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import minilora
from minilora.distributed import shard
from minilora.huggingface import sharded_folder
from minilora.huggingface.efficient import efficient_training
from minilora.huggingface.sharded_folder import load_sharded
from minilora.layers import NF4Linear
from minilora.training.base import sha256_of_base

pytest.importorskip("transformers", reason="the model in these tests is a transformers Llama")

# Here, and not in a function: the processes are forked when all has been imported. fully_shard
# imports the compiler when it is first used.
import torch._dynamo
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, BATCH = 16, 4


def llama() -> Any:
    """A Llama in 4 bits, with adapters whose B is not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = minilora.inject(minilora.quantize(LlamaForCausalLM(config)), r=4)
    generator = torch.Generator().manual_seed(1)
    for p in minilora.adapter_parameters(model):
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    return model.train()


def tokens() -> Tensor:
    return torch.randint(128, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))


def train(model: Any, batch: Tensor, steps: int) -> list[float]:
    """The loss of each step, as a mean over all processes."""
    optimizer = torch.optim.AdamW(minilora.adapter_parameters(model), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if dist.get_world_size() > 1 and len(batch) < BATCH:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    return losses


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def local_bytes(model: nn.Module) -> int:
    """Bytes of the base's parameters in this process."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in frozen]
    return sum(p.nbytes for p in local)


def changed_parts(model: nn.Module, original: nn.Module) -> list[str]:
    """Names of the parameters whose gathered bits are not the original's."""
    before = dict(original.named_parameters())
    return [n for n, p in model.named_parameters() if not same_bits(whole(p), before[n])]


def gathered_parts(model: nn.Module, original: nn.Module) -> list[str]:
    """Names of the parts of 4-bit weights that differ while a forward pass computes with them."""
    before, wrong = dict(original.named_parameters()), []

    def look(name: str) -> Any:
        def hook(layer: nn.Module, *_: Any) -> None:
            parts = {n: p for n, p in layer.named_parameters(recurse=False) if n != "bias"}
            assert {type(p) for p in parts.values()} == {nn.Parameter}
            wrong.extend(n for n, p in parts.items() if not same_bits(p, before[f"{name}.{n}"]))

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, NF4Linear)]
    hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in layers]
    with torch.no_grad():
        model(input_ids=tokens())
    for hook in hooks:
        hook.remove()
    return [*wrong, *(["no layer"] if not hooks else [])]


def check_sharding(rank: int, folder: str, dense: str, steps: int) -> dict[str, Any]:
    """What the tests look at, from one group of processes."""
    original, size = llama(), dist.get_world_size()
    model = copy.deepcopy(original)
    with torch.no_grad():
        # Makes each layer keep views of its weight, which a copy would not have.
        expected = model(input_ids=tokens()).logits
    assert any("_held_view" in vars(module) for module in model.modules())

    shard(model)
    found: dict[str, Any] = {
        "share": local_bytes(model) / local_bytes(original),
        "kinds": sorted({type(p).__name__ for p in model.parameters()}),
        "views": [name for name, m in model.named_modules() if "_held_view" in vars(m)],
        "changed": changed_parts(model, original),
        "gathered": gathered_parts(model, original),
    }
    with torch.no_grad():
        found["same logits"] = same_bits(model(input_ids=tokens()).logits, expected)

    part = tokens()[rank::size]
    found["one"] = train(copy.deepcopy(original), tokens(), steps)
    found["sharded"] = train(model, part, steps)
    checkpointed = shard(copy.deepcopy(original))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    found["checkpointed"] = train(checkpointed, part, 2)
    found["folder"] = check_folder(folder)
    found["dense"] = check_dense_folder(dense)
    return found | {"bf16": check_bf16(original, part)}


def check_folder(folder: str) -> dict[str, Any]:
    """A model that is loaded in shards, against one that is loaded whole."""
    one, _ = minilora.load(folder)
    expected = minilora.inject(one, r=4).state_dict(keep_vars=True)
    copied, bare = load_watched(folder)
    found: dict[str, Any] = {"files": copied}
    found["frozen"] = not any(p.requires_grad for p in bare.parameters())

    model, _ = load_sharded(folder, adapter={"r": 4})
    own = model.state_dict(keep_vars=True)
    found["names"] = [*own] == [*expected]
    found["share"] = local_bytes(model) / local_bytes(one)
    found["changed"] = [n for n, t in own.items() if not same_bits(whole(t), expected[n])]
    trained = [n for n, t in own.items() if t.requires_grad]
    found["trained"] = trained == [n for n, t in expected.items() if t.requires_grad]
    buffers = dict(one.named_buffers())
    found["buffers"] = [n for n, t in model.named_buffers() if not same_bits(t, buffers[n])]
    found["tied"] = model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        logits = [m(input_ids=tokens()).logits for m in (model, one)]
    found["same logits"] = same_bits(*logits)
    found["error"] = error_of_one_process(folder)
    return found


def check_dense_folder(folder: str) -> dict[str, Any]:
    """A dense model that is loaded in another dtype, in shards and whole; and made efficient."""
    model, _ = load_sharded(folder, dtype=torch.bfloat16)
    one, _ = minilora.load(folder, dtype=torch.bfloat16)
    expected = one.state_dict()
    changed = [n for n, t in model.state_dict().items() if not same_bits(whole(t), expected[n])]
    buffers = dict(one.named_buffers())
    changed += [n for n, t in model.named_buffers() if not same_bits(t, buffers[n])]
    found: dict[str, Any] = {"changed": changed, "hash": sha256_of_base(model)}
    found["same hash"] = found["hash"] == sha256_of_base(minilora.inject(one))
    for each in (model, one):
        with efficient_training(each) as replaced, torch.no_grad():
            each(input_ids=tokens())
        found.setdefault("efficient", []).append(str(replaced))
    return found


def load_watched(folder: str) -> tuple[list[str], Any]:
    """The tensors that are held whole in memory while loading; and the model, without adapters."""
    copied = []
    load = sharded_folder.load_shards

    def watched(model: nn.Module, tensors: Any) -> None:
        def each() -> Any:
            for name, t in tensors:
                # PyTorch can resize what it has allocated itself.
                copied.extend([name] if t.untyped_storage().resizable() else [])
                yield name, t

        load(model, each())

    sharded_folder.load_shards = watched
    try:
        return copied, load_sharded(folder)[0]
    finally:
        sharded_folder.load_shards = load


def error_of_one_process(folder: str) -> str:
    """What this process raises if the first one cannot read the folder."""
    path = "/nowhere" if dist.get_rank() == 0 else folder
    try:
        load_sharded(path)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def check_bf16(original: Any, part: Tensor) -> dict[str, Any]:
    half = shard(copy.deepcopy(original), dtype=torch.bfloat16)
    found: dict[str, Any] = {
        "gathered": gathered_parts(half, original),
        # The forward pass above left nothing gathered behind, in bfloat16.
        "changed": changed_parts(half, original),
    }
    # All floats are cast as they are gathered: a norm in float32 would make the next layer's input
    # float32 again.
    in_half = copy.deepcopy(original)
    for p in in_half.parameters():
        p.data = p.data.to(torch.bfloat16) if p.is_floating_point() else p.data
    with torch.no_grad():
        logits = [m(input_ids=tokens()).logits for m in (half, in_half)]
    found["same logits"] = same_bits(*logits)
    half(input_ids=part, labels=part).loss.backward()
    trained = minilora.adapter_parameters(half)
    found["gradients"] = sorted({str(p.grad.dtype) for p in trained if p.grad is not None})
    return found


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in 4 bits."""
    folder = tmp_path_factory.mktemp("sharded") / "quantized"
    return minilora.save_quantized(minilora.eject(llama()), folder)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a dense model."""
    folder = tmp_path_factory.mktemp("sharded") / "dense"
    LlamaForCausalLM(llama().config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both(quantized: Path, dense: Path) -> list[dict[str, Any]]:
    """What each of two processes found."""
    return run(2, check_sharding, quantized, dense, 5)


@pytest.fixture
def two(both: list[dict[str, Any]]) -> dict[str, Any]:
    return both[0]


def check_share(found: dict[str, Any], size: int) -> None:
    # A last shard may be shorter.
    assert 0.99 / size < found["share"] < 1.02 / size
    assert found["kinds"] == ["DTensor"]


def test_each_process_holds_its_share_of_the_base(two: dict[str, Any]) -> None:
    check_share(two, 2)


def test_no_layer_keeps_views_of_its_whole_weight(two: dict[str, Any]) -> None:
    assert two["views"] == []


def test_what_is_gathered_has_the_bits_that_were_sharded(two: dict[str, Any]) -> None:
    assert two["changed"] == [] and two["gathered"] == []
    assert two["same logits"] is True


def test_losses_are_those_of_one_process(two: dict[str, Any]) -> None:
    assert two["sharded"] == pytest.approx(two["one"], abs=1e-5)
    assert two["one"][-1] < two["one"][0] - 0.01


@pytest.mark.soak
@pytest.mark.parametrize("size", [2, 4])
def test_twenty_steps_are_those_of_one_process(size: int, quantized: Path, dense: Path) -> None:
    found = run(size, check_sharding, quantized, dense, 20)[0]
    check_share(found, size)
    assert found["changed"] == [] and found["gathered"] == []
    assert found["sharded"] == pytest.approx(found["one"], abs=1e-5)


def test_mixed_precision_leaves_4_bit_weights_and_all_shards_alone(two: dict[str, Any]) -> None:
    assert two["bf16"]["gathered"] == [] and two["bf16"]["changed"] == []


def test_mixed_precision_computes_as_a_model_in_that_dtype(two: dict[str, Any]) -> None:
    assert two["bf16"]["same logits"] is True
    assert two["bf16"]["gradients"] == ["torch.float32"]


def test_gradient_checkpointing_changes_no_bit(two: dict[str, Any]) -> None:
    assert two["checkpointed"] == two["sharded"][:2]


# Loading


def test_a_folder_is_loaded_as_by_one_process_into_shards(both: list[dict[str, Any]]) -> None:
    for found in (process["folder"] for process in both):
        assert (
            found["frozen"]
            and found["names"]
            and found["trained"]
            and found["tied"]
            and found["same logits"]
        )
        assert found["changed"] == [] and found["buffers"] == []
        assert found["share"] < 1.02 / 2


def test_a_dense_folder_is_loaded_in_the_dtype_that_was_asked_for(
    both: list[dict[str, Any]],
) -> None:
    for found in (process["dense"] for process in both):
        assert found["changed"] == [] and found["same hash"] is True


def test_efficient_training_finds_in_a_sharded_model_what_it_finds_in_a_whole_one(
    two: dict[str, Any],
) -> None:
    found, expected = two["dense"]["efficient"]
    assert found == expected == "attention, rotary embeddings, 5 norms, 2 MLPs"


def test_no_tensor_of_a_folder_is_held_whole(two: dict[str, Any]) -> None:
    # A scalar of each layer is in the files as text.
    assert {name.rpartition(".")[2] for name in two["folder"]["files"]} <= {"offset"}


def test_an_error_of_one_process_is_raised_in_all(both: list[dict[str, Any]]) -> None:
    first, second = (process["folder"]["error"] for process in both)
    assert first.startswith("ValueError: /nowhere cannot be loaded")
    assert second.startswith("ValueError: rank 0 failed: /nowhere cannot be loaded")
