"""Bytes that each process sends in a training step, counted by its sockets, against the plan.

    torchrun --nproc-per-node 2 tests/bench/wire.py
    torchrun --nproc-per-node 4 tests/bench/wire.py --model tinyllama --length 16

QLoRA with DDP and with FSDP2 over gloo, on models with random weights: nothing is downloaded. The
kernel counts what each TCP connection has sent, so that other programs do not disturb the figures,
not even others on the loopback device. For this it has to be Linux.

gloo has no reduce-scatter of its own: PyTorch has it sum everything everywhere, which sends twice
what the plan counts for it. The column "gloo" adds that to the column "plan".
"""

import argparse
import gc
import os
import socket
import struct
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import minilora
from minilora.distributed import shard
from minilora.huggingface.activation_checkpointing import gradient_checkpointing
from minilora.reports.formatting import format_bytes
from minilora.reports.shapes import shape_config

WAYS = ("DDP", "FSDP2")

# Where `struct tcp_info` of linux/tcp.h holds two counters of 64 bits.
BYTES_SENT, BYTES_RETRANSMITTED = 200, 208


def sent_bytes() -> int:
    """Returns what the open TCP connections of this process have sent, each byte once."""
    total = 0
    for path in list(Path("/proc/self/fd").iterdir()):
        # The folder itself was open while it was listed, and is no longer.
        with suppress(OSError), socket.socket(fileno=os.dup(int(path.name))) as connection:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            (sent,) = struct.unpack_from("Q", info, BYTES_SENT)
            (again,) = struct.unpack_from("Q", info, BYTES_RETRANSMITTED)
            total += sent - again
    return total


def measure(way: str, config: Any, r: int, length: int, grad_accum: int, steps: int) -> float:
    """Trains on gloo and returns the bytes that this process sends per step.

    Args:
        way: "DDP" or "FSDP2".
        config: a transformers config; the weights are random.
        r: rank of the adapters.
        length: tokens of the one sequence in each forward pass.
        grad_accum: number of forward passes per step.
        steps: number of steps, after one that is not counted.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype).train()
    minilora.inject(minilora.quantize(model), r)
    wrapped: Any = shard(model) if way == "FSDP2" else _replicate(model)
    ids = torch.arange(length)[None] % config.vocab_size

    with gradient_checkpointing(model):
        _step(wrapped, ids, grad_accum)
        dist.barrier()
        before = sent_bytes()
        for _ in range(steps):
            _step(wrapped, ids, grad_accum)
        # Everybody has received what was sent.
        dist.barrier()
        found = (sent_bytes() - before) / steps
    # What holds a communicator goes before the process group does.
    del model, wrapped
    gc.collect()
    return found


def _step(wrapped: Any, ids: torch.Tensor, grad_accum: int) -> None:
    """The passes of a step: the gradients are summed over the processes in the last."""
    for i in range(grad_accum):
        last = i == grad_accum - 1
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_backward_grad_sync = last
        else:
            wrapped.set_requires_gradient_sync(last)
        wrapped(input_ids=ids, labels=ids).loss.backward()
    wrapped.zero_grad()


def _replicate(model: torch.nn.Module) -> DistributedDataParallel:
    """Without buffers, which are the same everywhere."""
    with warnings.catch_warnings():
        # PyTorch 2.9 has no other name for it.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
        return DistributedDataParallel(model, broadcast_buffers=False)


def planned(way: str, config: Any, r: int, grad_accum: int) -> tuple[int, int]:
    """Returns what `plan` says that each process sends per step, and what that is on gloo."""
    plan = minilora.plan(config, r, grad_accum=grad_accum).on_gpus(dist.get_world_size())
    traffic = (plan.ddp if way == "DDP" else plan.sharded).traffic
    return traffic.total, traffic.total + traffic.reduce_scatter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2-135m", help="name of a shape")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--length", type=int, default=32, help="tokens per forward pass")
    parser.add_argument("--grad-accum", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=2, help="steps that are counted")
    args = parser.parse_args()
    if sys.platform != "linux":
        sys.exit("what a connection has sent is what Linux says of it, and this is another system")
    if "RANK" not in os.environ:
        sys.exit(f"start it with: torchrun --nproc-per-node 2 {sys.argv[0]}")

    config = shape_config(args.model)
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    if first:
        print(f"{args.model}, {dist.get_world_size()} processes; sent by each per step\n")
        print("| way | forward passes | plan | gloo | measured | measured / gloo |")
        print("|---|---:|---:|---:|---:|---:|")
    for way in WAYS:
        for grad_accum in args.grad_accum:
            found = measure(way, config, args.rank, args.length, grad_accum, args.steps)
            if first:
                total, on_gloo = planned(way, config, args.rank, grad_accum)
                shown = " | ".join(map(format_bytes, (total, on_gloo, found)))
                print(f"| {way} | {grad_accum} | {shown} | {found / on_gloo:.4f} |", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
