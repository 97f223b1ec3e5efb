"""The safetensors files of a checkpoint, and the memory of a model that was read from them."""

import ctypes
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.huggingface.heap import return_freed_memory
from minilora.huggingface.messages import one_line

# The dtypes of dense weights, as safetensors calls them.
DENSE = ("F64", "F32", "F16", "BF16")

# In Linux' <sys/mman.h>.
_MADV_DONTNEED = 4


def stored_dtypes(files: Iterable[str | Path]) -> dict[str, str]:
    """Returns name -> dtype, as "BF16", of all tensors in safetensors files; others are left out.

    Only headers are read. A header says how long its file is, so a truncated one is noticed.

    Raises:
        ValueError: a file does not exist, is damaged or incomplete; it is named.
    """
    dtypes: dict[str, str] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            continue
        with opened_file(file) as opened:
            names = opened.keys()
            dtypes |= {name: opened.get_slice(name).get_dtype() for name in names}
    return dtypes


@contextmanager
def opened_file(file: Path) -> Iterator[Any]:
    """An open safetensors file; an error of opening it, which checks its header, names it."""
    from safetensors import SafetensorError, safe_open

    try:
        opening = safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file} cannot be read, it is missing, damaged or incomplete: {one_line(error)}"
        ) from error
    with opening as opened:
        yield opened


def check_dense(files: Iterable[Path], model: nn.Module) -> None:
    """Raises ValueError unless the files' values of a dense model's float parameters are floats.

    transformers casts the codes of a quantized weight to floats.
    """
    named = model.named_parameters(remove_duplicate=False)
    floats = {name for name, p in named if p.is_floating_point()}
    for name, dtype in stored_dtypes(files).items():
        # By other names than the model's, too: transformers renames those of older checkpoints.
        if dtype not in DENSE and (name in floats or name.endswith(".weight")):
            raise ValueError(
                f"{one_line(name, 120)} is stored as {dtype}: the checkpoint is quantized already, "
                "in a way unknown here"
            )


def check_same(file: Path, shards: Iterable[Path]) -> None:
    """Raises ValueError, with the tensor's name, unless shards hold what one file of a folder does.

    Tensors are compared bit by bit, up to the first that differs.
    """
    with opened_file(file) as whole:
        names = set(whole.keys())
        for shard in shards:
            with opened_file(shard) as part:
                for name in part.keys():  # noqa: SIM118
                    if name not in names or not _equal(whole, part, name):
                        raise ValueError(
                            f"{file} and {shard.name} are of two models, or two versions of one: "
                            f"{one_line(name, 120)} differs. Remove the older: a folder has either "
                            f"{file.name}, or shards and their index"
                        )


def _equal(one: Any, other: Any, name: str) -> bool:
    slices = one.get_slice(name), other.get_slice(name)
    if len({(s.get_dtype(), *s.get_shape()) for s in slices}) > 1:
        return False
    a, b = one.get_tensor(name), other.get_tensor(name)
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def drop_pages(files: Collection[str]) -> None:
    """Lets go of the pages that have been read of memory-mapped files, on Linux.

    They stay in the system's cache and are mapped again where they are needed. Without this, all
    of a checkpoint counts as memory of the process when its last tensor has been read.

    Args:
        files: real paths. Nothing may have been written to their pages: it would be lost.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    for line in Path("/proc/self/maps").read_text().splitlines():
        # start-end, permissions, offset, device, inode, path
        addresses, *_, path = line.split(maxsplit=5)
        if path in files:
            start, end = (int(address, 16) for address in addresses.split("-"))
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def own_memory(model: nn.Module) -> None:
    """Copies the parameters and buffers that lie in a memory-mapped file, which is then let go.

    They would keep the whole file mapped, and change if it did. Freed memory is returned to the
    operating system.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        # PyTorch cannot resize memory that it did not allocate, such as a mapped file's.
        if not tensor.is_meta and not tensor.untyped_storage().resizable():
            tensor.data = tensor.data.clone()
    return_freed_memory()


def check_finite(model: nn.Module) -> None:
    """Raises ValueError if a parameter holds NaN or infinity, which is named; nothing is copied."""
    check_all_finite(model.named_parameters())


def check_all_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """`check_finite` of tensors, each with its name."""
    for name, p in tensors:
        if p.is_floating_point() and p.numel() and not p.is_meta:
            # A NaN is both the least and the greatest.
            least, greatest = torch.aminmax(p.detach())
            if not (least.isfinite() and greatest.isfinite()):
                raise ValueError(f"{name} holds NaN or infinity")
