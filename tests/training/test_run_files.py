"""The folder of a checkpoint: a damaged one is found, a disk that fills up leaves those that were there."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora
from minilora.files.tensors import read_tensors
from minilora.training import checkpoints as resume


def trained(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = minilora.inject(torch.nn.Sequential(torch.nn.Linear(4, 3)), r=2)
    optimizer = torch.optim.AdamW(minilora.adapter_parameters(model))
    for _ in range(steps):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    return model, optimizer


def save(
    out: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, keep: int = 2
) -> Path:
    return resume.save(out, resume.Run({}, metrics=["{}\n"] * step), model, optimizer, keep)


# ---- what is damaged


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
    try:
        found = resume.damage(path)
        same_hashes = name == resume.MANIFEST and json.loads(harmed) == json.loads(
            files[name]
        )  # a space turned into another
    except ValueError:
        same_hashes = False
    finally:
        (path / name).write_bytes(files[name])
    assert (found is None) == same_hashes
    assert resume.damage(path) is None


# ---- what cannot be written


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "owner_and_name",
    [
        (Path, "mkdir"),
        (Path, "write_text"),
        (resume, "write_tensors"),
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
    before, calls, original = contents(tmp_path), [0], getattr(owner, name)

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise error
        return original(*args, **kwargs)

    three = trained(3)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        try:
            save(tmp_path, *three, step=3)
        except OSError as failed:
            assert "step-00000003 could not be written" in str(failed) and "No space left" in str(
                failed
            )
        except KeyboardInterrupt:
            pass
        else:
            assert calls[0] < call  # saving makes fewer calls of this kind
            return
    assert contents(tmp_path) == before
    save(tmp_path, *three, step=3)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-00000002",
        "step-00000003",
    ]


def test_optimizer_states_are_not_views_of_a_file_that_will_go(tmp_path: Path) -> None:
    path = save(tmp_path, *trained(2), step=2)
    model, optimizer = trained(0)
    resume.restore(path, model, optimizer)
    tensors, _ = read_tensors(path / "optimizer.safetensors")
    held = optimizer.state_dict()["state"]
    assert all(
        torch.equal(tensors[f"{i}.{name}"], value)
        for i, state in held.items()
        for name, value in state.items()
    )
    with (path / "optimizer.safetensors").open(
        "r+b"
    ) as file:  # in place: what is mapped from it would change
        file.write(b"\xff" * 4096)
    assert all(bool(value.isfinite().all()) for state in held.values() for value in state.values())
