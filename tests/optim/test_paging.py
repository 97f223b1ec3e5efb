"""Pages: how they are cut, what is reported, and where host memory comes from."""

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minilora import PagedAdamW
from minilora.optim.paging import ALIGN, CudaLane, Paging, PlainLane, Update, cut


def update(n: int, gaps: bool) -> Update:
    param = torch.empty(n, 2)[:, 0] if gaps else torch.empty(n)
    return Update(param, torch.empty(n), torch.empty(n), torch.empty(n), 1.0, False)


@given(
    st.lists(st.tuples(st.integers(0, 700), st.booleans()), max_size=12),
    st.integers(1, 5).map(lambda n: n * ALIGN),
)
def test_pages_hold_every_element_once_aligned_and_within_the_limit(
    sizes: list[tuple[int, bool]], limit: int
) -> None:
    updates = [update(n, gaps) for n, gaps in sizes]
    pages = list(cut(updates, limit))
    found: dict[int, list[int]] = {id(u): [] for u in updates}
    for pieces, size in pages:
        end = 0
        for piece in pieces:
            assert (
                piece.offset % ALIGN == 0
                and piece.offset >= end
                and piece.start % ALIGN == 0
                and piece.length > 0
            )
            end = piece.offset + piece.length
            found[id(piece.update)] += range(piece.start, piece.start + piece.length)
        assert end <= size and size % ALIGN == 0
        assert size <= limit or (len(pieces) == 1 and not pieces[0].update.can_be_cut)
    assert all(found[id(u)] == list(range(u.param.numel())) for u in updates)


def test_small_tensors_share_a_page_and_a_large_one_is_cut() -> None:
    pages = list(cut([update(10, False), update(20, False), update(1000, False)], limit=256))
    assert [[p.length for p in pieces] for pieces, _ in pages] == [
        [10, 20],
        [256],
        [256],
        [256],
        [232],
    ]


def test_what_has_gaps_cannot_be_cut_and_has_a_page_of_its_own() -> None:
    pages = list(cut([update(10, False), update(1000, True), update(10, False)], limit=256))
    assert [([p.length for p in pieces], size) for pieces, size in pages] == [
        ([10], 64),
        ([1000], 1024),
        ([10], 64),
    ]


def test_the_report_counts_what_moved() -> None:
    layer = nn.Linear(30, 10)  # 310 parameters, 2480 bytes of states
    optimizer = PagedAdamW(layer.parameters())
    assert repr(optimizer.paging).startswith("Paging(states on the device; 0 pages")

    def step() -> Paging:
        layer(torch.ones(1, 30)).sum().backward()
        optimizer.step()
        return optimizer.paging

    step()
    assert optimizer.paging == Paging()
    assert optimizer.page_out() == 2480
    report = step()
    assert (report.since, report.pages, report.bytes_in, report.bytes_out) == (2, 1, 2480, 2 * 2480)
    assert report.milliseconds > 0
    assert repr(report).startswith(
        "Paging(states on the host since step 2; 1 pages of up to 67.1 MB; 0.0 MB in"
    )
    assert optimizer.page_in() == 2480
    spent = report.milliseconds
    assert (step().since, report.pages, report.bytes_in, report.milliseconds) == (
        None,
        1,
        2 * 2480,
        spent,
    )


def test_pages_start_at_what_is_free_and_halve_to_the_smallest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for free, expected in ((10**12, 64 * 2**20), (2**24, 2**22), (0, 2**16)):
        monkeypatch.setattr(PlainLane, "free_bytes", lambda self, free=free: free)
        lane = PlainLane(torch.device("cpu"))
        assert lane.choose_page() == expected
        halved = 0
        while lane.halve_page():
            halved += 1
        assert lane.choose_page() == 2**16 == expected >> halved


def test_pinned_memory_that_cannot_be_had_is_pageable_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    lane = CudaLane(torch.device("cpu"))
    make = torch.empty_like

    def no_pins(like: torch.Tensor, pin_memory: bool = False, **rest: object) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return make(like, **rest)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(torch, "empty_like", no_pins)
    with pytest.warns(
        UserWarning,
        match=r"no pinned memory .*CUDA error: out of memory.*pageable memory from here on",
    ) as caught:
        states = [lane.host_like(torch.ones(4, 3).T) for _ in range(2)]
    assert len(caught) == 1
    assert all(
        s.shape == (3, 4) and s.stride() == (1, 3) and s.device.type == "cpu" for s in states
    )


def test_states_of_a_try_that_failed_are_gone_before_the_next_one(
    monkeypatch: pytest.MonkeyPatch, allocator: Any
) -> None:
    """Or a step that halves its pages would hold the new states twice, and the host run out."""
    layer = nn.Linear(30, 10)
    optimizer = PagedAdamW(layer.parameters(), page="always")
    layer(torch.ones(1, 30)).sum().backward()
    made, alive, new_state, make_room = [], [], PagedAdamW._new_state, PagedAdamW._make_room

    def remember(self: PagedAdamW, *args: Any) -> Any:
        state = new_state(self, *args)
        made.append(weakref.ref(state["exp_avg"]))
        return state

    def count(self: PagedAdamW, reason: str) -> None:
        alive.append(sum(state() is not None for state in made))
        make_room(self, reason)

    monkeypatch.setattr(PagedAdamW, "_new_state", remember)
    monkeypatch.setattr(PagedAdamW, "_make_room", count)
    with allocator(lambda k: k in (6, 14)):
        optimizer.step()
    assert len(made) >= 4 and alive == [0, 0]
