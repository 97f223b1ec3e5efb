"""Adapter files are whole or are not there: a full disk, an interrupt, a kill, a cut and a flipped bit."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minilora
from minilora.files import adapters as checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))


def adapted(value: float, alpha: float = 4.0) -> nn.Sequential:
    made = minilora.inject(model(), r=8, alpha=alpha)
    with torch.no_grad():
        for p in minilora.adapter_parameters(made):
            p.fill_(value)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}


def values(folder: Path) -> set[float]:
    loaded = minilora.load_adapter(model(), folder)
    return {v for p in minilora.adapter_parameters(loaded) for v in p.unique().tolist()}


# ---- writing


def fail_in_config(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    write_text = Path.write_text

    def half(path: Path, text: str, *rest: Any) -> int:
        write_text(path, text[: len(text) // 2])
        raise error

    patch.setattr(Path, "write_text", half)


def fail_in_weights(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    write = checkpoint.write_tensors

    def half(path: Path, *rest: Any) -> None:
        write(path, *rest)
        path.write_bytes(path.read_bytes()[:999])
        raise error

    patch.setattr(checkpoint, "write_tensors", half)


def fail_in_fsync(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fsync(_: int) -> None:
        raise error

    patch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
    ids=["full", "interrupt"],
)
@pytest.mark.parametrize("fail", [fail_in_config, fail_in_weights, fail_in_fsync])
@pytest.mark.parametrize("first", [True, False])
def test_a_failed_save_leaves_what_was_there_and_nothing_else(
    first: bool, fail: Any, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    if not first:
        minilora.save_adapter(adapted(1.0), folder)
    before = contents(folder)
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        fail(patch, error)
        minilora.save_adapter(adapted(2.0, alpha=8.0), folder)
    assert contents(folder) == before
    minilora.save_adapter(adapted(2.0, alpha=8.0), folder)
    assert values(folder) == {2.0} and sorted(contents(folder)) == [CONFIG, WEIGHTS]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to let a file of this process grow beyond `size` (EFBIG), as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_leaves_the_old_adapter_and_says_which_file(
    tmp_path: Path,
) -> None:
    minilora.save_adapter(adapted(1.0), tmp_path)
    before = contents(tmp_path)
    assert len(before[CONFIG]) < 2048 < len(before[WEIGHTS])
    new = adapted(2.0)
    with largest_file(2048), pytest.raises(OSError, match=WEIGHTS):
        minilora.save_adapter(new, tmp_path)
    assert contents(tmp_path) == before and values(tmp_path) == {1.0}


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        minilora.save_adapter(adapted(1.0), tmp_path / "file" / "adapter")


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch, minilora
from torch import nn

folder, random = Path(sys.argv[1]), random.Random(0)
torch.set_num_threads(1)

def model():
    return nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256))

def adapted(value):  # rank, alpha and so the config are the same or not: both happen between two saves of a run
    made = minilora.inject(model(), r=64, alpha=value % 3 + 1)
    for p in minilora.adapter_parameters(made):
        p.data.fill_(value)
    return made

minilora.save_adapter(adapted(1.0), folder)
for repetition in range(int(sys.argv[2])):
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        turn = 1
        while True:
            turn += 1
            minilora.save_adapter(adapted(float(turn)), folder)
            os.write(tell, b".")
    os.read(ready, 1)
    time.sleep(random.uniform(0.0, 0.2))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    loaded = minilora.load_adapter(model(), folder)
    found = {v for p in minilora.adapter_parameters(loaded) for v in p.unique().tolist()}
    assert len(found) == 1, found
    assert loaded[0].alpha == found.pop() % 3 + 1
    print("whole")
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.soak)])
def test_a_kill_at_any_time_leaves_a_loadable_adapter(tmp_path: Path, kills: int) -> None:
    done = python(KILLED, str(tmp_path), str(kills))
    assert done.stdout.split() == ["whole"] * kills, done.stderr


def test_a_kill_between_the_two_renames_leaves_a_loadable_adapter(tmp_path: Path) -> None:
    minilora.save_adapter(adapted(1.0, alpha=4.0), tmp_path)
    new = adapted(2.0, alpha=8.0)
    replace = Path.replace
    pid = (
        os.fork()
    )  # a child that stops dead after its first rename: no `finally` runs, as after kill -9
    if pid == 0:

        def last_act(path: Path, target: Path) -> None:
            replace(path, target)
            os._exit(0)

        Path.replace = last_act  # type: ignore[assignment, method-assign]
        minilora.save_adapter(new, tmp_path)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert values(tmp_path) in ({1.0}, {2.0})
    minilora.save_adapter(adapted(3.0), tmp_path)
    assert values(tmp_path) == {3.0} and sorted(contents(tmp_path)) == [CONFIG, WEIGHTS]


# ---- reading


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3))


def bits(layers: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in layers.parameters()]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, list[Tensor]]:
    """A small saved adapter: folder, the bytes of its weights, the parameters it stands for."""
    made = minilora.inject(small(), r=2)
    torch.nn.init.normal_(made[0].lora_B)
    folder = minilora.save_adapter(made, tmp_path_factory.mktemp("good"))
    return folder, (folder / WEIGHTS).read_bytes(), bits(made)


def refuses_or_reads_the_same(folder: Path, damaged: bytes, expected: list[Tensor]) -> None:
    (folder / WEIGHTS).write_bytes(damaged)
    fresh = small()
    before = bits(fresh)
    try:
        minilora.load_adapter(fresh, folder)
    except ValueError as error:
        assert WEIGHTS in str(error) or CONFIG in str(error) or str(folder) in str(error)
        expected = before
    found = bits(fresh)
    assert len(found) == len(expected) and all(
        torch.equal(f, e) for f, e in zip(found, expected, strict=True)
    )


Good = tuple[Path, bytes, list[Tensor]]


@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_a_flipped_bit_of_the_header_is_refused_or_does_not_matter(
    good: Good, data: st.DataObject
) -> None:
    folder, whole, expected = good
    header = 8 + int.from_bytes(whole[:8], "little")
    bit = data.draw(st.integers(0, 8 * header - 1))
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    refuses_or_reads_the_same(folder, bytes(damaged), expected)


@given(st.data())
@settings(max_examples=50)
def test_a_flipped_bit_of_a_weight_is_refused(good: Good, data: st.DataObject) -> None:
    folder, whole, expected = good
    header = 8 + int.from_bytes(whole[:8], "little")
    bit = data.draw(st.integers(8 * header, 8 * len(whole) - 1))
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    refuses_or_reads_the_same(folder, bytes(damaged), expected)


@given(st.data())
@settings(max_examples=100)
def test_a_file_cut_short_is_refused_by_name(good: Good, data: st.DataObject) -> None:
    folder, whole, _ = good
    (folder / WEIGHTS).write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is damaged or cut short"):
        minilora.load_adapter(small(), folder)


def test_a_pickle_is_never_opened(good: Good, tmp_path: Path) -> None:
    folder, _, _ = good
    (tmp_path / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    torch.save({"x": torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="damaged"):
        minilora.load_adapter(small(), tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError):
        minilora.load_adapter(small(), tmp_path)
