"""One process of several: its device, its share of a step, and who prints."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch

from minilora.distributed.processes import Processes, count_processes
from minilora.huggingface.loading import pick_device
from minilora.training.config import FinetuneConfig


def own_device(name: str | None) -> torch.device:
    """Returns the device of this process: of several on one machine, each has a GPU of its own.

    Raises:
        ValueError: see `pick_device`; or there are more processes than GPUs.
    """
    device = pick_device(name)
    if count_processes() == 1 or device.type != "cuda" or device.index is not None:
        return device
    own, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if own >= here:
        raise ValueError(
            f"this machine has {here} GPUs for {os.environ.get('LOCAL_WORLD_SIZE', own + 1)} "
            "processes: start as many as there are GPUs (torchrun --nproc-per-node)"
        )
    device = torch.device("cuda", own)
    torch.cuda.set_device(device)
    return device


def check_processes(config: FinetuneConfig, processes: int) -> None:
    """Raises ValueError unless so many processes can do what the config says.

    The examples of a step are shared equally.
    """
    if config.shard and processes == 1:
        raise ValueError(
            "shard=True needs several processes: start them with `torchrun --nproc-per-node N -m "
            "minilora finetune ... --shard`, or leave it out"
        )
    if config.shard and config.trust_remote_code:
        raise ValueError(
            "shard=True loads models that transformers has, and runs no code of a model's: leave "
            "out trust_remote_code (--trust-remote-code), or shard"
        )
    per_step = config.batch_size * config.grad_accum
    if per_step % processes:
        raise ValueError(
            f"batch_size={config.batch_size} times grad_accum={config.grad_accum} is {per_step} "
            f"examples per step, which {processes} processes cannot share equally: choose a "
            f"multiple of {processes}, or another number of processes"
        )


@contextmanager
def only_first_prints(processes: Processes) -> Iterator[None]:
    """Inside the block only the first process prints, warns and shows progress.

    The others would repeat it word for word. Errors are not held back.
    """
    if processes.is_first:
        yield
        return
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with (
            Path(os.devnull).open("w") as nowhere,
            redirect_stdout(nowhere),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        if had_bars:
            logging.enable_progress_bar()
