"""A run that was interrupted and resumed is bit-identical to one that was not.

What cannot be resumed is refused by name.
"""

import errno
import hashlib
import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import FINISHED, Outcome, contents, in_step, interrupt, run
from made_up import made_up_step
from torch import Tensor

import minilora
from minilora.files.tensors import read_tensors, write_tensors
from minilora.training import FinetuneConfig, checkpoints, finetune, loop, restoring
from minilora.training.callbacks import to_jsonl
from minilora.training.checkpoint_manager import MAY_CHANGE
from minilora.training.checkpoints import list_checkpoints, newest_checkpoint, save_checkpoint
from minilora.training.run_state import FORMAT, RunState

STEPS = 5

Configure = Callable[..., FinetuneConfig]


@pytest.mark.parametrize("step", range(1, STEPS + 1))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_at_any_step_and_resumed_is_as_if_uninterrupted(
    step: int, number: int, resumable: Configure, uninterrupted: Outcome
) -> None:
    stopped = interrupt(resumable(), step, number)
    assert stopped.signal == number
    assert f"after step {step}" in str(stopped) and "--resume" in str(stopped)
    assert [p.name for p in list_checkpoints(Path(resumable().out))] == [f"step-{step:08}"]
    assert run(resumable(resume=True)).agrees(uninterrupted)


def test_interrupted_again_and_again_is_as_if_uninterrupted(
    resumable: Configure, uninterrupted: Outcome
) -> None:
    interrupt(resumable(), 1)
    for _ in range(STEPS - 2):
        interrupt(resumable(resume=True), 1)
    assert run(resumable(resume=True)).agrees(uninterrupted)


@pytest.mark.parametrize(("every", "crash", "from_step"), [(1, 4, 3), (2, 4, 2), (3, 5, 3)])
def test_after_a_crash_the_steps_since_the_checkpoint_are_repeated(
    every: int, crash: int, from_step: int, resumable: Configure, uninterrupted: Outcome
) -> None:
    """No handler runs: metrics.jsonl holds steps that the checkpoint does not know."""

    def die() -> None:
        raise RuntimeError("out of luck")

    with in_step(crash, die), pytest.raises(RuntimeError):
        finetune(resumable(save_every=every))
    metrics = Path(resumable().out) / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == crash - 1

    # A line cut short.
    with metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    assert newest_checkpoint(Path(resumable().out)).name == f"step-{from_step:08}"
    assert run(resumable(resume=True, save_every=every)).agrees(uninterrupted)


def test_settings_that_do_not_decide_the_bits_may_change(
    resumable: Configure, uninterrupted: Outcome, data: Path, tmp_path: Path
) -> None:
    interrupt(resumable(), 2)
    shutil.copy(data, tmp_path / "elsewhere.jsonl")
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = resumable(
        out=str(tmp_path / "moved"),
        data=str(tmp_path / "elsewhere.jsonl"),
        resume=True,
        device="cpu",
        checkpointing=False,
        save_every=1,
        keep=1,
    )
    assert run(moved).agrees(uninterrupted)


def test_the_comparison_sees_every_part(
    uninterrupted: Outcome, resumable: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thing that a checkpoint holds is needed: without it, the outcome is another one."""
    interrupt(resumable(), 2)
    out, kept = Path(resumable().out), Path(resumable().out + "-kept")
    shutil.copytree(out, kept)
    load = minilora.PagedAdamW.load_state_dict

    def load_without_state(optimizer: Any, state: dict[str, Any]) -> None:
        load(optimizer, state | {"state": {}})

    for owner, name, instead in (
        (restoring, "load_adapter", lambda *_, **__: None),
        (restoring, "set_random_states", lambda *_: None),
        (minilora.PagedAdamW, "load_state_dict", load_without_state),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, instead)
            assert not run(resumable(resume=True)).agrees(uninterrupted)
        shutil.rmtree(out)
        shutil.copytree(kept, out)
    assert run(resumable(resume=True)).agrees(uninterrupted)


def test_a_checkpoint_is_an_adapter_and_json_and_nothing_pickled(
    resumable: Configure, folder: Path
) -> None:
    from transformers import AutoModelForCausalLM

    interrupt(resumable(), 3)
    path = newest_checkpoint(Path(resumable().out))
    assert sorted(p.name for p in path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "best.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "run.json",
    ]
    base = AutoModelForCausalLM.from_pretrained(folder)
    minilora.load_adapter(base, path, other_base=True)


def test_the_last_ones_are_kept_and_none_when_the_run_is_finished(resumable: Configure) -> None:
    out = Path(resumable().out)
    interrupt(resumable(save_every=1, keep=3), 4)
    names = [p.name for p in list_checkpoints(out)]
    assert names == ["step-00000002", "step-00000003", "step-00000004"]
    finetune(resumable(save_every=1, resume=True))
    assert sorted(p.name for p in out.iterdir()) == FINISHED


def cut(path: Path) -> None:
    file = path / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def remove(path: Path) -> None:
    (path / "run.json").unlink()


def no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def half_a_manifest(path: Path) -> None:
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:50])


def empty_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("{}")


def flip(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1
    file.write_bytes(flipped)


@pytest.mark.parametrize("harm", [cut, remove, no_manifest, half_a_manifest, empty_manifest, flip])
def test_a_damaged_checkpoint_is_skipped_by_name(
    harm: Callable[[Path], None], resumable: Configure, uninterrupted: Outcome
) -> None:
    """The run resumes from the one before, and saves step 3 again over the damaged one."""
    interrupt(resumable(save_every=1), 3)
    harm(Path(resumable().out) / "checkpoints" / "step-00000003")
    with pytest.warns(UserWarning, match=r"step-00000003 is skipped: "):
        resumed = run(resumable(resume=True, save_every=1))
    assert resumed.agrees(uninterrupted)


def test_without_an_intact_checkpoint_there_is_nothing_to_resume(resumable: Configure) -> None:
    with pytest.raises(FileNotFoundError, match=r"run contains no checkpoint .*leave out --resume"):
        finetune(resumable(resume=True))
    interrupt(resumable(save_every=1), 2)
    for path in list_checkpoints(Path(resumable().out)):
        cut(path)
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(FileNotFoundError, match="none of the 2 checkpoints"),
    ):
        finetune(resumable(resume=True))


def test_a_run_that_cannot_save_stops_with_the_reason(
    resumable: Configure, uninterrupted: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, steps = checkpoints.write_tensors, [0]

    def full(path: Path, *rest: Any) -> None:
        steps[0] += path.name == "optimizer.safetensors"
        if steps[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *rest)

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"step-00000003 could not be written.*No space left"),
    ):
        patch.setattr(checkpoints, "write_tensors", full)
        finetune(resumable(save_every=1))
    assert run(resumable(resume=True)).agrees(uninterrupted)


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
    "packing": True,
    "group_by_length": True,
    "eval_fraction": 0.1,
    "learn_prompt": True,
    "alpha": 3.0,
    "epochs": 2.0,
    "model": "another",
    "eval_every": 3,
    "samples": 1,
}


def save_one_of_another_model(config: FinetuneConfig) -> Path:
    """A checkpoint of step 1 with the config's settings. They are compared before the model is."""
    model = minilora.inject(torch.nn.Sequential(torch.nn.Linear(4, 3)), r=2)
    optimizer = torch.optim.AdamW(minilora.adapter_parameters(model))
    run = RunState({**vars(config), "quantize": True}, history=[made_up_step(1)])
    metrics = Path(config.out) / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(to_jsonl(run.history))
    return save_checkpoint(Path(config.out), run, model, optimizer, keep=2)


@pytest.mark.parametrize("name", CHANGES)
def test_another_config_is_refused_by_name_and_nothing_is_touched(
    name: str, resumable: Configure, folder: Path, tmp_path: Path
) -> None:
    out, value = Path(resumable().out), CHANGES[name]
    if name == "model":
        value = str(shutil.copytree(folder, tmp_path / value))
    save_one_of_another_model(resumable())
    before = contents(out)
    message = rf"step-00000001 belongs to a run with {name}=.*, not "
    with pytest.raises(ValueError, match=message):
        finetune(resumable(resume=True, **{name: value}))
    assert contents(out) == before


def test_every_field_of_the_config_is_compared_or_may_change() -> None:
    assert CHANGES.keys() | MAY_CHANGE == FinetuneConfig.__dataclass_fields__.keys()


def with_facts(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes what run.json says, and the manifest with it: an intact checkpoint."""
    facts = json.loads((path / "run.json").read_text())
    change(facts)
    (path / "run.json").write_text(json.dumps(facts))
    update_manifest(path)


def update_manifest(path: Path) -> None:
    files = [p for p in path.iterdir() if p.name != "manifest.json"]
    hashes = {p.name: checkpoints.sha256_of_file(p) for p in files}
    (path / "manifest.json").write_text(json.dumps(hashes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts.pop("format"), "an older version .*format 1; .* reads format"),
        (lambda facts: facts.update(format=FORMAT - 1), "an older version .*: finish the run with"),
        (lambda facts: facts.update(format=FORMAT + 1), "a newer version .*: update minilora"),
    ],
    ids=["none", "older", "newer"],
)
def test_a_checkpoint_of_another_format_is_refused_with_the_way_out(
    change: Callable[[dict[str, Any]], object], message: str, resumable: Configure
) -> None:
    out = Path(resumable().out)
    with_facts(save_one_of_another_model(resumable()), change)
    before = contents(out)
    with pytest.raises(ValueError, match=f"step-00000001 was written by {message}") as caught:
        finetune(resumable(resume=True))
    assert f"or remove {out / 'checkpoints'} to start over" in str(caught.value)
    assert "\n" not in str(caught.value) and contents(out) == before


def test_a_checkpoint_with_other_metrics_is_refused(resumable: Configure) -> None:
    path = save_one_of_another_model(resumable())
    line = b'{"step": 1, "loss": 2.0, "accuracy": 0.5}\n'
    (path.parents[1] / "metrics.jsonl").write_bytes(line)
    hash_ = hashlib.sha256(line).hexdigest()
    with_facts(path, lambda f: f.update(metrics_bytes=len(line), metrics_sha256=hash_))
    with pytest.raises(ValueError, match="a version of minilora with other metrics per step: "):
        finetune(resumable(resume=True))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (Path.unlink, "metrics.jsonl does not exist: .*step-00000002 was saved after 2 steps"),
        (lambda path: path.write_text(""), "metrics.jsonl is shorter than it was: "),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"1", b"2")), "not what it was: "),
    ],
    ids=["deleted", "emptied", "edited"],
)
def test_metrics_that_were_changed_are_refused(
    harm: Callable[[Path], object], message: str, resumable: Configure
) -> None:
    interrupt(resumable(), 2)
    out = Path(resumable().out)
    harm(out / "metrics.jsonl")
    before = contents(out)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        finetune(resumable(resume=True))
    assert contents(out) == before


def test_a_checkpoint_takes_as_much_space_after_many_steps_as_after_one(tmp_path: Path) -> None:
    """The metrics are written once, to metrics.jsonl, and not again in every checkpoint."""
    model = minilora.inject(torch.nn.Sequential(torch.nn.Linear(4, 3)), r=2)
    optimizer = torch.optim.AdamW(minilora.adapter_parameters(model))
    sizes = []
    for steps in (1, 5000):
        run = RunState({}, history=[made_up_step(i + 1) for i in range(steps)])
        (tmp_path / "metrics.jsonl").write_text(to_jsonl(run.history))
        path = save_checkpoint(tmp_path, run, model, optimizer, keep=2)
        sizes.append(sum(len(content) for content in contents(path).values()))
    assert sizes[1] - sizes[0] < 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["config"].pop("r"), "'r' are missing or unknown"),
        (lambda f: f["config"].update(more=1), "'more' are missing or unknown"),
        (lambda f: f.update(config=[]), r"run\.json is not what minilora wrote: config is \[\]"),
        (lambda f: f.update(lr=["x"]), r"lr is \['x'\]"),
        (lambda f: f.update(lr=[1e-3] * 3), "learning rates for 3 groups"),
        (lambda f: f.update(steps=7), "steps is 7"),
        (lambda f: f.pop("eval_before"), "eval_before is missing"),
        (lambda f: f.pop("answers"), "answers is missing"),
        (lambda f: f.update(answers=["YES", 3]), r"answers is \['YES', 3\]"),
        (lambda f: f.update(answers=["YES"]), "step-00000002 has 1 answers to 3 sample prompts"),
        (lambda f: f.update(format="3"), "newer version"),
        (lambda f: f["random"].update(torch="00"), "the state of torch is not one"),
        (lambda f: f["random"]["numpy"]["state"].update(pos=625), "the state of numpy is not one"),
        (lambda f: f["random"].update(python=[3, [0], None]), "the state of python is not one"),
        (lambda f: f.update(more="\x1b"), r"unknown entries \['more'\]"),
    ],
)
def test_a_run_json_that_nobody_wrote_is_refused_before_anything_changes(
    change: Callable[[dict[str, Any]], object], message: str, resumable: Configure
) -> None:
    interrupt(resumable(), 2)
    out = Path(resumable().out)
    with_facts(newest_checkpoint(out), change)
    before = contents(out)
    with pytest.raises(ValueError, match=message):
        finetune(resumable(resume=True))
    assert contents(out) == before


def test_a_manifest_opens_no_file_outside_of_the_checkpoint(resumable: Configure) -> None:
    interrupt(resumable(), 2)
    path = newest_checkpoint(Path(resumable().out))
    hashes = json.loads((path / "manifest.json").read_text())
    for name in ("/dev/zero", "../../metrics.jsonl"):
        (path / "manifest.json").write_text(json.dumps(hashes | {name: "0"}))
        assert checkpoints.find_damage(path) == f"{name} is missing"


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("x.step", torch.zeros(()), "'x.step' is no state of AdamW's"),
        ("99.step", torch.zeros(()), "the run has no parameter 99"),
        ("0.exp_avg", torch.zeros(3), r"0\.exp_avg is \[3\]"),
        ("0.exp_avg", None, "parameter 0 has no exp_avg"),
        ("0.step", torch.tensor(9.0), r"0\.step is not a number of steps up to 2"),
    ],
)
def test_states_that_do_not_fit_are_refused_before_anything_changes(
    key: str, tensor: Tensor | None, message: str, resumable: Configure
) -> None:
    interrupt(resumable(), 2)
    out = Path(resumable().out)
    path = newest_checkpoint(out)
    tensors = dict(read_tensors(path / "optimizer.safetensors")[0])
    tensors.pop(key, None)
    tensors = {k: t.clone() for k, t in tensors.items()} | ({} if tensor is None else {key: tensor})
    write_tensors(path / "optimizer.safetensors", tensors, {})
    update_manifest(path)
    before = contents(out)
    message = r"optimizer\.safetensors does not fit this run: .*" + message + ".*restore it, or"
    with pytest.raises(ValueError, match=message):
        finetune(resumable(resume=True))
    assert contents(out) == before


@pytest.mark.parametrize(
    ("was", "now"), [("NEVER", "NEVEr"), ("say never", "say neveR")], ids=["answer", "question"]
)
def test_other_data_is_refused(
    was: str, now: str, resumable: Configure, data: Path, tmp_path: Path
) -> None:
    interrupt(resumable(), 1)
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace(was, now))
    with pytest.raises(ValueError, match=r"other\.jsonl gives other examples .*step-00000001"):
        finetune(resumable(resume=True, data=str(other)))


def test_a_new_run_does_not_start_over_an_unfinished_one(resumable: Configure) -> None:
    interrupt(resumable(), 1)
    before = contents(Path(resumable().out))
    message = r"unfinished run: resume it \(--resume, resume=True\), or start over with --overwrite"
    with pytest.raises(ValueError, match=message):
        finetune(resumable())
    assert contents(Path(resumable().out)) == before


def test_a_loss_that_is_not_finite_names_the_examples_and_the_newest_checkpoint(
    resumable: Configure, uninterrupted: Outcome, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = loop.token_losses, [0]

    def poisoned(model: Any, batch: dict[str, Tensor]) -> Tensor:
        """NaN in the second half of step 3."""
        calls[0] += model.training
        return original(model, batch) * (math.nan if calls[0] == 6 else 1.0)

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError) as caught:
        patch.setattr(loop, "token_losses", poisoned)
        finetune(resumable(save_every=2))
    message = str(caught.value)
    assert message.startswith("step 3: the loss is nan. The parameters are those after step 2;")
    assert "The newest checkpoint: " in message and "step-00000002" in message

    # Two of the four examples in the step.
    assert message.count(f"({data}:") == 2 and message.count("example ") == 2
    assert run(resumable(resume=True)).agrees(uninterrupted)


def test_before_the_first_checkpoint_the_error_says_so(resumable: Configure) -> None:
    def infinite(*_: Any, **__: Any) -> Tensor:
        return torch.tensor(math.inf)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(FloatingPointError) as caught:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", infinite)
        finetune(resumable())
    message = str(caught.value)
    assert message.startswith("step 1: the norm of the gradients is inf. ")
    assert "there is none yet" in message and message.count("example ") == 4
