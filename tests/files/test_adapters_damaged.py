"""Adapter files are complete or absent: a full disk, Ctrl-C, a kill, a cut, a flipped bit."""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import CONFIG, WEIGHTS, adapters_of
from helpers import snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minilora
from minilora.files import adapter_folder
from minilora.targets import adapter_names


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


def fail_in_config(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    write_text = Path.write_text

    def half(path: Path, text: str, **options: Any) -> int:
        write_text(path, text[: len(text) // 2], **options)
        raise error

    patch.setattr(Path, "write_text", half)


def fail_in_weights(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    write = adapter_folder.write_tensors

    def half(path: Path, *rest: Any) -> None:
        write(path, *rest)
        path.write_bytes(path.read_bytes()[:999])
        raise error

    patch.setattr(adapter_folder, "write_tensors", half)


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
    """No file of this process can grow beyond `size` bytes (EFBIG), as on a full disk."""
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

# With the alpha the config changes in two of three saves.
def adapted(value):
    made = minilora.inject(model(), r=64, alpha=value % 3 + 1)
    for p in minilora.adapter_parameters(made):
        p.data.fill_(value)
    return made

def alpha(model):
    return model[0].adapters["default"].alpha

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
    assert alpha(loaded) == found.pop() % 3 + 1
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

    # The child exits right after its first rename: no `finally` runs, as after kill -9.
    pid = os.fork()
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


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3))


@dataclass(frozen=True)
class Good:
    """A small saved adapter: its folder, and the bytes and tensors of its weights."""

    folder: Path
    weights: bytes
    tensors: dict[str, Tensor]

    @property
    def header_end(self) -> int:
        """safetensors: eight bytes of length, a header in JSON, the tensors' bytes."""
        return 8 + int.from_bytes(self.weights[:8], "little")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    model = minilora.inject(small(), r=2)
    tensors = adapters_of(model)["0"].tensors()
    torch.nn.init.normal_(tensors["lora_B.weight"])

    folder = minilora.save_adapter(model, tmp_path_factory.mktemp("good"))
    copies = {end: tensor.detach().clone() for end, tensor in tensors.items()}
    return Good(folder, (folder / WEIGHTS).read_bytes(), copies)


def flipped(data: bytes, bit: int) -> bytes:
    """The bytes with one bit inverted."""
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def refused(good: Good, damaged: bytes, message: str | None = None) -> None:
    """Asserts that the weights raise an error that names a file, and leave the model unchanged."""
    (good.folder / WEIGHTS).write_bytes(damaged)
    model = small()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as error:
        minilora.load_adapter(model, good.folder)
    assert str(good.folder) in str(error.value)
    assert snapshot(model) == before


def loads(good: Good, damaged: bytes, name: str) -> None:
    """Asserts that the weights load with every bit right, under this name."""
    (good.folder / WEIGHTS).write_bytes(damaged)
    model = minilora.load_adapter(small(), good.folder)
    assert adapter_names(model) == [name]
    found = adapters_of(model, name)["0"].tensors()
    assert found.keys() == good.tensors.keys()
    assert all(torch.equal(found[end], tensor) for end, tensor in good.tensors.items())


HASHES = ("adapter_config_sha256", "contents_sha256")
CHECKED = (*HASHES, "minilora_base")


def name_if_it_loads(good: Good, damaged: bytes) -> str | None:
    """What a changed header has to lead to: the adapter's name, or None if it is to be refused.

    The length and every description of a tensor are needed. Of the metadata, a hash or a base that
    is there has to be right; what has another key is not read, as in PEFT's files, which have
    neither.
    """
    if damaged[:8] != good.weights[:8]:
        return None
    try:
        found = json.loads(damaged[8 : good.header_end].decode())
    except ValueError:
        return None

    expected = json.loads(good.weights[8 : good.header_end])
    metadata, right = found.pop("__metadata__", None), expected.pop("__metadata__")
    if found != expected:
        return None
    if any(metadata.get(key, right[key]) != right[key] for key in CHECKED):
        return None
    name: str = metadata.get("minilora_name", "default")
    return name


@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_a_flipped_bit_of_the_header_is_refused_unless_only_unread_metadata_changed(
    good: Good, data: st.DataObject
) -> None:
    bit = data.draw(st.integers(0, 8 * good.header_end - 1))
    damaged = flipped(good.weights, bit)
    name = name_if_it_loads(good, damaged)
    if name is None:
        refused(good, damaged)
    else:
        loads(good, damaged, name)


def header_with(good: Good, old: str, new: str) -> bytes:
    """The file with one text in its header replaced by another of the same length."""
    header, data = good.weights[: good.header_end], good.weights[good.header_end :]
    assert header.count(old.encode()) == 1 and len(old) == len(new)
    return header.replace(old.encode(), new.encode()) + data


# A change of the header, and the error that it has to give.
REFUSED_CHANGES = {
    "not JSON": ('{"__metadata__"', '("__metadata__"', "damaged or truncated"),
    "no metadata": ("__metadata__", "__metadatb__", "damaged or truncated"),
    "dtype": ('"F32","shape":[2,4]', '"I32","shape":[2,4]', "is damaged"),
    "unknown dtype": ('"F32","shape":[2,4]', '"F33","shape":[2,4]', "damaged or truncated"),
    "shape": ("[2,4]", "[2,5]", "damaged or truncated"),
    "another shape of the same size": ("[2,4]", "[4,2]", "is damaged"),
    "offset": ("[32,56]", "[31,56]", "damaged or truncated"),
    "a tensor's end": ("lora_B.weight", "lora_C.weight", "is damaged"),
    "a tensor's layer": ("0.lora_B.weight", "1.lora_B.weight", "is damaged"),
    "PEFT's prefix": ("base_model.model.0.lora_A", "base_model_model.0.lora_A", "is damaged"),
}


@pytest.mark.parametrize("case", REFUSED_CHANGES)
def test_a_change_of_what_describes_the_tensors_is_refused(case: str, good: Good) -> None:
    old, new, message = REFUSED_CHANGES[case]
    damaged = header_with(good, old, new)
    assert name_if_it_loads(good, damaged) is None
    refused(good, damaged, message)


@pytest.mark.parametrize("key", HASHES)
def test_a_changed_hash_is_refused_and_a_missing_one_is_not_checked(key: str, good: Good) -> None:
    header = json.loads(good.weights[8 : good.header_end])
    value = header["__metadata__"][key]
    messages = {"contents_sha256": "is damaged", "adapter_config_sha256": "is not the config"}
    changed = header_with(good, value, "0" * len(value))
    assert name_if_it_loads(good, changed) is None
    refused(good, changed, messages[key])

    missing = header_with(good, f'"{key}"', f'"{key.upper()}"')
    assert name_if_it_loads(good, missing) == "default"
    loads(good, missing, "default")


def test_metadata_that_is_no_hash_is_not_verified(good: Good) -> None:
    loads(
        good, header_with(good, '"minilora_name":"default"', '"minilora_name":"another"'), "another"
    )
    loads(good, header_with(good, '"minilora_name"', '"minilora_nane"'), "default")
    loads(good, header_with(good, '"format":"pt"', '"format":"np"'), "default")


@given(st.data())
@settings(max_examples=50)
def test_a_flipped_bit_of_a_weight_is_refused(good: Good, data: st.DataObject) -> None:
    bit = data.draw(st.integers(8 * good.header_end, 8 * len(good.weights) - 1))
    refused(good, flipped(good.weights, bit), f"{WEIGHTS} is damaged: its weights are not those")


@given(st.data())
@settings(max_examples=100)
def test_a_truncated_file_is_refused_by_name(good: Good, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(good.weights) - 1))
    refused(good, good.weights[:length], rf"{WEIGHTS} is damaged or truncated")


def test_a_pickle_is_never_opened(good: Good, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes((good.folder / CONFIG).read_bytes())
    torch.save({"x": torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="damaged"):
        minilora.load_adapter(small(), tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError):
        minilora.load_adapter(small(), tmp_path)
