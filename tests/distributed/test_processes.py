"""The tool that runs a function in several processes."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from processes import run


def total(rank: int, factor: int) -> list[int]:
    value = torch.tensor(rank + 1)
    dist.all_reduce(value)
    return [rank, int(os.environ["WORLD_SIZE"]), factor * int(value), torch.get_num_threads()]


def fails_alone(rank: int) -> None:
    if rank == 1:
        raise ValueError("this one fails")
    dist.barrier()


def waits(rank: int) -> None:
    print(f"rank {rank} waits", flush=True)
    time.sleep(60)


def test_each_rank_returns_its_result() -> None:
    assert run(3, total, 2) == [[0, 3, 12, 1], [1, 3, 12, 1], [2, 3, 12, 1]]


def test_a_rank_that_fails_ends_the_others() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 ended with 1.*this one fails"):
        run(2, fails_alone)


@pytest.mark.soak
def test_processes_that_take_too_long_are_killed() -> None:
    with pytest.raises(AssertionError, match=r"(?s)more than 30 s.*rank 0 waits.*rank 1 waits"):
        run(2, waits, timeout=30)
