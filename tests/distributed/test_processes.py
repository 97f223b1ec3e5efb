"""The tool that runs a function in several processes."""

import time

import pytest
import torch.distributed as dist
from processes import run


def fails_alone(rank: int) -> None:
    if rank == 1:
        raise ValueError("this one fails")
    dist.barrier()


def waits(rank: int) -> None:
    print(f"rank {rank} waits", flush=True)
    time.sleep(60)


def test_a_rank_that_fails_ends_the_others() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank [01] ended with 1.*this one fails"):
        run(2, fails_alone)


@pytest.mark.soak
def test_processes_that_take_too_long_are_killed() -> None:
    with pytest.raises(AssertionError, match=r"(?s)more than 30 s.*rank 0 waits.*rank 1 waits"):
        run(2, waits, timeout=30)
