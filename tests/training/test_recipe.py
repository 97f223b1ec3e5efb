"""A whole run on a tiny model: it learns, it is deterministic, it refuses what cannot work."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import FINISHED
from torch import nn

import minilora
from minilora.huggingface.activation_checkpointing import gradient_checkpointing
from minilora.training import FinetuneConfig, finetune, loop, recipe

Configure = Callable[..., FinetuneConfig]


def fresh_base(folder: Path, like: nn.Module) -> Any:
    """The base of a trained model, loaded again and quantized."""
    from transformers import AutoModelForCausalLM

    dtype = next(like.parameters()).dtype
    return minilora.quantize(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


def test_a_run_learns_and_its_adapter_gives_the_same_model(
    folder: Path, configure: Configure
) -> None:
    """Four words, shown again and again: they are learned by heart."""
    result = finetune(configure(steps=30, batch_size=4))
    assert result.eval_before is not None and result.eval_after is not None
    assert result.eval_after < 0.5 * result.eval_before
    assert sorted(p.name for p in result.out.iterdir()) == FINISHED
    lines = (result.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [vars(step) for step in result.history]
    assert json.loads((result.out / "config.json").read_text())["steps"] == 30

    fresh = minilora.load_adapter(fresh_base(folder, result.model), result.out)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(ids).logits, result.model.eval()(ids).logits)


def test_the_same_seed_gives_the_same_run_and_the_base_never_changes(
    folder: Path, tmp_path: Path, configure: Configure
) -> None:
    def run(name: str, seed: int = 0) -> Any:
        return finetune(
            configure(out=str(tmp_path / name), steps=4, batch_size=4, dropout=0.1, seed=seed)
        )

    first, second, other = run("first"), run("second"), run("other", seed=1)
    assert [s.loss for s in first.history] == [s.loss for s in second.history]
    assert other.history[0].loss != first.history[0].loss

    trained = first.model.state_dict()
    base = fresh_base(folder, first.model).state_dict()
    assert all(torch.equal(trained[key], value) for key, value in base.items())


def test_a_run_says_in_one_line_when_a_model_computes_its_own_loss(
    tmp_path: Path,
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"steps": 1, "batch_size": 2, "eval_fraction": 0.0}
    finetune(configure(out=str(tmp_path / "chunks"), **settings))
    assert "its own loss" not in capsys.readouterr().out

    def no_output_embeddings(_: Any) -> None:
        return None

    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", no_output_embeddings)
    finetune(configure(out=str(tmp_path / "whole"), **settings))
    lines = [line for line in capsys.readouterr().out.splitlines() if "its own loss" in line]
    assert len(lines) == 1
    assert lines[0].startswith("LlamaForCausalLM computes its own loss, with the logits of all")


def test_a_step_that_runs_out_of_memory_is_run_again_and_changes_no_bit(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 4, "dropout": 0.1, "grad_accum": 2, "batch_size": 2, "eval_fraction": 0.0}
    calm = finetune(configure(out=str(tmp_path / "calm"), **settings))
    losses, calls = loop.token_losses, [0]

    def fail(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Fails in the second micro-batch of step 1 and, after it was repeated, the first of 3."""
        loss = losses(model, batch)
        calls[0] += 1
        if calls[0] in (2, 7):
            torch.rand(7)
            raise torch.OutOfMemoryError("out of memory, says the test")
        return loss

    monkeypatch.setattr(loop, "token_losses", fail)
    hit = finetune(configure(out=str(tmp_path / "hit"), **settings))
    assert calls[0] == 8 + 1 + 2
    found, expected = ([(s.loss, s.grad_norm) for s in r.history] for r in (hit, calm))
    assert found == expected
    pairs = zip(*(minilora.adapter_parameters(run.model) for run in (hit, calm)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_without_quantize_the_base_stays_dense(configure: Configure) -> None:
    settings = {"quantize": False, "eval_fraction": 0.0, "targets": ["q_proj"]}
    result = finetune(configure(steps=1, **settings))
    assert not any(isinstance(m, minilora.NF4Linear) for m in result.model.modules())
    assert result.eval_before is None


@pytest.mark.parametrize(
    ("quantize", "asked", "used"),
    [(True, None, 1), (False, None, 0), (True, False, 0), (False, True, 1), (True, True, 1)],
)
def test_gradient_checkpointing_is_used_with_a_quantized_base_or_as_the_config_says(
    quantize: bool,
    asked: bool | None,
    used: int,
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered = []

    @contextmanager
    def spy(model: Any) -> Iterator[None]:
        entered.append(model)
        with gradient_checkpointing(model):
            yield

    monkeypatch.setattr(recipe, "gradient_checkpointing", spy)
    settings = {"steps": 1, "batch_size": 2, "eval_fraction": 0.0}
    finetune(configure(quantize=quantize, checkpointing=asked, **settings))
    assert len(entered) == used


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"targets": ["q_porj"]}, ValueError, "'q_porj' matches no linear layer"),
        ({"data": "nowhere.jsonl"}, FileNotFoundError, r"nowhere\.jsonl does not exist"),
        ({"model": "no-model"}, ValueError, "cannot be loaded as a causal language model"),
        ({"max_length": 8}, ValueError, "max_length=8"),
    ],
)
def test_invalid_input_is_refused_before_anything_is_written(
    changes: dict[str, Any], error: type[Exception], message: str, configure: Configure
) -> None:
    config = configure(**changes)
    with pytest.raises(error, match=message):
        finetune(config)
    assert not Path(config.out).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_named(configure: Configure) -> None:
    with pytest.raises(ValueError, match=r"device='cuda': this PyTorch .* sees no GPU"):
        finetune(configure(device="cuda"))
