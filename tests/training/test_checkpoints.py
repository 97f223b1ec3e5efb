"""A run that was stopped and resumed gives the bits of one that was not; what cannot be resumed is refused by name."""

import errno
import json
import math
import random
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupted import Outcome, in_step, interrupt, run
from torch import Tensor

import minilora
from minilora.training import checkpoints as resume
from minilora.training import loop as recipe
from minilora.training.checkpoints import Interrupted, newest, present
from minilora.training.loop import FinetuneConfig, finetune

STEPS = 5
SETTINGS: dict[str, Any] = {
    "lr": 1e-2,
    "steps": STEPS,
    "batch_size": 2,
    "grad_accum": 2,
    "dropout": 0.1,
    "r": 4,
}
LIMITS: dict[str, Any] = {"max_length": 80, "eval_fraction": 0.2, "save_every": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [
        {"prompt": f"say {word}", "completion": word.upper()}
        for word in ("yes", "no", "perhaps", "never") * 5
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


Configure = Callable[..., FinetuneConfig]


@pytest.fixture
def configure(folder: Path, data: Path, tmp_path: Path) -> Configure:
    def make(**changes: Any) -> FinetuneConfig:
        return FinetuneConfig(
            **(
                {"model": str(folder), "data": str(data), "out": str(tmp_path / "run")}
                | SETTINGS
                | LIMITS
                | changes
            )
        )

    return make


@pytest.fixture(scope="module")
def whole(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run that nobody interrupts."""
    random.seed(0)
    np.random.seed(0)
    out = tmp_path_factory.mktemp("whole")
    return run(FinetuneConfig(str(folder), str(data), str(out), **SETTINGS, **LIMITS))


@pytest.fixture(autouse=True)
def the_same_start() -> None:
    random.seed(0)
    np.random.seed(0)


# ---- to the bit


@pytest.mark.parametrize("step", range(1, STEPS + 1))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_at_any_step_and_resumed_is_as_if_uninterrupted(
    step: int, number: int, configure: Configure, whole: Outcome
) -> None:
    stopped = interrupt(configure(), step, number)
    assert (
        stopped.signal == number
        and f"after step {step}" in str(stopped)
        and "--resume" in str(stopped)
    )
    assert [p.name for p in present(Path(configure().out))] == [f"step-{step:08}"]
    assert run(configure(resume=True)).agrees(whole)


def test_interrupted_again_and_again_is_as_if_uninterrupted(
    configure: Configure, whole: Outcome
) -> None:
    interrupt(configure(), 1)
    for _ in range(STEPS - 2):
        interrupt(configure(resume=True), 1)
    assert run(configure(resume=True)).agrees(whole)


@pytest.mark.parametrize(("every", "crash", "from_step"), [(1, 4, 3), (2, 4, 2), (3, 5, 3)])
def test_after_a_crash_the_steps_since_the_checkpoint_are_done_again(
    every: int, crash: int, from_step: int, configure: Configure, whole: Outcome
) -> None:
    """No handler runs: metrics.jsonl holds steps that the checkpoint does not know."""

    def die() -> None:
        raise RuntimeError("out of luck")

    with in_step(crash, die), pytest.raises(RuntimeError):
        finetune(configure(save_every=every))
    metrics = Path(configure().out) / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == crash - 1
    with metrics.open("a") as file:
        file.write('{"step": 4, "lo')  # a line cut short
    assert newest(Path(configure().out)).name == f"step-{from_step:08}"
    assert run(configure(resume=True, save_every=every)).agrees(whole)


def test_what_does_not_decide_the_bits_may_change(
    configure: Configure, whole: Outcome, data: Path, tmp_path: Path
) -> None:
    interrupt(configure(), 2)
    shutil.copy(data, tmp_path / "elsewhere.jsonl")
    (tmp_path / "run").rename(tmp_path / "moved")
    free: dict[str, Any] = {"device": "cpu", "checkpointing": False, "save_every": 1, "keep": 1}
    moved = configure(
        out=str(tmp_path / "moved"), data=str(tmp_path / "elsewhere.jsonl"), resume=True, **free
    )
    assert run(moved).agrees(whole)


def test_the_comparison_sees_every_part(
    whole: Outcome, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thing that a checkpoint holds is needed: left out, the outcome is another one."""
    interrupt(configure(), 2)
    out, kept = Path(configure().out), Path(configure().out + "-kept")
    shutil.copytree(out, kept)
    load = minilora.PagedAdamW.load_state_dict
    for owner, name, instead in (
        (resume, "load_adapter", lambda *_, **__: None),
        (resume, "set_random_states", lambda *_: None),
        (
            minilora.PagedAdamW,
            "load_state_dict",
            lambda optimizer, state: load(optimizer, state | {"state": {}}),
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, instead)
            assert not run(configure(resume=True)).agrees(whole)
        shutil.rmtree(out)
        shutil.copytree(kept, out)
    assert run(configure(resume=True)).agrees(whole)


def test_every_random_state_comes_back() -> None:
    def draw() -> list[float]:
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            *torch.randn(3).tolist(),
        ]

    draw()  # one of a pair of Gaussians is now kept for the next call
    states = json.loads(json.dumps(resume.random_states(torch.device("cpu"))))
    drawn = draw()
    assert draw() != drawn
    resume.set_random_states(states, torch.device("cpu"))
    assert draw() == drawn


# ---- what is on the disk


def test_a_checkpoint_is_an_adapter_and_json_and_nothing_pickled(
    configure: Configure, folder: Path
) -> None:
    from transformers import AutoModelForCausalLM

    interrupt(configure(), 3)
    path = newest(Path(configure().out))
    names = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "metrics.jsonl",
        "optimizer.safetensors",
        "run.json",
    ]
    assert sorted(p.name for p in path.iterdir()) == names
    minilora.load_adapter(AutoModelForCausalLM.from_pretrained(folder), path)
    assert [
        json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2, 3]


def test_the_last_ones_are_kept_and_none_when_the_run_is_done(configure: Configure) -> None:
    out = Path(configure().out)
    interrupt(configure(save_every=1, keep=3), 4)
    assert [p.name for p in present(out)] == ["step-00000002", "step-00000003", "step-00000004"]
    finetune(configure(save_every=1, resume=True))
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "metrics.jsonl",
    ]


# ---- what is not whole


def cut(path: Path) -> None:
    file = path / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def remove(path: Path) -> None:
    (path / "run.json").unlink()


def no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def half_a_manifest(path: Path) -> None:
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:50])


def flip(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)


@pytest.mark.parametrize("harm", [cut, remove, no_manifest, half_a_manifest, flip])
def test_a_checkpoint_that_is_not_whole_is_skipped_by_name(
    harm: Callable[[Path], None], configure: Configure, whole: Outcome
) -> None:
    interrupt(configure(save_every=1), 3)
    harm(Path(configure().out) / "checkpoints" / "step-00000003")
    with pytest.warns(UserWarning, match=r"step-00000003 is skipped: "):
        assert run(configure(resume=True, save_every=1)).agrees(
            whole
        )  # and step 3 is saved again, over the damaged one


def test_with_none_whole_there_is_nothing_to_resume(configure: Configure) -> None:
    with pytest.raises(FileNotFoundError, match=r"run holds no checkpoint .*Leave out --resume"):
        finetune(configure(resume=True))
    interrupt(configure(save_every=1), 2)
    for path in present(Path(configure().out)):
        cut(path)
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(FileNotFoundError, match="none of the 2 checkpoints"),
    ):
        finetune(configure(resume=True))


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_run_that_cannot_save_stops_with_the_reason(
    configure: Configure, whole: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, steps = resume.write_tensors, [0]

    def full(path: Path, *rest: Any) -> None:
        steps[0] += 1
        if steps[0] == 3:
            raise FULL
        write(path, *rest)

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"step-00000003 could not be written.*No space left"),
    ):
        patch.setattr(resume, "write_tensors", full)
        finetune(configure(save_every=1))
    assert run(configure(resume=True)).agrees(whole)


# ---- what is refused


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


CHANGES: dict[str, Any] = {
    "seed": 1,
    "lr": 2e-2,
    "batch_size": 1,
    "grad_accum": 1,
    "steps": 9,
    "dropout": 0.0,
    "r": 8,
    "targets": "q_proj",
    "clip": 2.0,
    "quantize": False,
    "weight_decay": 0.1,
    "max_length": 70,
    "eval_fraction": 0.1,
    "learn_prompt": True,
    "alpha": 3.0,
    "epochs": 2.0,
    "model": "another",
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_config_is_refused_by_name_and_nothing_is_touched(
    name: str, configure: Configure
) -> None:
    out, facts = Path(configure().out), json.loads(json.dumps(vars(configure())))
    model = minilora.inject(
        torch.nn.Sequential(torch.nn.Linear(4, 3)), r=2
    )  # another model: the config is looked at first
    optimizer = torch.optim.AdamW(minilora.adapter_parameters(model))
    resume.save(out, resume.Run(facts, metrics=["{}\n"]), model, optimizer, keep=2)
    before, value = contents(out), CHANGES[name]
    with pytest.raises(
        ValueError, match=rf"step-00000001 was made with {name}=.*, not {value!r}: "
    ):
        finetune(configure(resume=True, **{name: value}))
    assert contents(out) == before


def test_every_field_of_the_config_is_compared_or_is_free() -> None:
    assert CHANGES.keys() | resume.FREE == FinetuneConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    ("was", "now"), [("NEVER", "NEVEr"), ("say never", "say neveR")], ids=["answer", "question"]
)
def test_other_data_is_refused(
    was: str, now: str, configure: Configure, data: Path, tmp_path: Path
) -> None:
    interrupt(configure(), 1)
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace(was, now))
    with pytest.raises(ValueError, match=r"other\.jsonl gives other examples .*step-00000001"):
        finetune(configure(resume=True, data=str(other)))


def test_a_new_run_does_not_start_over_an_unfinished_one(configure: Configure) -> None:
    interrupt(configure(), 1)
    before = contents(Path(configure().out))
    with pytest.raises(
        ValueError,
        match=r"not finished: go on with it \(--resume, resume=True\), or remove .*checkpoints to start",
    ):
        finetune(configure())
    assert contents(Path(configure().out)) == before


# ---- signals


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_the_handlers_are_as_they_were_afterwards(configure: Configure) -> None:
    before, inside = handlers(), []
    with in_step(1, lambda: inside.extend(handlers())):
        finetune(configure(steps=1))
    assert handlers() == before and not set(inside) & set(before)
    interrupt(configure(), 1)
    assert handlers() == before


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not(
    configure: Configure, whole: Outcome
) -> None:
    def twice(number: int) -> Callable[[], None]:
        return lambda: [signal.raise_signal(number) for _ in range(2)] and None

    with in_step(1, twice(signal.SIGTERM)), pytest.raises(Interrupted):
        finetune(configure())
    before = handlers()
    with in_step(2, twice(signal.SIGINT)), pytest.raises(KeyboardInterrupt) as caught:
        finetune(configure(resume=True))
    assert type(caught.value) is KeyboardInterrupt and handlers() == before
    assert newest(Path(configure().out)).name == "step-00000001"
    assert run(configure(resume=True)).agrees(whole)


def test_a_signal_that_is_ignored_stays_ignored(configure: Configure) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a process in the background
    try:
        with in_step(1, lambda: signal.raise_signal(signal.SIGINT)):
            assert len(finetune(configure(steps=2)).history) == 2
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_a_run_works_without_handlers(configure: Configure) -> None:
    before, found = handlers(), []
    thread = threading.Thread(target=lambda: found.append(finetune(configure(steps=2))))
    thread.start()
    thread.join()
    assert len(found[0].history) == 2 and handlers() == before


# ---- a loss that is not finite


def test_a_loss_that_is_not_finite_names_the_examples_and_the_last_checkpoint(
    configure: Configure, whole: Outcome, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = recipe.token_losses, [0]

    def poisoned(model: Any, batch: dict[str, Tensor]) -> Tensor:
        calls[0] += model.training
        return original(model, batch) * (
            math.nan if calls[0] == 6 else 1.0
        )  # the second half of step 3

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError) as caught:
        patch.setattr(recipe, "token_losses", poisoned)
        finetune(configure(save_every=2))
    message = str(caught.value)
    assert message.startswith("step 3: the loss is nan. The parameters are those of step 2;")
    assert message.count(f"({data}:") == 2 and message.count("example ") == 2  # of four in the step
    assert "The last checkpoint: " in message and "step-00000002" in message
    assert run(configure(resume=True)).agrees(whole)


def test_before_the_first_checkpoint_the_error_says_so(configure: Configure) -> None:
    def infinite(*_: Any, **__: Any) -> Tensor:
        return torch.tensor(math.inf)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(FloatingPointError) as caught:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", infinite)
        finetune(configure())
    assert str(caught.value).startswith(
        "step 1: the gradient's norm is inf. "
    ) and "there is none yet" in str(caught.value)
    assert str(caught.value).count("example ") == 4
