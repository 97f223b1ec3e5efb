"""minilora plan: a batch, a shape, and what fits a GPU."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_folder import shared
from transformers_folders import store_in_4bit

import minilora
from minilora.cli import app
from minilora.reports.formatting import format_bytes
from minilora.reports.largest_batch import LENGTHS, RANKS, RESERVED


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    app(["plan", *map(str, arguments)], standalone_mode=False)
    return capsys.readouterr().out


def test_a_plan_of_a_batch(capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared() / "model"
    batch = ["--batch-size", 4, "--length", 64]
    said = run(capsys, "--model", folder, *batch, "--no-checkpointing", "--dropout", 0.1)
    expected = minilora.plan(
        str(folder), 16, batch_size=4, length=64, checkpointing=False, dropout=0.1
    )
    assert said == f"{expected}\n"
    assert "4 x 64 tokens without gradient checkpointing" in said

    dense = run(capsys, "--model", folder, *batch, "--no-quantize")
    assert "quantized" not in dense and "without gradient checkpointing" in dense


def test_a_model_in_4_bits_is_planned_as_finetune_takes_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    stored = store_in_4bit(shared() / "model", tmp_path / "stored")
    said = run(capsys, "--model", stored, "--batch-size", 2, "--length", 32)
    model = minilora.load(stored)[0]
    expected = minilora.plan(model, 16, quantize=False, batch_size=2, length=32)
    assert said == f"{replace(expected, model=str(stored))}\n"
    assert "quantized" in said and "reading" not in said
    with pytest.raises(ValueError, match=r"stored in 4 bits.*--no-quantize"):
        run(capsys, "--model", stored, "--no-quantize")


def test_a_shape_is_planned_without_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "--model", "smollm2-135m", "--r", 8)
    assert said == f"{minilora.plan('smollm2-135m', 8)}\n"


def test_what_fits_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "--model", "smollm2-135m", "--r", 32, "--gpu", "2GB")
    table = said[said.index("largest batch size in 2.00 GB") :].splitlines()
    assert table[1].split() == ["tokens", *map(str, LENGTHS)]
    ranks = sorted({*RANKS, 32})
    assert [row.split()[0] for row in table[2 : 2 + len(ranks)]] == [f"r={r}" for r in ranks]

    one = run(capsys, "--model", "smollm2-135m", "--gpu", "2GB", "--length", 700, "--batch-size", 2)
    size = int(re.findall(r"r=16 +(\d+)", one)[0])
    needed = [
        minilora.plan("smollm2-135m", 16, batch_size=n, length=700).total_bytes
        for n in (size, size + 1)
    ]
    assert needed[0] <= 10**9 < needed[1]
    assert f"2 x 700 tokens with gradient checkpointing: {format_bytes(needed[0])}"[:10] in one


def test_a_length_alone_is_for_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "--model", "smollm2-135m", "--gpu", "2GB", "--length", 256)
    assert "plus activations" in said and "tokens  256" in said
    with pytest.raises(ValueError, match=r"length=256 without batch_size.*\(--batch-size\)"):
        run(capsys, "--model", "smollm2-135m", "--length", 256)


def test_several_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    batch = ["--batch-size", 1, "--length", 64, "--grad-accum", 2]
    said = run(capsys, "--model", "smollm2-135m", *batch, "--gpus", 4, "--bandwidth", "10GB")
    plan = minilora.plan("smollm2-135m", 16, batch_size=1, length=64, grad_accum=2)
    assert said == f"{plan}\n{plan.on_gpus(4).table(10**10)}\n"
    assert "4 GPUs, 1 x 64 tokens per forward pass on each" in said
    assert "hidden up to" in said and "at 10.00 GB per second" in said


def test_what_fits_each_of_several_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    memory = 1_300_000_000
    said = run(capsys, "--model", "smollm2-135m", "--gpus", 2, "--gpu", "1.3GB", "--length", 512)
    assert "2 GPUs\n" in said and "total: plus activations" in said
    found = [
        [int(size) for size in re.findall(r"^  r=16 +(\d+)$", table, re.MULTILINE)]
        for table in re.split("on each of 2 GPUs: largest batch size in 1.30 GB", said)[1:]
    ]
    (ddp,), (sharded,) = found
    for size, name in ((ddp, "ddp"), (sharded, "sharded")):
        needed = []
        for n in (size, size + 1):
            plan = minilora.plan("smollm2-135m", 16, batch_size=n, length=512)
            share = getattr(plan.on_gpus(2), name)
            needed.append(sum(share.memory.values()) + RESERVED)
        assert needed[0] <= memory < needed[1], name


def test_errors_come_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("gpu", "bandwidth"):
        for text in ("lots", ""):
            with pytest.raises(ValueError, match=f"{option}='{text}' is not an amount of memory"):
                run(capsys, "--model", "no-such-model", f"--{option}", text)
    with pytest.raises(ValueError, match="length=0"):
        run(capsys, "--model", "smollm2-135m", "--gpu", "2GB", "--length", 0)
    with pytest.raises(ValueError, match="gpus=0: must be"):
        run(capsys, "--model", "no-such-model", "--gpus", 0)
    with pytest.raises(ValueError, match=r"bandwidth without .* \(--gpus\)"):
        run(capsys, "--model", "no-such-model", "--bandwidth", "10GB")
    with pytest.raises(ValueError, match=r"did you mean llama-65b"):
        run(capsys, "--model", "llama-66b")
