"""Fine-tuning in several processes: the steps of one process, and one writer."""

import contextlib
import io
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run

from minilora.training import FinetuneConfig, Interrupted, finetune, loop

SETTINGS: dict[str, Any] = {
    "lr": 1e-3,
    "max_length": 80,
    "eval_fraction": 0.2,
    "batch_size": 4,
    "grad_accum": 2,
    "steps": 20,
    "eval_every": 10,
    "samples": 1,
    "save_every": 10,
    "r": 4,
}

# What one process and several may differ by: sums of float32 in another order, through 20 updates
# of the adapters. The bar that the losses are held to.
TOLERANCE = 1e-5


def trained(rank: int, *settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains once with each of these settings; what this process got and printed."""
    # On any machine the same: where bfloat16 is fast, it would be chosen, and rounding shows.
    torch.cpu.get_capabilities = dict
    return [_trained(FinetuneConfig(**each)) for each in settings]


def _trained(config: FinetuneConfig) -> dict[str, Any]:
    printed, error = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            result = finetune(config)
        except (ValueError, OSError) as caught:
            return {"error": f"{type(caught).__name__}: {caught}", "printed": printed.getvalue()}
    return {
        "losses": [step.loss for step in result.history],
        "norms": [step.grad_norm for step in result.history],
        "held_out": [result.eval_before, result.eval_after],
        "answers": [sample.after for sample in result.samples],
        "printed": printed.getvalue(),
        "error": error,
    }


@pytest.fixture(scope="module")
def settings(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Returns a function that makes the settings of a run in a folder of its own."""
    path = tmp_path_factory.mktemp("runs")
    words = ("yes", "no", "perhaps", "never")
    lines = [{"prompt": f"say {word}", "completion": word.upper()} for word in words * 5]
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def make(out: str, **changes: Any) -> dict[str, Any]:
        paths = {"model": str(folder), "data": str(path / "data.jsonl"), "out": str(path / out)}
        return paths | SETTINGS | changes

    return make


@pytest.fixture(scope="module")
def alone(settings: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What one process gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict)
        return _trained(FinetuneConfig(**settings("alone")))


def interrupted_and_resumed(
    rank: int, settings: dict[str, Any], copies: list[str]
) -> dict[str, Any]:
    """Trains until a signal reaches the last process alone in step 8, and resumes a copy."""
    torch.cpu.get_capabilities = dict
    losses, calls = loop.token_losses, [0]

    def signalled(model: Any, batch: Any) -> Any:
        calls[0] += model.training
        if rank == 1 and model.training and calls[0] == 8:
            signal.raise_signal(signal.SIGTERM)
        return losses(model, batch)

    loop.token_losses = signalled
    try:
        finetune(FinetuneConfig(**settings))
    except Interrupted as stopped:
        told = str(stopped)
    loop.token_losses = losses
    if rank == 0:
        for copy in copies:
            shutil.copytree(settings["out"], copy)
    resumed = _trained(FinetuneConfig(**(settings | {"resume": True})))
    return {"told": told, "resumed": resumed}


def test_a_run_stops_together_and_goes_on_with_any_number_of_processes(
    settings: Callable[..., dict[str, Any]],
    alone: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine, theirs = settings("stopped"), settings("copy", resume=True)
    mine["save_every"] = 0
    ends = run(2, interrupted_and_resumed, mine, [theirs["out"]], group=False)
    for end in ends:
        assert end["told"].startswith("stopped by SIGTERM after step 8; the checkpoint is ")
        assert differences(end["resumed"]["losses"], alone["losses"]) < TOLERANCE

    # Dropout is off, so that the generators, which differ, are not asked.
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    again = _trained(FinetuneConfig(**theirs))
    assert again["losses"][:8] == ends[0]["resumed"]["losses"][:8]
    assert differences(again["losses"], alone["losses"]) < TOLERANCE
    assert differences(again["held_out"], alone["held_out"]) < TOLERANCE


def differences(mine: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(("size", "shard"), [(2, False), (2, True)])
def test_the_steps_are_those_of_one_process_and_one_process_writes(
    size: int, shard: bool, settings: Callable[..., dict[str, Any]], alone: dict[str, Any]
) -> None:
    name = f"of-{size}-{shard}"
    ran = run(size, trained, settings(name, shard=shard), group=False)
    first, *others = (one for (one,) in ran)
    assert first["error"] is None
    assert differences(first["losses"], alone["losses"]) < TOLERANCE
    assert differences(first["held_out"], alone["held_out"]) < TOLERANCE
    assert first["answers"] == alone["answers"]

    # Every process knows the same, and the first one alone prints.
    for other in others:
        assert other == first | {"printed": ""}
    assert first["printed"].count("step  1/20") == 1

    out = Path(settings(name)["out"])
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in Path(settings("alone")["out"]).iterdir()
    )
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 20
