"""What a plan says of several GPUs, against the shards and collectives of FSDP2 itself."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fake_group import Sent, fake_group
from torch import nn

import minilora
from minilora.distributed import shard, sharding
from minilora.reports.memory import nf4_bytes
from minilora.reports.parameter_groups import nf4_parts
from minilora.reports.several_gpus import BUCKET, SeveralGPUs

pytest.importorskip("transformers", reason="the models are transformers'")

KINDS = ("quantized", "dense", "adapters")

# Name -> what `plan` and, without `quantize`, `inject` are called with.
CHANGES: dict[str, dict[str, Any]] = {
    "qlora": {"r": 4},
    "lora": {"r": 3, "quantize": False},
    "a bias, ranks, blocks": {
        "r": 5,
        "lora_bias": True,
        "rank_pattern": {"q_proj": 2},
        "layers_to_transform": 1,
    },
    "a norm and the head": {"r": 2, "train_also": ["norm", "lm_head"]},
}


def changed(model: Any, change: dict[str, Any]) -> Any:
    """The model that was planned."""
    arguments = dict(change)
    if arguments.pop("quantize", True):
        minilora.quantize(model, "all-linear")
    return minilora.inject(model, **arguments)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_the_groups_are_all_that_a_plan_counts(
    change: str, tie: bool, tiny_llama: Callable[..., Any]
) -> None:
    plan = minilora.plan(tiny_llama(tie), **CHANGES[change])
    assert plan.groups.shard_bytes(1) == plan.bytes
    assert plan.groups.blocks and sum(group.count for group in plan.groups.blocks) == 2


def test_what_is_in_4_bits_already_is_divided_as_what_will_be(
    tiny_llama: Callable[..., Any],
) -> None:
    planned = minilora.plan(tiny_llama(), r=4).groups
    stored = minilora.plan(minilora.quantize(tiny_llama()), r=4).groups
    for gpus in (1, 2, 7):
        assert planned.shard_bytes(gpus) == stored.shard_bytes(gpus)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("n", [1, 63, 64 * 256, 64 * 256 + 1, 99_999])
def test_the_tensors_of_a_weight_in_nf4(n: int, double_quant: bool) -> None:
    weight = minilora.quantize_nf4(torch.randn(n), 64, double_quant)
    tensors = (weight.packed, weight.absmax, weight.absmax2, weight.offset)
    expected = [(t.numel(), t.element_size()) for t in tensors if t is not None]
    parts = nf4_parts(n, 64, double_quant)
    assert [(part.rows, part.row_bytes) for part in parts] == expected
    assert sum(part.shard_bytes(1) for part in parts) == nf4_bytes(n, 64, double_quant)


@pytest.mark.parametrize(
    ("change", "ranks", "checkpointing", "grad_accum"),
    [
        ("qlora", 2, False, 1),
        ("qlora", 3, True, 2),
        ("qlora", 16, True, 1),
        ("lora", 4, True, 1),
        ("a norm and the head", 4, False, 2),
    ],
)
def test_shards_and_collectives_are_those_of_fsdp2(
    change: str,
    ranks: int,
    checkpointing: bool,
    grad_accum: int,
    tiny_llama: Callable[..., Any],
) -> None:
    from minilora.huggingface.activation_checkpointing import gradient_checkpointing

    ids = torch.arange(12).reshape(2, 6)
    plan = minilora.plan(tiny_llama(), **CHANGES[change], grad_accum=grad_accum)
    expected = plan.on_gpus(ranks).sharded
    with fake_group(ranks):
        model = shard(changed(tiny_llama(), CHANGES[change])).train()
        local = local_bytes(model) + Counter(dense=plan.groups.aside)
        assert local == Counter({kind: expected.held[kind] for kind in KINDS})

        within = gradient_checkpointing(model) if checkpointing else nullcontext()
        with within, Sent() as sent:
            for i in range(grad_accum):
                model.set_requires_gradient_sync(i == grad_accum - 1)
                model(input_ids=ids, labels=ids).loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = sum(shard_bytes(p.grad) for p in trained)
        del model, trained

    assert sent.bytes == {
        "_allgather_base_": expected.traffic.all_gather,
        "_reduce_scatter_base_": expected.traffic.reduce_scatter,
    }
    assert gradients == expected.held["gradients"]


def local_bytes(model: nn.Module) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        adapter = "adapters" in name and not name.endswith(("weight", "bias"))
        packed = parameter.dtype in (torch.uint8, torch.int32)
        kind = "adapters" if adapter else "quantized" if packed else "dense"
        found[kind] += shard_bytes(parameter)
    return found


def shard_bytes(parameter: Any) -> int:
    """Bytes on the first rank, which has the largest shard."""
    return int(parameter.to_local().nbytes)


@pytest.mark.parametrize("together", [1, 2])
def test_the_root_and_one_group_are_whole_while_a_block_computes(
    together: int, tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next block is in the buffer of an all-gather, and is not yet seen here."""
    ranks, ids = 2, torch.arange(12).reshape(2, 6)
    plan = minilora.plan(tiny_llama(), r=4)
    root, (block,) = plan.groups.root, plan.groups.blocks
    # Two blocks are all that there are.
    monkeypatch.setattr(sharding, "GATHERED", together * block.shard_bytes(1))
    with fake_group(ranks):
        model = shard(changed(tiny_llama(), {"r": 4})).train()
        whole = count_in_each_mlp(model)
        model(input_ids=ids, labels=ids).loss.backward()
        del model

    # Forward and backward, of two blocks.
    assert whole == [root.shard_bytes(1) + together * block.shard_bytes(1)] * 4
    gathered = plan.on_gpus(ranks).sharded.held["gathered"]
    # A parameter of one element is gathered as one from each rank.
    padding = together * 2 * 2 * 4 * 7
    two = 2 * together * (block.shard_bytes(1) + block.gradient_bytes(1))
    assert 0 <= gathered - root.shard_bytes(1) - two <= padding


def count_in_each_mlp(model: Any) -> list[int]:
    """The bytes of the parameters that are whole; appended whenever an MLP is called or done."""
    found: list[int] = []

    def count(*_: Any) -> None:
        plain = (p for p in model.parameters() if not hasattr(p, "to_local"))
        found.append(sum(p.nbytes for p in plain))

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(count)
        layer.mlp.register_full_backward_hook(count)
    return found


def test_ddp_sends_the_gradients_twice_but_for_the_own_part() -> None:
    plan = minilora.plan("smollm2-135m", r=16, batch_size=2, length=64)
    gradients = plan.bytes["gradients"]
    for gpus in (1, 2, 8):
        ddp = plan.on_gpus(gpus).ddp
        assert ddp.traffic.total == 2 * gradients * (gpus - 1) // gpus
        assert ddp.run and plan.run
        assert ddp.run.peak()[1] == plan.total_bytes + gradients, "the buckets"
    assert plan.on_gpus(8).ddp.exposed == 2 * min(gradients, BUCKET) * 7 // 8


@pytest.mark.parametrize("checkpointing", [False, True])
def test_computing_as_fast_as_sending_hides_nothing_more(checkpointing: bool) -> None:
    """The limit is where a block's pass takes as long as what is sent meanwhile."""
    gpus, bandwidth, tokens = 4, 10**9, 3 * 100
    arguments: dict[str, Any] = {"r": 8, "length": 100, "checkpointing": checkpointing}
    plan = minilora.plan("smollm2-135m", batch_size=3, **arguments)
    found = plan.on_gpus(gpus)

    weights = sum(row.out_features * row.in_features for row in plan.rows)
    (block,) = plan.groups.blocks
    gather, scatter = 3 * block.shard_bytes(gpus), 3 * block.gradient_bytes(gpus)
    forward = 2 * tokens * weights // block.count
    backward = 2 * forward if checkpointing else forward
    speed = min(forward / gather, backward / (gather + scatter)) * bandwidth
    assert found.sharded.hidden_up_to(bandwidth) == pytest.approx(speed)
    ddp = block.count * backward / found.ddp.traffic.total * bandwidth
    assert found.ddp.hidden_up_to(bandwidth) == pytest.approx(ddp)

    root = 3 * plan.groups.root.shard_bytes(gpus)
    # Of the first group of blocks and the last.
    together = -(-sharding.GATHERED // block.shard_bytes(1))
    assert together > 1
    assert found.sharded.exposed == root + together * (gather + scatter)
    assert found.sharded.hidden_up_to(2 * bandwidth) == pytest.approx(2 * speed)


def test_more_gpus_need_less_memory_each_and_send_more() -> None:
    plan = minilora.plan("smollm2-135m", r=16, batch_size=1, length=64)
    found = [plan.on_gpus(gpus).sharded for gpus in (1, 2, 4, 8)]
    memory = [sum(one.memory.values()) for one in found]
    assert memory == sorted(memory, reverse=True)
    sent = [one.traffic.total for one in found]
    assert sent == sorted(sent) and sent[0] == 0
    assert found[0].hidden_up_to(10**9) == float("inf")


def test_accumulated_gradients_are_whole_until_the_last_forward_pass() -> None:
    once, twice = (
        minilora.plan("smollm2-135m", r=16, batch_size=1, length=8, grad_accum=n).on_gpus(4)
        for n in (1, 2)
    )
    whole = 4 * once.sharded.held["gradients"]
    assert twice.sharded.held["gathered"] == once.sharded.held["gathered"] + whole
    assert twice.sharded.traffic.all_gather == 2 * once.sharded.traffic.all_gather
    assert twice.sharded.traffic.reduce_scatter == once.sharded.traffic.reduce_scatter
    assert twice.ddp.traffic == once.ddp.traffic


def test_a_model_without_blocks_is_one_group() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    plan = minilora.plan(model, r=4, quantize=False)
    assert plan.groups.blocks == () and plan.groups.shard_bytes(1) == plan.bytes
    sent = plan.on_gpus(2).sharded.traffic
    held = plan.on_gpus(2).sharded.held
    # Gathered once, since nothing is divided again before the backward pass.
    assert sent.all_gather == held["dense"] + held["adapters"]


@pytest.mark.parametrize("gpus", [0, -1, True, 2.0, 65_537])
def test_a_number_of_gpus_that_cannot_be_is_refused(gpus: Any) -> None:
    plan = minilora.plan(nn.Sequential(nn.Linear(8, 8)), r=2)
    with pytest.raises(ValueError, match=rf"gpus={gpus}: .* 1 \.\.\. 65,536"):
        plan.on_gpus(gpus)


def table(found: SeveralGPUs, bandwidth: float | None = None) -> dict[str, list[str]]:
    rows = found.table(bandwidth).rows
    return {name: cells for name, *cells in rows}


def test_it_prints_as_a_table() -> None:
    plan = minilora.plan("llama-2-70b", r=16, batch_size=1, length=512)
    found = plan.on_gpus(2)
    assert str(found).splitlines()[:2] == [
        "2 GPUs, 1 x 512 tokens per forward pass on each",
        "  each GPU            DDP     FSDP2",
    ]
    assert "<td" in found._repr_html_() and repr(found) == str(found)
    rows = table(found)
    assert rows["quantized"] == ["35.31 GB", "17.66 GB"]
    assert rows["buckets"] == ["828.4 MB", ""] and rows["gathered"][0] == ""
    assert rows["sent per step"] == ["828.4 MB", "37.08 GB"]

    timed = table(found, 25e9)
    assert timed["at 25.00 GB per second"] == ["33.1 ms", "1.48 s"]
    assert timed["of which nothing hides"][1] == "30.2 ms"
    assert timed["the rest is hidden up to"][1] == "97.0 TFLOP/s"


def test_without_a_batch_the_table_says_that_activations_are_missing() -> None:
    found = minilora.plan("smollm2-135m", r=16).on_gpus(2)
    assert str(found).endswith("total: plus activations")
    assert "activations" not in table(found) and "gradients" in table(found)
    timed = table(found, 1e9)
    assert timed["at 1.00 GB per second"][0] == "19.5 ms"
    assert "the rest is hidden up to" not in timed
