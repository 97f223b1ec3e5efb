"""The size of pages, and where host memory comes from."""

import pytest
import torch

from minilora.optim.transfer import BlockingTransfer, CudaTransfer


def test_pages_start_at_what_is_free_and_halve_to_the_smallest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for free, expected in ((10**12, 64 * 2**20), (2**24, 2**22), (0, 2**16)):
        monkeypatch.setattr(BlockingTransfer, "free_bytes", lambda self, free=free: free)
        transfer = BlockingTransfer(torch.device("cpu"))
        assert transfer.choose_page_bytes() == expected

        halved = 0
        while transfer.halve_page():
            halved += 1
        assert transfer.choose_page_bytes() == 2**16 == expected >> halved


def test_without_pinned_memory_it_is_pageable_and_a_warning_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    transfer = CudaTransfer(torch.device("cpu"))
    empty_like = torch.empty_like

    def no_pins(like: torch.Tensor, pin_memory: bool = False, **rest: object) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty_like(like, **rest)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(torch, "empty_like", no_pins)
    says = r"no pinned memory .*CUDA error: out of memory.*using pageable memory from now on"
    with pytest.warns(UserWarning, match=says) as caught:
        states = [transfer.empty_on_host(torch.ones(4, 3).T, torch.float32) for _ in range(2)]
    assert len(caught) == 1

    for state in states:
        assert state.shape == (3, 4) and state.stride() == (1, 3)
        assert state.device.type == "cpu"
