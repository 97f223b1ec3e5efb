"""Evaluation during training, and the best adapter: kept, saved, and the same after a resume."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import Outcome, interrupt, run
from made_up import made_up_step
from torch import nn

import minilora
from minilora.files.tensors import read_tensors, write_tensors
from minilora.training import FinetuneConfig, checkpoints, evaluation, finetune, recipe
from minilora.training.checkpoints import newest_checkpoint
from minilora.training.evaluation import BestAdapter, evaluated

Configure = Callable[..., FinetuneConfig]


@pytest.mark.parametrize(
    ("every", "due"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (9, [5])]
)
def test_the_hold_out_is_evaluated_every_so_many_steps_and_after_the_last(
    every: int, due: list[int]
) -> None:
    calls = iter(range(9))
    steps = list(evaluated(map(made_up_step, range(1, 6)), every, 5, lambda: float(next(calls))))
    assert [step.step for step in steps if step.eval_loss is not None] == due
    assert [step.eval_loss for step in steps if step.eval_loss is not None] == [*range(len(due))]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_hold_out_loss_that_is_no_number_stops_the_run(loss: float) -> None:
    with pytest.raises(
        FloatingPointError, match=f"the loss on the hold-out is {loss} after step 1"
    ):
        list(evaluated([made_up_step(1)], 1, 1, lambda: loss))


@pytest.mark.parametrize("save_every", [0, 1])
@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_hold_out_loss_before_training_that_is_no_number_stops_the_run(
    loss: float, save_every: int, resumable: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: loss)
    with pytest.raises(FloatingPointError, match=f"hold-out is {loss} before training: check"):
        finetune(resumable(eval_every=0, save_every=save_every))
    assert not (Path(resumable().out) / "config.json").exists()
    assert not list(Path(resumable().out).rglob("run.json"))


def test_a_hold_out_loss_after_training_that_is_no_number_names_the_adapter(
    resumable: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([2.0, float("nan")])
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: next(losses))
    config = resumable(eval_every=0, steps=1)
    message = re.escape(f"is nan after training (the adapter is saved in {config.out}/): check")
    with pytest.raises(FloatingPointError, match=message):
        finetune(config)
    assert (Path(config.out) / "adapter_model.safetensors").exists()
    assert not (Path(config.out) / "report.md").exists()


def adapted(value: float) -> nn.Module:
    model = minilora.inject(nn.Sequential(nn.Linear(4, 3)), r=2)
    fill(model, value)
    return model


@torch.no_grad()
def fill(model: nn.Module, value: float) -> None:
    for parameter in minilora.adapter_parameters(model):
        parameter.fill_(value)


def test_the_adapter_of_the_lowest_loss_is_put_back() -> None:
    """The first of equal ones, and a copy: later steps do not change it."""
    model, best = adapted(0.0), BestAdapter()
    with best.keeping(model) as after_step:
        for number, loss in enumerate((3.0, None, 2.0, 2.0, 5.0), start=1):
            fill(model, number)
            after_step(made_up_step(number, eval_loss=loss))
    assert (best.step, best.loss) == (3, 2.0)
    best.put_back(model)
    assert all(bool((p == 3).all()) for p in minilora.adapter_parameters(model))


def test_without_evaluations_the_last_adapter_stays() -> None:
    model, best = adapted(1.0), BestAdapter()
    with best.keeping(model) as after_step:
        after_step(made_up_step(1))
    fill(model, 2.0)
    best.put_back(model)
    assert best.step is None
    assert all(bool((p == 2).all()) for p in minilora.adapter_parameters(model))


@pytest.fixture
def overfitting(resumable: Configure, tmp_path: Path) -> Configure:
    """A run whose loss on other words is lowest in its middle."""
    path = tmp_path / "other.jsonl"
    lines = [{"prompt": f"say {word}", "completion": word.upper()} for word in ("maybe", "always")]
    path.write_text("\n".join(map(json.dumps, lines)))
    settings = {"eval_data": str(path), "lr": 3e-2, "steps": 10, "eval_every": 2}
    return lambda **changes: resumable(**(settings | changes))


def test_what_is_saved_is_the_adapter_of_the_best_step(
    overfitting: Configure, folder: Path
) -> None:
    result = finetune(overfitting())
    losses = {s.step: s.eval_loss for s in result.history if s.eval_loss is not None}
    assert list(losses) == [2, 4, 6, 8, 10]
    assert result.best_step == min(losses, key=losses.__getitem__)
    assert result.best_step < 10
    assert result.eval_after == losses[result.best_step] < losses[10]

    fresh = minilora.quantize(type(result.model).from_pretrained(folder))
    minilora.load_adapter(fresh, result.out)
    pairs = zip(*map(minilora.adapter_parameters, (fresh, result.model)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_adapter_of_the_best_step_is_that_of_a_run_which_saved_it_there(
    overfitting: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = finetune(overfitting(samples=0))
    seen: dict[int, list[Any]] = {}
    run_with = recipe.run_with

    def spy(callbacks: Any, steps: Any) -> Any:
        return run_with(callbacks, remembering(steps))

    def remembering(steps: Any) -> Any:
        for step in steps:
            (model,) = models
            seen[step.step] = [p.detach().clone() for p in minilora.adapter_parameters(model)]
            yield step

    models: list[nn.Module] = []
    make = recipe.make_optimizer
    monkeypatch.setattr(recipe, "make_optimizer", lambda m, c: models.append(m) or make(m, c))
    monkeypatch.setattr(recipe, "run_with", spy)
    finetune(overfitting(samples=0, overwrite=True))
    assert result.best_step is not None
    best = seen[result.best_step]
    assert all(map(torch.equal, best, minilora.adapter_parameters(result.model)))


def test_evaluations_change_no_bit_of_the_training(overfitting: Configure) -> None:
    """With dropout: an evaluation draws no random numbers."""
    with_them = finetune(overfitting())
    without = finetune(overfitting(eval_every=0, overwrite=True))
    assert [s.loss for s in with_them.history] == [s.loss for s in without.history]
    assert all(step.eval_loss is None for step in without.history)
    assert without.best_step is None and without.eval_after == with_them.history[-1].eval_loss


@pytest.fixture
def whole(overfitting: Configure, tmp_path: Path) -> Outcome:
    return run(overfitting(out=str(tmp_path / "whole")))


@pytest.mark.parametrize("step", [1, 3, 8, 10])
def test_a_resumed_run_ends_with_the_same_best_adapter(
    step: int, overfitting: Configure, whole: Outcome
) -> None:
    best = whole.evaluated[2]
    assert best is not None and best < 8
    interrupt(overfitting(), step)
    path = newest_checkpoint(Path(overfitting().out))
    assert (path / "best.safetensors").exists() == (step > 1)
    resumed = run(overfitting(resume=True))
    assert resumed.agrees(whole)


def test_without_the_copy_in_the_checkpoint_the_best_adapter_would_be_another(
    overfitting: Configure, whole: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(overfitting(), 8)
    monkeypatch.setattr(BestAdapter, "restore", lambda *_: None)
    assert not run(overfitting(resume=True)).agrees(whole)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda t: t.pop("0"), "it does not hold the 28 parameters of the adapters"),
        (lambda t: t.update(more=torch.zeros(1)), "it does not hold the 28 parameters"),
        (lambda t: t.update({"0": torch.zeros(3)}), r"0 is \[3\], not \[4, 64\]"),
        (lambda t: t["0"].fill_(float("nan")), "0 is not finite"),
        (lambda t: t.update({"0": t["0"].half()}), r"0 holds torch\.float16"),
    ],
)
def test_a_best_adapter_that_does_not_fit_is_refused_before_anything_changes(
    harm: Callable[[dict[str, torch.Tensor]], object], message: str, resumable: Configure
) -> None:
    interrupt(resumable(), 2)
    path = newest_checkpoint(Path(resumable().out))
    tensors = {k: t.clone() for k, t in read_tensors(path / "best.safetensors")[0].items()}
    harm(tensors)
    write_tensors(path / "best.safetensors", tensors, {})
    rehash(path)
    with pytest.raises(ValueError, match=r"best\.safetensors does not fit this run: " + message):
        finetune(resumable(resume=True))


def test_a_best_adapter_that_is_missing_is_refused(resumable: Configure) -> None:
    interrupt(resumable(), 2)
    path = newest_checkpoint(Path(resumable().out))
    (path / "best.safetensors").unlink()
    rehash(path)
    with pytest.raises(ValueError, match=r"best\.safetensors does not exist. restore it, or"):
        finetune(resumable(resume=True))


def rehash(path: Path) -> None:
    hashes = {
        file.name: checkpoints.sha256_of_file(file)
        for file in path.iterdir()
        if file.name != "manifest.json"
    }
    (path / "manifest.json").write_text(json.dumps(hashes))
