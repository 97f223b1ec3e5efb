"""The folder of a checkpoint: damage is found, a disk that fills up leaves earlier checkpoints."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupted import contents
from made_up import made_up_step

import minilora
from minilora.files.tensors import read_tensors
from minilora.training import checkpoints
from minilora.training.callbacks import to_jsonl
from minilora.training.checkpoints import find_damage, save_checkpoint
from minilora.training.restoring import restore_checkpoint
from minilora.training.run_state import RunState, read_run


def trained(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = minilora.inject(torch.nn.Sequential(torch.nn.Linear(4, 3)), r=2)
    optimizer = torch.optim.AdamW(minilora.adapter_parameters(model))
    for _ in range(steps):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    return model, optimizer


def test_a_manifest_that_leaves_out_a_file_is_damage(tmp_path: Path) -> None:
    path = save(tmp_path, *trained(1), step=1)
    hashes = json.loads((path / "manifest.json").read_text())
    for name in hashes:
        rest = {other: value for other, value in hashes.items() if other != name}
        (path / "manifest.json").write_text(json.dumps(rest))
        assert find_damage(path) == f"manifest.json does not list {name}"


def save(
    out: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, keep: int = 2
) -> Path:
    history = [made_up_step(i + 1) for i in range(step)]
    (out / "metrics.jsonl").write_bytes(to_jsonl(history).encode())
    return save_checkpoint(out, RunState({}, history=history), model, optimizer, keep)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A checkpoint, and the bytes of its files."""
    out = tmp_path_factory.mktemp("small")
    path = save(out, *trained(1), step=1)
    return path, {p.name: p.read_bytes() for p in path.iterdir()}


@given(st.data())
@settings(max_examples=200)
def test_a_flipped_bit_anywhere_is_found(
    small: tuple[Path, dict[str, bytes]], data: st.DataObject
) -> None:
    path, files = small
    name = data.draw(st.sampled_from(sorted(files)))
    bit = data.draw(st.integers(0, 8 * len(files[name]) - 1))
    harmed = bytearray(files[name])
    harmed[bit // 8] ^= 1 << bit % 8
    (path / name).write_bytes(harmed)
    found = find_damage(path)
    (path / name).write_bytes(files[name])
    assert (found is None) == (name == checkpoints.MANIFEST and same_json(harmed, files[name]))
    assert find_damage(path) is None


def same_json(harmed: bytes, original: bytes) -> bool:
    """A space of the manifest that became another white space does not matter."""
    try:
        return bool(json.loads(harmed) == json.loads(original))
    except ValueError:
        return False


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "owner_and_name",
    [
        (Path, "mkdir"),
        (Path, "write_text"),
        (checkpoints, "write_tensors"),
        (os, "fsync"),
        (Path, "rename"),
    ],
)
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full", "interrupt"])
def test_a_disk_that_fills_up_leaves_the_checkpoints_before(
    owner_and_name: tuple[Any, str],
    call: int,
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, name = owner_and_name
    for step in (1, 2):
        save(tmp_path, *trained(step), step=step)
    folder = tmp_path / "checkpoints"
    before, calls, original = contents(folder), [0], getattr(owner, name)

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise error
        return original(*args, **kwargs)

    # The second rename is of the oldest one, to remove it.
    removing = name == "rename" and call == 2
    three = trained(3)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        try:
            save(tmp_path, *three, step=3)
        except OSError as failed:
            done = "1 could not be removed" if removing else "3 could not be written"
            assert f"step-0000000{done}" in str(failed) and "No space left" in str(failed)
        except KeyboardInterrupt:
            pass
        else:
            # Saving makes fewer calls of this kind.
            assert calls[0] < call
            return
    after = contents(folder)
    assert after == before if not removing else after.items() > before.items()
    save(tmp_path, *three, step=3)
    assert [p.name for p in sorted(folder.iterdir())] == [
        "step-00000002",
        "step-00000003",
    ]


def test_optimizer_states_are_not_views_of_a_file_that_will_be_removed(tmp_path: Path) -> None:
    path = save(tmp_path, *trained(2), step=2)
    model, optimizer = trained(0)
    restore_checkpoint(path, read_run(path, tmp_path), model, optimizer)
    tensors, _ = read_tensors(path / "optimizer.safetensors")
    held = optimizer.state_dict()["state"]
    assert all(
        torch.equal(tensors[f"{i}.{name}"], value)
        for i, state in held.items()
        for name, value in state.items()
    )

    # Overwritten in place: what is mapped from the file would change.
    with (path / "optimizer.safetensors").open("r+b") as file:
        file.write(b"\xff" * 4096)
    assert all(bool(value.isfinite().all()) for state in held.values() for value in state.values())
