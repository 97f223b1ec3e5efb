"""Paging on a GPU: pinned memory, streams, and memory that really runs out.

On a GPU the oracle is torch.optim.AdamW(foreach=True).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import same_bits
from torch import Tensor, nn

from minilora import PagedAdamW, retry_on_oom
from minilora.optim import transfer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

MB = 2**20


@contextmanager
def at_most(extra: int) -> Iterator[None]:
    """PyTorch may reserve at most `extra` bytes more than now."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    limit = torch.cuda.memory_reserved() + extra
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def parameters(*sizes: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        nn.Parameter(torch.randn(n, device="cuda", generator=generator).to(dtype)) for n in sizes
    ]


def gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, device="cuda", generator=generator).to(p.dtype)


def train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for seed in steps:
        gradients(params, seed)
        optimizer.step()


def assert_same(found: list[nn.Parameter], expected: list[nn.Parameter]) -> None:
    assert same_bits(tuple(found), tuple(expected))


@pytest.mark.parametrize("page", ["on_oom", "always", "never"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_bits_are_those_of_foreach(
    dtype: torch.dtype, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last tensor is cut into many pages.
    monkeypatch.setattr(transfer, "LARGEST_PAGE", 2**18)
    sizes = (1, 3, 64, 1000, 77_777, 3_000_001)
    a = parameters(*sizes, dtype=dtype)
    b = parameters(*sizes, dtype=dtype)
    train(a, PagedAdamW(a, page=page), range(5))  # type: ignore[arg-type]
    train(b, torch.optim.AdamW(b, foreach=True), range(5))
    assert_same(a, b)


def test_the_update_waits_for_gradients_and_copies_for_the_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The main stream is kept busy: a copy that does not wait would copy what is not there yet."""
    monkeypatch.setattr(transfer, "LARGEST_PAGE", 2**20)
    a = parameters(4_000_000)
    b = parameters(4_000_000)
    optimizer = PagedAdamW(a, page="always")
    oracle = torch.optim.AdamW(b, foreach=True)

    for seed in range(4):
        torch.cuda._sleep(50_000_000)
        gradients(a, seed)
        gradients(b, seed)
        optimizer.step()
        oracle.step()

    assert_same(a, b)
    for key in ("exp_avg", "exp_avg_sq"):
        host = optimizer.state[a[0]][key]
        assert host.is_pinned() and torch.equal(host, oracle.state[b[0]][key].cpu())


def test_a_step_that_really_runs_out_pages_and_keeps_its_bits() -> None:
    sizes = (40 * MB // 4,) * 4
    b = parameters(*sizes)
    train(b, torch.optim.AdamW(b, foreach=True), range(3))
    expected = tuple(p.detach().cpu() for p in b)
    del b

    a = parameters(*sizes)
    gradients(a, 0)
    optimizer = PagedAdamW(a)

    # The states are 320 MB.
    with at_most(260 * MB):
        train(a, optimizer, range(3))

    assert optimizer.paging.since == 1 and optimizer.paging.bytes_in == 3 * 320 * MB
    assert same_bits(tuple(a), expected)
    optimizer.page_in()
    assert all(optimizer.state[p]["exp_avg"].is_cuda for p in a)


def test_a_step_that_really_runs_out_in_backward_is_retried_with_the_same_bits() -> None:
    def make() -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
        (p,) = params = parameters(20 * MB // 4)

        def step() -> Tensor:
            activations = [torch.nn.functional.dropout(p, 0.5).exp() for _ in range(6)]
            loss = torch.stack([a.mean() for a in activations]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        return params, step

    def start(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        train(params, optimizer, range(1))
        optimizer.zero_grad()
        torch.cuda.manual_seed(1)

    # Once with enough memory: what it needs, and what it gives.
    params, step = make()
    optimizer = PagedAdamW(params)
    start(params, optimizer)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    loss = step()
    need = torch.cuda.max_memory_allocated() - held
    expected = params[0].grad
    random = torch.cuda.get_rng_state()
    del optimizer, step

    # Once with too little. The states are 40 MB.
    again, step = make()
    optimizer = PagedAdamW(again)
    start(again, optimizer)
    with at_most(need - 20 * MB):
        assert torch.equal(retry_on_oom(step, optimizer), loss)

    assert optimizer.paging.since == 2
    assert expected is not None and again[0].grad is not None
    assert torch.equal(again[0].grad, expected)
    assert torch.equal(torch.cuda.get_rng_state(), random)


def test_states_go_to_torch_on_the_gpu_and_come_back_to_the_host() -> None:
    a = parameters(1000, 77_777)
    paged = PagedAdamW(a, page="always")
    train(a, paged, range(3))

    plain = torch.optim.AdamW(a)
    plain.load_state_dict(paged.state_dict())
    assert plain.state[a[0]]["exp_avg"].is_cuda

    back = PagedAdamW(a, page="always")
    back.load_state_dict(plain.state_dict())
    assert back.state[a[0]]["exp_avg"].is_pinned()

    on_cpu = [nn.Parameter(p.detach().cpu()) for p in a]
    PagedAdamW(on_cpu).load_state_dict(paged.state_dict())


def test_a_gpu_has_the_transfer_of_its_own() -> None:
    found = transfer.transfer_for(torch.device("cuda", 0))
    assert isinstance(found, transfer.CudaTransfer)
