"""Cutting the parameters of a step into pages."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora.optim.pages import ALIGN, Page, Update, cut_into_pages


def update(n: int, gaps: bool = False) -> Update:
    param = torch.empty(n, 2)[:, 0] if gaps else torch.empty(n)
    return Update(param, torch.empty(n), torch.empty(n), torch.empty(n), step=1.0, on_host=False)


def lengths(pages: list[Page]) -> list[list[int]]:
    return [[chunk.length for chunk in page.chunks] for page in pages]


@given(
    st.lists(st.tuples(st.integers(0, 700), st.booleans()), max_size=12),
    st.integers(1, 5).map(lambda n: n * ALIGN),
)
def test_pages_hold_every_element_once_aligned_and_within_the_limit(
    sizes: list[tuple[int, bool]], limit: int
) -> None:
    updates = [update(n, gaps) for n, gaps in sizes]
    found: dict[int, list[int]] = {id(u): [] for u in updates}

    for page in cut_into_pages({}, updates, limit):
        end = 0
        for chunk in page.chunks:
            assert chunk.offset % ALIGN == 0 and chunk.start % ALIGN == 0
            assert chunk.offset >= end
            assert chunk.length > 0
            end = chunk.offset + chunk.length
            found[id(chunk.update)] += range(chunk.start, chunk.start + chunk.length)

        assert end <= page.size and page.size % ALIGN == 0
        is_alone = len(page.chunks) == 1 and not page.chunks[0].update.can_be_cut
        assert page.size <= limit or is_alone

    assert all(found[id(u)] == list(range(u.param.numel())) for u in updates)


def test_small_tensors_share_a_page_and_a_large_one_is_cut() -> None:
    pages = list(cut_into_pages({}, [update(10), update(20), update(1000)], limit=256))
    assert lengths(pages) == [[10, 20], [256], [256], [256], [232]]


def test_what_has_gaps_cannot_be_cut_and_has_a_page_of_its_own() -> None:
    updates = [update(10), update(1000, gaps=True), update(10)]
    pages = list(cut_into_pages({}, updates, limit=256))
    assert lengths(pages) == [[10], [1000], [10]]
    assert [page.size for page in pages] == [64, 1024, 64]
