"""The files of a checkpoint: what their headers say, and the memory that they take."""

import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import same_bits
from safetensors.torch import save_file

pytest.importorskip("transformers", reason="these functions serve its loading")

from minilora.huggingface.checkpoint_files import drop_pages, own_memory, stored_dtypes


def test_the_dtypes_of_all_files_are_read_from_their_headers(tmp_path: Path) -> None:
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_file({"a": torch.ones(2, dtype=torch.bfloat16)}, first)
    save_file({"b": torch.ones(2, dtype=torch.uint8), "c": torch.ones(())}, second)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle is not opened")
    found = stored_dtypes([first, str(second), tmp_path / "pytorch_model.bin"])
    assert found == {"a": "BF16", "b": "U8", "c": "F32"}


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:4], lambda b: b + b"\0", None])
def test_a_file_that_is_not_whole_is_named(damage: object, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(8)}, file)
    content = file.read_bytes()
    file.unlink()
    if callable(damage):
        file.write_bytes(damage(content))
    with pytest.raises(ValueError, match=re.escape(str(file))):
        stored_dtypes([file])


def resident(file: Path) -> int:
    """Bytes of a mapped file that count as memory of this process."""
    text = Path("/proc/self/smaps").read_text()
    sizes = re.findall(rf"{re.escape(str(file))}\n(?:.*\n)*?Rss: +(\d+) kB", text)
    return sum(1024 * int(size) for size in sizes)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and madvise are Linux'")
def test_pages_of_a_mapped_file_are_dropped_and_read_again(tmp_path: Path) -> None:
    file, other = tmp_path / "a", tmp_path / "b"
    for path in (file, other):
        path.write_bytes(torch.arange(1 << 18, dtype=torch.float32).numpy().tobytes())
    mapped = [
        torch.from_file(str(path), size=1 << 18, dtype=torch.float32) for path in (file, other)
    ]
    sums = [float(t.sum()) for t in mapped]
    assert resident(file) == resident(other) == 1 << 20
    drop_pages({str(file)})
    assert resident(file) == 0 and resident(other) == 1 << 20
    assert [float(t.sum()) for t in mapped] == sums and resident(file) == 1 << 20


def test_a_module_lets_go_of_the_file_that_it_lies_in(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(torch.arange(12, dtype=torch.float32).numpy().tobytes())
    mapped = torch.from_file(str(path), size=12, dtype=torch.float32)
    module = torch.nn.Linear(3, 4, bias=False)
    module.weight = torch.nn.Parameter(mapped.view(4, 3))
    module.register_buffer("mask", mapped[:2])
    module.register_buffer("own", torch.ones(2))
    weight, own = module.weight, module.own.data_ptr()
    expected = mapped.clone()

    own_memory(module)
    # Where a file may be changed, the model is not.
    path.write_bytes(bytes(48))
    assert module.weight is weight and same_bits(weight.detach().view(-1), expected)
    assert same_bits(module.mask, expected[:2]) and module.own.data_ptr() == own
