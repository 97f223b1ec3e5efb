"""PagedAdamW on sharded parameters: the bits of one process, whatever the number of processes."""

import copy
import itertools
from typing import Any

import pytest
import torch
from helpers import gaussian, same_bits
from paged_cases import MODES, small_pages
from processes import run
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from minilora import PagedAdamW, retry_on_oom

RANKS = 2

# page, dtype of the parameters, dtype of the states.
CASES = {
    **{page: (page, torch.float32, None) for page in MODES},
    "bfloat16": ("on_oom", torch.bfloat16, None),
    "wider states": ("always", torch.bfloat16, torch.float32),
}


def whole_model(dtype: torch.dtype) -> nn.Sequential:
    """Of two processes the second has fewer rows of the first layer, and none of the second one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(500, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)


def sharded_model(dtype: torch.dtype) -> nn.Sequential:
    model = whole_model(dtype)
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    return model


def give_gradients(model: nn.Module, seed: int) -> None:
    """The same gradients for a whole model and for a sharded one."""
    for i, p in enumerate(model.parameters()):
        grad = gaussian(*p.shape, seed=100 * seed + i).to(p.dtype)
        p.grad = as_param(grad, p)


def as_param(value: Tensor, p: Tensor) -> Tensor:
    if not isinstance(p, DTensor):
        return value
    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


def local(t: Any) -> Any:
    return t.to_local() if isinstance(t, DTensor) else t


def groups(model: nn.Sequential) -> list[dict[str, Any]]:
    return [
        {"params": list(model[0].parameters()), "weight_decay": 0.3},
        {"params": list(model[2].parameters()), "lr": 1e-2},
    ]


def agree(model: nn.Module, optimizer: Any, whole: nn.Module, oracle: Any) -> bool:
    """Whether this process's part of parameters and states has the bits of the whole model's."""
    pairs = list(zip(model.parameters(), whole.parameters(), strict=True))
    states, expected = optimizer.state_dict()["state"], oracle.state_dict()["state"]
    parts = [(p, q.detach()) for p, q in pairs]
    for i in expected:
        parts += [(states[i][key], expected[i][key]) for key in expected[i]]
    return all(same_bits(local(part), local(as_param(q, part))) for part, q in parts)


def check_bits(page: str, dtype: torch.dtype, state_dtype: torch.dtype | None) -> dict[str, Any]:
    model, whole = sharded_model(dtype), whole_model(dtype)
    options: Any = {"lr": 3e-3, "page": page, "state_dtype": state_dtype}
    optimizer = PagedAdamW(groups(model), **options)
    oracle = PagedAdamW(groups(whole), lr=3e-3, page="never", state_dtype=state_dtype)
    for step in range(4):
        for each, its_optimizer in ((model, optimizer), (whole, oracle)):
            give_gradients(each, step)
            its_optimizer.step()
        if step == 1 and page == "on_oom":
            optimizer.page_out()
        if step == 2 and page == "on_oom":
            optimizer.page_in()
    moment = optimizer.state[model[2].weight]["exp_avg"]
    return {
        "same": agree(model, optimizer, whole, oracle),
        "sharded": type(moment).__name__,
        "rows": len(local(moment)),
        "bytes in": optimizer.paging.bytes_in,
        "pages": optimizer.paging.pages,
    }


def check_state_dicts() -> dict[str, bool]:
    """States go to torch.optim.AdamW and back, and whole ones are taken apart."""
    model, whole = sharded_model(torch.float32), whole_model(torch.float32)
    makers = [lambda m: PagedAdamW(m, page="always"), torch.optim.AdamW, PagedAdamW]
    optimizer: Any = makers[0](model.parameters())
    oracle = torch.optim.AdamW(whole.parameters(), foreach=False)
    found = {}
    for i, make in enumerate([*makers, makers[0]]):
        for each, its_optimizer in ((model, optimizer), (whole, oracle)):
            give_gradients(each, i)
            its_optimizer.step()
        found[f"to {make}"] = agree(model, optimizer, whole, oracle)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = make(model.parameters())
        optimizer.load_state_dict(saved)

    for page in MODES:
        fresh = PagedAdamW(model.parameters(), page=page)  # type: ignore[arg-type]
        fresh.load_state_dict(oracle.state_dict())
        found[f"whole, {page}"] = agree(model, fresh, whole, oracle)
    return found


def check_checkpoint_functions() -> dict[str, bool]:
    """`torch.distributed.checkpoint.state_dict` gathers the states, and distributes them again."""
    model = sharded_model(torch.float32)
    optimizer = PagedAdamW(model.parameters(), page="always")
    for step in range(2):
        give_gradients(model, step)
        optimizer.step()
    # Where there are gradients, PyTorch takes an optimizer for one that has no states.
    optimizer.zero_grad()
    saved = copy.deepcopy(optimizer.state_dict()["state"])

    found = {}
    for full_state_dict, cpu_offload in itertools.product((False, True), repeat=2):
        options = StateDictOptions(full_state_dict=full_state_dict, cpu_offload=cpu_offload)
        gathered = get_optimizer_state_dict(model, optimizer, options=options)
        fresh = PagedAdamW(model.parameters(), page="always")
        if full_state_dict:
            # Only the first process has what was read from a file.
            options.broadcast_from_rank0 = True
        set_optimizer_state_dict(model, fresh, gathered, options=options)
        states = fresh.state_dict()["state"]
        found[f"{options}"] = all(
            same_bits(local(states[i][key]), local(saved[i][key]))
            for i in saved
            for key in saved[i]
        )
    return found


def errors(rank: int) -> dict[str, str]:
    def message(call: Any) -> str:
        with pytest.raises((ValueError, TypeError, torch.OutOfMemoryError)) as error:
            call()
        return str(error.value)

    model = sharded_model(torch.float32)
    optimizer = PagedAdamW(model.parameters())
    give_gradients(model, 0)
    before = [local(p).clone() for p in model.parameters()]
    p = model[2].weight
    p.grad = DTensor.from_local(torch.zeros(1, 7), p.device_mesh, [Partial()])
    found = {"not reduced": message(optimizer.step)}
    assert all(same_bits(local(p), q) for p, q in zip(model.parameters(), before, strict=True))

    give_gradients(model, 0)
    optimizer.step()
    other = PagedAdamW(whole_model(torch.float32).parameters())
    found["gathered"] = message(lambda: other.load_state_dict(optimizer.state_dict()))

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("none left")

    found["retry"] = message(lambda: retry_on_oom(out_of_memory, optimizer))
    return found


def work(rank: int) -> dict[str, Any]:
    with small_pages():
        bits = {name: check_bits(*case) for name, case in CASES.items()}
    return {
        "bits": bits,
        "state dicts": check_state_dicts(),
        "checkpoint": check_checkpoint_functions(),
        "errors": errors(rank),
    }


@pytest.fixture(scope="module")
def found() -> list[Any]:
    return run(RANKS, work)


def test_updates_and_states_have_the_bits_of_one_process(found: list[Any]) -> None:
    for rank, result in enumerate(found):
        for case, bits in result["bits"].items():
            assert bits["same"], (rank, case)
            assert bits["sharded"] == "DTensor"
            assert bits["rows"] == (1 if rank == 0 else 0)


def test_each_process_pages_its_part(found: list[Any]) -> None:
    # Rows of [7, 500] and [7], and of [1, 7] and [1].
    elements = [4 * 501 + 8, 3 * 501]
    for rank, result in enumerate(found):
        bits = result["bits"]
        assert bits["always"]["bytes in"] == 4 * 2 * 4 * elements[rank]
        assert bits["on_oom"]["bytes in"] == 2 * 2 * 4 * elements[rank]
        assert bits["never"]["bytes in"] == 0
        assert bits["always"]["pages"] > 4


def test_state_dicts_go_both_ways_and_whole_ones_are_taken_apart(found: list[Any]) -> None:
    for result in found:
        assert all(result["state dicts"].values()), result["state dicts"]
        assert len(result["state dicts"]) == 6


def test_the_functions_of_torch_distributed_checkpoint_know_the_states(found: list[Any]) -> None:
    for result in found:
        assert all(result["checkpoint"].values()), result["checkpoint"]
        assert len(result["checkpoint"]) == 4


def test_errors_name_the_way_out(found: list[Any]) -> None:
    for result in found:
        errors = result["errors"]
        assert "redistribute a gradient that is sharded otherwise" in errors["not reduced"]
        assert "full_tensor(), which any sharding can load" in errors["gathered"]
        assert "none left" in errors["retry"] and "other processes (1)" in errors["retry"]
        assert 'page="always"' in errors["retry"]
