"""What the Numba kernels run on: threads, forks, arrays, and the cache of machine code."""

import gc
import inspect
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import gaussian, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import minilora
from minilora import ops
from minilora.kernels.cpu import nf4, runtime

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads for every kernel, and small weights are enough for both."""
    monkeypatch.setattr(nf4, "_GRAIN", 4096)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def python(code: str, folder: Path = ROOT, **environment: str) -> str:
    """Runs code in a fresh interpreter, started in a folder, and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# Determinism: threads.


@settings(max_examples=100)
@given(
    first=st.integers(0, 9),
    size=st.integers(0, 40),
    threads=st.integers(1, 9),
    grain=st.integers(1, 50),
)
def test_run_hands_out_every_row_once(first: int, size: int, threads: int, grain: int) -> None:
    seen: list[tuple[int, int]] = []

    def kernel(start: int, stop: int) -> None:
        seen.append((start, stop))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        runtime.run(kernel, rows=(first, first + size), grain=grain)

    rows = sorted(row for part in seen for row in range(*part))
    assert rows == list(range(first, first + size))
    assert len(seen) <= threads
    assert all(stop - start >= min(grain, size) for start, stop in seen)


def test_run_waits_for_every_part_when_one_fails(two_threads: None) -> None:
    failed, finished = threading.Event(), threading.Event()

    def kernel(start: int, stop: int) -> None:
        if start == 0:
            failed.set()
            raise ValueError("the caller's own part")
        failed.wait()
        # Still at work when the other part has failed.
        time.sleep(0.2)
        finished.set()

    with pytest.raises(ValueError, match="own part"):
        runtime.run(kernel, rows=(0, 2), grain=1)
    assert finished.is_set(), "the caller's memory would be written to after the call"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_threads_at_once_get_their_own_results(dtype: torch.dtype, two_threads: None) -> None:
    dense = [gaussian(576, 512, dtype=dtype, seed=seed) for seed in (1, 2)]
    x, dy = gaussian(5, 512, dtype=dtype), gaussian(5, 576, dtype=dtype)

    def work(i: int) -> tuple[list[Tensor], Tensor, Tensor]:
        w = minilora.quantize_nf4(dense[i])
        exact = [t for t in (*w.tensors, w.dequantize()) if t is not None]
        return exact, minilora.nf4_linear(x, w), ops.nf4_linear_backward(dy, w)

    # The BLAS may sum in another order when it has fewer threads: at most twice the rounding of a
    # sum of 576 products.
    relative = 2 * torch.finfo(dtype).eps + 2 * 576 * 2**-24
    alone = [work(i) for i in (0, 1)]

    with ThreadPoolExecutor(2) as pool:
        for _ in range(15):
            for found, expected in zip(pool.map(work, (0, 1)), alone, strict=True):
                assert same_bits(tuple(found[0]), tuple(expected[0]))
                W = found[0][-1].double().abs()
                error = (found[1] - expected[1]).double().abs()
                assert (error <= relative * (x.double().abs() @ W.T)).all()
                error = (found[2] - expected[2]).double().abs()
                assert (error <= relative * (dy.double().abs() @ W)).all()


def forked_child() -> None:
    import os
    import signal
    import traceback
    import warnings

    import torch

    from minilora.kernels.cpu import matmul, nf4, runtime
    from minilora.kernels.reference.nf4 import PackedWeight

    # Python 3.12 warns of threads and fork: that is what is tested.
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.set_num_threads(2)

    # A small weight is enough for both.
    nf4._GRAIN = 4096
    weight, x = torch.randn(512, 512), torch.randn(1, 512)

    def results() -> list[bytes]:
        # No product of several rows: OpenMP itself cannot be used in a forked child.
        packed, absmax = nf4.quantize(weight, 64)
        w = PackedWeight(packed, absmax, None, None, (512, 512), 64)
        dense = nf4.dequantize(w, torch.float32)
        y = matmul.nf4_linear(x, w, None)
        return [t.numpy().tobytes() for t in (packed, absmax, dense, y)]

    expected = results()
    assert runtime._pool is not None, "the pool was not used: nothing is tested"
    child = os.fork()
    if child == 0:
        # A hang ends the child by a signal.
        signal.alarm(30)
        try:
            assert results() == expected
            assert runtime._pool is not None
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)} (-14: it hung)"
    assert results() == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_a_pool_of_its_own() -> None:
    python(f"{inspect.getsource(forked_child)}\nforked_child()")


# Arrays.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_an_array_is_the_tensors_memory_and_keeps_it_alive(dtype: torch.dtype) -> None:
    t = torch.arange(100, dtype=dtype)
    watch = weakref.ref(t)
    memory = runtime.array(t)
    assert memory.nbytes == t.nbytes and memory.ctypes.data == t.data_ptr()
    assert t.untyped_storage().resizable(), "FSDP2 could not free it"

    memory.view("uint8")[1] = 7
    assert t.view(torch.uint8)[1] == 7
    del t
    gc.collect()
    assert watch() is not None
    del memory
    gc.collect()
    assert watch() is None


def test_an_array_of_nothing_is_empty_and_typed() -> None:
    assert runtime.array(torch.empty(0)).dtype == "float32"
    assert runtime.array(torch.empty(3, 0, dtype=torch.bfloat16)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_are_the_tensors_memory_as_unsigned_integers(dtype: torch.dtype) -> None:
    t = torch.tensor([1.0, -0.0], dtype=dtype)
    found = runtime.bits(t)
    assert found.ctypes.data == t.data_ptr() and found.itemsize == t.itemsize
    assert found[1] == 1 << 8 * t.itemsize - 1


# The cache of machine code.

DEQUANTIZE = """
import torch
from kernels.cpu import nf4, team
from kernels.reference.nf4 import PackedWeight
codes = torch.full((32,), 255, dtype=torch.uint8)
w = PackedWeight(codes, torch.ones(1), None, None, (64,), 64)
value = nf4.dequantize(w, torch.float32)[0].item()
print(value, team.compiled(nf4._dequantize_rows).cache_hits)
"""


def edit(path: Path, before: str, after: str) -> None:
    """Edits a file in such a way that neither its size nor its time of change tells."""
    source, stat = path.read_text(), path.stat()
    assert source.count(before) == 1 and len(before) == len(after)
    path.write_text(source.replace(before, after))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        pytest.param(
            "avx512.py",
            "table = b.fmul(",
            "table = b.fsub(",
            id="the permute",
            marks=pytest.mark.soak,
        ),
        pytest.param(
            "nf4.py",
            "scaled[0] = levels[j] * scale",
            "scaled[0] = levels[j] - scale",
            id="the loop",
        ),
    ],
)
def test_a_change_in_any_source_file_is_compiled(
    file: str, before: str, after: str, tmp_path: Path
) -> None:
    if file == "avx512.py" and not nf4.AVX512:
        pytest.skip("the permute needs a processor with AVX-512")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=ignore)

    # Python's own cache would not see such an edit either.
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["NUMBA_CACHE_DIR"] = str(tmp_path / "cache")
    if file == "nf4.py":
        environment["NUMBA_CPU_NAME"] = "generic"

    assert python(DEQUANTIZE, tmp_path, **environment) == "1.0 0\n"
    assert python(DEQUANTIZE, tmp_path, **environment) == "1.0 1\n", (
        "the second process compiled again"
    )
    edit(tmp_path / "kernels" / "cpu" / file, before, after)
    assert python(DEQUANTIZE, tmp_path, **environment) == "0.0 0\n"
