"""Moving states to the host and back, where memory runs out in the middle too."""

import pytest
import torch
from allocator import FailingAllocator
from paged_cases import THREE_STATES_BYTES, assert_same, small_pages, three_parameters
from small_models import paged_adamw, small_model


def test_a_half_moved_optimizer_works_and_finishes_moving_later() -> None:
    with small_pages():
        # Two states of each of three parameters.
        for k in range(6):
            optimizer, oracle, give_gradients = three_parameters("on_oom", steps=2)
            says = r"not enough host memory: cannot allocate .* bytes for a state of"
            with (
                FailingAllocator(lambda i, k=k: i == k),
                pytest.raises(MemoryError, match=says),
            ):
                optimizer.page_out()
            assert_same(optimizer, oracle)

            for _ in range(2):
                give_gradients()
                optimizer.step()
                oracle.step()
                assert_same(optimizer, oracle)

            if k % 2:
                # The device runs out again: first the rest moves, and pages keep their size.
                give_gradients()
                with FailingAllocator(lambda i: i == 0):
                    optimizer.step()
                oracle.step()
                assert optimizer.paging.page_bytes == 2**11
            else:
                moved = optimizer.page_out()
                assert moved < THREE_STATES_BYTES if k >= 2 else moved == THREE_STATES_BYTES

            assert optimizer.page_out() == 0
            assert_same(optimizer, oracle)


def test_page_in_moves_all_or_nothing() -> None:
    with small_pages():
        for k in range(6):
            optimizer, oracle, give_gradients = three_parameters("on_oom", steps=1)
            optimizer.page_out()
            with (
                FailingAllocator(lambda i, k=k: i == k),
                pytest.raises(torch.OutOfMemoryError, match="stay on the host"),
            ):
                optimizer.page_in()
            assert optimizer.paging.since == 2

            assert optimizer.page_in() == THREE_STATES_BYTES
            assert optimizer.paging.since is None

            give_gradients()
            optimizer.step()
            oracle.step()
            assert_same(optimizer, oracle)
            assert optimizer.paging.pages == 0


def test_moves_that_the_mode_excludes_are_refused() -> None:
    with pytest.raises(ValueError, match='page="never"'):
        paged_adamw(small_model(), "never").page_out()
    with pytest.raises(ValueError, match='page="always"'):
        paged_adamw(small_model(), "always").page_in()
