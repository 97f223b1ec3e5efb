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
from minilora.training.one_of_many import check_processes
from minilora.training.result import ReleasedModel

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


def trained(rank: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains with these settings; what this process got and printed."""
    # On any machine the same: where bfloat16 is fast, it would be chosen, and rounding shows.
    torch.cpu.get_capabilities = dict
    return _trained(FinetuneConfig(**settings))


def interrupted(rank: int, settings: dict[str, Any]) -> str:
    """Trains until a signal reaches the second process alone, in step 8; what the run says."""
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
        return str(stopped)
    finally:
        loop.token_losses = losses
    return "it was not interrupted"


def several(
    rank: int, replicated: dict[str, Any], sharded: dict[str, Any], copy: str
) -> dict[str, Any]:
    """What a process gets: replicated; and sharded, interrupted, copied, and resumed replicated."""
    found: dict[str, Any] = {"replicated": trained(rank, replicated)}
    found["stopped"] = interrupted(rank, sharded)
    if rank == 0:
        shutil.copytree(sharded["out"], copy)
    found["resumed"] = trained(rank, sharded | {"resume": True})
    return found | {"base": adapter_base(sharded["out"])}


def adapter_base(out: str) -> str:
    """What an adapter's files name as the model that it belongs to."""
    config = json.loads(Path(out, "adapter_config.json").read_text())
    return str(config["base_model_name_or_path"])


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


def differences(mine: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(mine, theirs, strict=True))


def check_equal(mine: dict[str, Any], alone: dict[str, Any]) -> None:
    """Whether a run had the losses and the answers of one process."""
    assert mine["error"] is None
    assert differences(mine["losses"], alone["losses"]) < TOLERANCE
    assert differences(mine["held_out"], alone["held_out"]) < TOLERANCE
    assert mine["answers"] == alone["answers"]


def names(out: str) -> list[str]:
    return sorted(path.name for path in Path(out).iterdir())


def test_two_processes_replicated_or_sharded_stopped_and_resumed_are_as_one(
    settings: Callable[..., dict[str, Any]],
    alone: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replicated = settings("replicated")
    sharded = settings("sharded", shard=True, save_every=0)
    copy = settings("copy", resume=True)
    first, second = run(2, several, replicated, sharded, copy["out"], group=False)

    check_equal(first["replicated"], alone)
    check_equal(first["resumed"], alone)

    # Both processes know the same, and the first one alone prints and writes.
    for what in ("replicated", "resumed"):
        assert second[what] == first[what] | {"printed": ""}
        assert first[what]["printed"].count("step 20/20") == 1
    written = names(settings("alone")["out"])
    assert names(replicated["out"]) == written
    # No process could quantize a model that it does not hold.
    assert names(sharded["out"]) == sorted([*written, "base-4bit"])
    assert "in 4 bits it is in" in first["resumed"]["printed"]
    assert first["base"] == adapter_base(settings("alone")["out"])
    for out in (replicated["out"], sharded["out"]):
        assert len(Path(out, "metrics.jsonl").read_text().splitlines()) == 20

    # The signal of one has stopped both, in the same step; and one process can go on from there.
    for told in (first["stopped"], second["stopped"]):
        assert told.startswith("stopped by SIGTERM after step 8; the checkpoint is ")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    again = _trained(FinetuneConfig(**copy))
    assert again["losses"][:8] == first["resumed"]["losses"][:8]
    check_equal(again, alone)


@pytest.mark.soak
@pytest.mark.parametrize("shard", [False, True])
def test_four_processes_are_as_one_and_resume_what_two_have_saved(
    shard: bool, settings: Callable[..., dict[str, Any]], alone: dict[str, Any]
) -> None:
    name = f"four-{shard}"
    whole, stopped = settings(f"{name}-whole", shard=shard), settings(name, save_every=0)
    for ran in run(4, trained, whole, group=False):
        check_equal(ran, alone)
    for told in run(2, interrupted_in_float32, stopped, group=False):
        assert told.startswith("stopped by SIGTERM after step 8")
    for ran in run(4, trained, stopped | {"resume": True, "shard": shard}, group=False):
        check_equal(ran, alone)


def interrupted_in_float32(rank: int, settings: dict[str, Any]) -> str:
    torch.cpu.get_capabilities = dict
    return interrupted(rank, settings)


def test_what_the_processes_cannot_share_is_refused(
    settings: Callable[..., dict[str, Any]],
) -> None:
    config = FinetuneConfig(**settings("refused"))
    with pytest.raises(ValueError, match=r"is 8 examples per step, which 3 processes cannot share"):
        check_processes(config, 3)
    check_processes(config, 4)
    trusting = FinetuneConfig(**settings("refused", shard=True, trust_remote_code=True))
    with pytest.raises(ValueError, match=r"runs no code of a model's: leave out trust_remote_code"):
        check_processes(trusting, 2)
    with pytest.raises(ValueError, match=r"shard=True needs several processes"):
        finetune(FinetuneConfig(**settings("refused", shard=True)))


def test_the_model_of_a_sharded_run_says_that_it_is_released() -> None:
    with pytest.raises(ValueError, match=r"released at its end: .*load_adapter\(model, 'runs/a'\)"):
        ReleasedModel(Path("runs/a"))(torch.zeros(1))
