"""What processes send through gloo is what `plan` says, and the benchmark counts it rightly."""

import socket
import sys

import pytest
from bench_scripts import load
from processes import run

pytest.importorskip("transformers", reason="the model is transformers'")

# Here, and not in a function: the processes are forked when all has been imported. fully_shard
# imports the compiler when it is first used.
import torch._dynamo  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: F401

wire = load("wire")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux counts what is sent")

# Messages have headers: 4 kB in a step of these, of 500 kB at least.
WITHIN = 0.02

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "dtype": "float32",
}


def measured_and_planned(rank: int, grad_accum: int) -> dict[str, list[float]]:
    """Way -> bytes per step: measured, as planned, and as planned for gloo."""
    config = LlamaConfig(**SIZES)
    found = {}
    for way in wire.WAYS:
        sent = wire.measure(way, config, r=32, length=8, grad_accum=grad_accum, steps=2)
        found[way] = [sent, *wire.planned(way, config, r=32, grad_accum=grad_accum)]
    return found


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [2, 4])
def test_each_process_sends_what_is_planned(ranks: int) -> None:
    for found in run(ranks, measured_and_planned, 2):
        for way, (sent, total, on_gloo) in found.items():
            assert total >= 500_000, way
            assert sent == pytest.approx(on_gloo, rel=WITHIN), way


def test_what_a_connection_sends_is_counted_once() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sender,
        server.accept()[0] as receiver,
    ):
        before = wire.sent_bytes()
        sender.sendall(bytes(100_000))
        received = 0
        while received < 100_000:
            received += len(receiver.recv(1 << 16))
        assert wire.sent_bytes() - before == 100_000


def test_the_script_says_how_it_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["wire.py"])
    with pytest.raises(SystemExit, match=r"torchrun --nproc-per-node 2 wire\.py"):
        wire.main()
