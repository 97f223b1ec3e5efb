"""The training loop and the command line, on a tiny Llama with a byte-level tokenizer."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import minilora
from minilora.cli import app
from minilora.huggingface.loading import pick_device
from minilora.training import loop as recipe
from minilora.training.data import IGNORE, Example, collate
from minilora.training.loop import FinetuneConfig, evaluate, finetune, token_losses, train


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    lines = [
        {"prompt": f"say {word}", "completion": word.upper()}
        for word in ("yes", "no", "perhaps", "never") * 5
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def configure(folder: Path, data: Path, out: Path, **changes: Any) -> FinetuneConfig:
    settings: dict[str, Any] = {
        "lr": 1e-2,
        "steps": 12,
        "batch_size": 4,
        "max_length": 80,
        "eval_fraction": 0.2,
    } | changes
    return FinetuneConfig(str(folder), str(data), str(out), **settings)


def examples(lengths: list[int]) -> list[Example]:
    g = torch.Generator().manual_seed(0)
    found = []
    for n in lengths:
        ids = torch.randint(0, 256, (n,), generator=g).tolist()
        found.append(Example(ids, [IGNORE] * (n // 2) + ids[n // 2 :]))
    return found


def test_a_run_learns_and_its_adapter_gives_the_same_model(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    result = finetune(configure(folder, data, tmp_path / "run", steps=30))
    assert result.eval_before is not None and result.eval_after is not None
    assert (
        result.eval_after < 0.5 * result.eval_before
    )  # four words, shown again and again: they are learned by heart
    written = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert written == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "metrics.jsonl",
    ]
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["loss"] for line in lines] == [step.loss for step in result.history]

    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(
        folder, dtype=next(result.model.parameters()).dtype
    )
    minilora.load_adapter(minilora.quantize(fresh), tmp_path / "run")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(ids).logits, result.model.eval()(ids).logits)


def test_the_same_seed_gives_the_same_run_and_the_base_never_changes(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    runs = [
        finetune(configure(folder, data, tmp_path / str(i), steps=4, dropout=0.1)) for i in range(2)
    ]
    assert [s.loss for s in runs[0].history] == [s.loss for s in runs[1].history]
    assert (
        finetune(configure(folder, data, tmp_path / "c", steps=4, seed=1)).history[0].loss
        != runs[0].history[0].loss
    )

    from transformers import AutoModelForCausalLM

    fresh = minilora.quantize(
        AutoModelForCausalLM.from_pretrained(folder, dtype=next(runs[0].model.parameters()).dtype)
    )
    trained = runs[0].model.state_dict()
    assert all(torch.equal(trained[key], value) for key, value in fresh.state_dict().items())


def test_a_step_that_runs_out_of_memory_is_run_again_and_changes_no_bit(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 4, "dropout": 0.1, "grad_accum": 2, "batch_size": 2, "eval_fraction": 0.0}
    calm = finetune(configure(folder, data, tmp_path / "calm", **settings))
    losses, calls = recipe.token_losses, []

    def fail(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = losses(model, batch)
        calls.append(len(calls))
        if (
            len(calls) in (2, 7)
        ):  # the second micro-batch of the first step, then the first of the third (the first ran twice)
            torch.rand(7)
            raise torch.OutOfMemoryError("out of memory, says the test")
        return loss

    monkeypatch.setattr(recipe, "token_losses", fail)
    hit = finetune(configure(folder, data, tmp_path / "hit", **settings))
    assert len(calls) == 8 + 1 + 2
    assert [(s.loss, s.grad_norm) for s in hit.history] == [
        (s.loss, s.grad_norm) for s in calm.history
    ]
    pairs = zip(*(minilora.adapter_parameters(run.model) for run in (hit, calm)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_without_quantize_the_base_stays_dense(folder: Path, data: Path, tmp_path: Path) -> None:
    result = finetune(
        configure(
            folder,
            data,
            tmp_path / "run",
            steps=1,
            quantize=False,
            eval_fraction=0.0,
            targets=["q_proj"],
        )
    )
    assert not any(isinstance(m, minilora.NF4Linear) for m in result.model.modules())
    assert result.eval_before is None


def test_accumulation_weighs_every_learned_token_alike(tiny_llama: Any) -> None:
    """Batches of 4 x 2 and 8 x 1 give one gradient, though the micro-batches hold different numbers of learned tokens."""
    found = []
    for size, accum in ((8, 1), (4, 2), (2, 4)):
        model = minilora.inject(tiny_llama(), r=4)
        for p in minilora.adapter_parameters(model):
            p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel()))
        config = FinetuneConfig("", "", "", steps=1, batch_size=size, grad_accum=accum, clip=1e9)
        batch = [
            Example([i % 128 for i in e.ids], [i % 128 if i >= 0 else i for i in e.labels])
            for e in examples([3, 30, 5, 17] * 2)
        ]
        found.append(next(train(model, batch, config, pad=0)))
    # float32 sums in another order: of the order of 2^-24 times the number of terms, about 100
    assert all(math.isclose(s.loss, found[0].loss, rel_tol=1e-5) for s in found)
    assert all(math.isclose(s.grad_norm, found[0].grad_norm, rel_tol=1e-5) for s in found)


def test_the_head_sees_the_learned_tokens_alone_and_the_loss_is_the_same(tiny_llama: Any) -> None:
    model = tiny_llama().eval()
    batch = {
        k: v % 128 if k == "input_ids" else v for k, v in collate(examples([9, 4, 13]), 0).items()
    }
    batch["labels"] = torch.where(batch["labels"] >= 0, batch["labels"] % 128, IGNORE)
    rows: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda _, args, out: rows.append(out.shape[0]))
    loss = token_losses(model, batch)
    handle.remove()
    assert rows == [int((batch["labels"][:, 1:] != IGNORE).sum())]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
        :, :-1
    ]
    full = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, full, rtol=1e-5, atol=0)


def test_the_evaluation_does_not_depend_on_the_batch(tiny_llama: Any) -> None:
    model = tiny_llama().train()
    data = [
        Example([i % 128 for i in e.ids], [i % 128 if i >= 0 else i for i in e.labels])
        for e in examples([9, 4, 13, 6, 20])
    ]
    one, many = evaluate(model, data, batch_size=1), evaluate(model, data, batch_size=5)
    assert math.isclose(one, many, rel_tol=1e-5) and model.training


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = minilora.inject(tiny_llama(), r=2)
    before = [p.clone() for p in minilora.adapter_parameters(model)]
    monkeypatch.setattr(
        recipe,
        "token_losses",
        lambda model, batch: (
            model.lm_head.weight.sum() * 0
            + model.model.layers[0].mlp.up_proj.lora_B.sum() * math.nan
        ),
    )
    with pytest.raises(
        FloatingPointError, match=r"step 1: the loss is nan.*parameters are those of step 0"
    ):
        next(
            train(model, examples([5, 6]), FinetuneConfig("", "", "", steps=1, batch_size=2), pad=0)
        )
    assert all(
        torch.equal(p, q) for p, q in zip(before, minilora.adapter_parameters(model), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"steps": 0}, "steps=0"),
        ({"eval_fraction": 1.0}, "eval_fraction"),
        ({"lr": -1.0}, "lr=-1"),
        ({"epochs": 0.0, "steps": None}, "epochs=0"),
        ({"max_length": 0}, "max_length=0"),
    ],
)
def test_a_config_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig("m", "d", "o", **change)


def test_bad_input_is_refused_before_anything_is_written(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="'q_porj' matches no linear layer"):
        finetune(configure(folder, data, out, targets=["q_porj"]))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        finetune(configure(folder, tmp_path / "nowhere.jsonl", out))
    with pytest.raises(ValueError, match="cannot be loaded as a causal language model"):
        finetune(configure(tmp_path / "no-model", data, out))
    with pytest.raises(ValueError, match="max_length=8"):
        finetune(configure(folder, data, out, max_length=8))
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"device='cuda': this PyTorch .* sees no GPU"):
        pick_device("cuda")


def minilora_command(*args: str) -> "subprocess.CompletedProcess[str]":
    code = "from minilora.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *args],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_line_from_data_to_merged_model(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    run, merged = str(tmp_path / "run"), str(tmp_path / "merged")
    done = minilora_command(
        "finetune",
        "--model",
        str(folder),
        "--data",
        str(data),
        "--out",
        run,
        "--steps",
        "3",
        "--lr",
        "0.01",
    )
    assert done.returncode == 0, done.stderr
    assert (
        "held out" in done.stdout and "%|" not in done.stderr
    )  # no progress bar where the output is no terminal
    done = minilora_command(
        "generate",
        "--model",
        str(folder),
        "--adapter",
        run,
        "--prompt",
        "say yes",
        "--max-new-tokens",
        "3",
    )
    assert done.returncode == 0, done.stderr
    done = minilora_command("merge", "--model", str(folder), "--adapter", run, "--out", merged)
    assert done.returncode == 0, done.stderr

    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(merged)
    adapted = AutoModelForCausalLM.from_pretrained(folder, dtype=whole.dtype)
    minilora.merge(minilora.load_adapter(minilora.quantize(adapted), run))
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), adapted.state_dict().values(), strict=True)
    )


def test_an_error_on_the_command_line_is_one_line(tmp_path: Path, folder: Path) -> None:
    done = minilora_command(
        "finetune",
        "--model",
        str(folder),
        "--data",
        "nowhere.jsonl",
        "--out",
        str(tmp_path / "run"),
    )
    assert (
        done.returncode == 1
        and "minilora: nowhere.jsonl is not there" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_the_flags_of_the_command_line_are_frozen() -> None:
    import typer

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    flags = {
        name: sorted(o for p in command.params for o in (*p.opts, *p.secondary_opts))
        for name, command in commands.items()
    }
    assert flags == {
        "demo": ["--out", "--seed", "--steps"],
        "finetune": sorted(
            "--model --data --out --r --alpha --targets --dropout --lr --steps --epochs --batch-size --grad-accum --max-length "
            "--quantize --no-quantize --learn-prompt --no-learn-prompt --eval-fraction --seed --device "
            "--checkpointing --no-checkpointing --save-every --keep --resume --no-resume".split()
        ),
        "generate": sorted(
            "--model --prompt --adapter --max-new-tokens --quantize --no-quantize --device".split()
        ),
        "merge": sorted("--model --adapter --out --quantize --no-quantize".split()),
        "plan": sorted("--model --r --targets --quantize --no-quantize".split()),
    }
