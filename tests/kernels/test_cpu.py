"""The Numba kernels as machinery: the portable twin, threads, forks, tiles, scratch memory, and what a product allocates."""

import gc
import inspect
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import minilora
from minilora.kernels.cpu import matmul, nf4, runtime
from minilora.kernels.reference import nf4 as reference


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads for every kernel, and small weights are enough for both."""
    monkeypatch.setattr(nf4, "_GRAIN", 64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_a_process_of_its_own(body: Callable[[], None], **environment: str) -> None:
    """Runs `body`, which imports what it needs, in a fresh interpreter. A failed assertion there fails here, and so does a hang."""
    source = f"{inspect.getsource(body)}\n{body.__name__}()"
    command = [sys.executable, "-W", "error", "-c", source]
    done = subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


# ---- oracle: the portable twin against the reference


def portable_twin() -> None:
    import torch

    from minilora.kernels.cpu import matmul, nf4
    from minilora.kernels.reference import nf4 as reference

    assert not nf4.AVX512 and not matmul.AVX512, "the portable loops were not chosen"
    torch.manual_seed(0)
    for block in (32, 64, 256):
        for shape in ((65, 512), (33, 7), (1, 1)):
            weight = torch.randn(shape)
            packed, absmax = nf4.quantize(weight, block)
            assert all(map(torch.equal, (packed, absmax), reference.quantize(weight, block)))
            codes = nf4.double_quantize(absmax)
            assert all(map(torch.equal, codes, reference.double_quantize(absmax)))
            ties = torch.full_like(absmax, 1 + 2**-8)  # in bfloat16
            for state in ((absmax, None, None), codes, (ties, None, None)):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    args = packed, *state, shape, dtype, block
                    assert torch.equal(nf4.dequantize(*args), reference.dequantize(*args)), (
                        block,
                        shape,
                        dtype,
                    )
                if shape[1] % block:
                    continue
                wide = reference.dequantize(packed, *state, shape, torch.float64, block)
                for dtype in (torch.float32, torch.bfloat16):
                    # One rounding of W, one of each sum (in float32), one of the result.
                    relative = 1.5 * torch.finfo(dtype).eps + shape[1] * 2**-24
                    for rows in (1, 5):
                        x, dy = (
                            torch.randn(rows, shape[1]).to(dtype),
                            torch.randn(rows, shape[0]).to(dtype),
                        )
                        y = matmul.nf4_linear(x, packed, *state, None, shape, block)
                        dx = matmul.nf4_linear_backward(dy, packed, *state, shape, block)
                        for found, left, right in ((y, x, wide.T), (dx, dy, wide)):
                            error = (found.double() - left.double() @ right).abs()
                            assert (
                                error <= relative * (left.double().abs() @ right.abs())
                            ).all(), (block, dtype, rows)


def test_the_portable_twin_equals_the_reference(tmp_path: Path) -> None:
    in_a_process_of_its_own(portable_twin, NUMBA_CPU_NAME="generic", NUMBA_CACHE_DIR=str(tmp_path))


# ---- property: a tile is a piece of the dense weight, and nothing beside it is written


@settings(max_examples=100)
@given(
    rows=st.integers(1, 9),
    blocks=st.integers(1, 5),
    block_size=st.sampled_from([32, 64, 96, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    double=st.booleans(),
    data=st.data(),
)
def test_a_tile_is_a_piece_of_the_dense_weight(
    rows: int, blocks: int, block_size: int, dtype: torch.dtype, double: bool, data: st.DataObject
) -> None:
    shape = rows, blocks * block_size
    packed, absmax = reference.quantize(gaussian(*shape), block_size)
    state = reference.double_quantize(absmax) if double else (absmax, None, None)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, blocks - 1))
    bottom, right = data.draw(st.integers(top + 1, rows)), data.draw(st.integers(left + 1, blocks))
    expected = reference.dequantize(packed, *state, shape, dtype, block_size)
    expected = expected[top:bottom, left * block_size : right * block_size]
    guard = 64
    memory = torch.full((guard + expected.numel() + guard,), torch.nan, dtype=dtype)
    out = memory[guard:-guard]
    nf4.dequantize_tile(
        packed, *state, out, (rows * shape[1], block_size, blocks), (top, bottom), (left, right)
    )
    assert torch.equal(out.view(expected.shape), expected)
    assert memory[:guard].isnan().all() and memory[-guard:].isnan().all()


# ---- determinism: threads


@settings(max_examples=100)
@given(
    first=st.integers(0, 9),
    size=st.integers(0, 40),
    threads=st.integers(1, 9),
    grain=st.integers(1, 50),
)
def test_run_hands_out_every_row_once(first: int, size: int, threads: int, grain: int) -> None:
    seen: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        runtime.run(
            lambda start, stop: seen.append((start, stop)), rows=(first, first + size), grain=grain
        )
    assert sorted(row for part in seen for row in range(*part)) == list(range(first, first + size))
    assert len(seen) <= threads and all(stop - start >= min(grain, size) for start, stop in seen)


def test_run_waits_for_every_part_when_one_fails(two_threads: None) -> None:
    failed, finished = threading.Event(), threading.Event()

    def kernel(start: int, stop: int) -> None:
        if start == 0:
            failed.set()
            raise ValueError("the caller's own part")
        failed.wait()
        time.sleep(0.2)  # still at work when the other part has failed
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
        return (
            exact,
            minilora.nf4_linear(x, w),
            torch.ops.minilora.nf4_linear_backward(dy, *w.tensors, w.shape, w.block_size),
        )

    alone = [work(i) for i in (0, 1)]
    # The BLAS may sum in another order when it has fewer threads: at most twice the rounding of a sum of K products.
    relative = 2 * torch.finfo(dtype).eps + 2 * 576 * 2**-24
    with ThreadPoolExecutor(2) as pool:
        for _ in range(15):
            for i, (exact, y, dx) in enumerate(pool.map(work, (0, 1))):
                assert all(map(torch.equal, exact, alone[i][0]))
                W = exact[-1].double().abs()
                assert (
                    (y - alone[i][1]).double().abs() <= relative * (x.double().abs() @ W.T)
                ).all()
                assert (
                    (dx - alone[i][2]).double().abs() <= relative * (dy.double().abs() @ W)
                ).all()


def test_the_scratch_belongs_to_one_thread() -> None:
    barrier = threading.Barrier(2)

    def address(_: int) -> int:
        held = matmul._scratch(1000, torch.float32)
        barrier.wait(timeout=10)  # both hold theirs
        assert matmul._scratch(10, torch.bfloat16).data_ptr() == held.data_ptr(), "it is reused"
        return held.data_ptr()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(address, (0, 1))
    assert first != second


@pytest.mark.parametrize("rows", [1, 4])
def test_the_scratch_never_leaves_a_product(rows: int) -> None:
    w, other = (
        minilora.quantize_nf4(gaussian(96, 128)),
        minilora.quantize_nf4(gaussian(96, 128, seed=1)),
    )
    x, dy = gaussian(rows, 128), gaussian(rows, 96)
    y = minilora.nf4_linear(x, w)
    dx = torch.ops.minilora.nf4_linear_backward(dy, *w.tensors, w.shape, 64)
    before = y.clone(), dx.clone()
    minilora.nf4_linear(x, other)
    torch.ops.minilora.nf4_linear_backward(dy, *other.tensors, other.shape, 64)
    assert torch.equal(y, before[0]) and torch.equal(dx, before[1])


def forked_child() -> None:
    import os
    import signal
    import traceback
    import warnings

    import torch

    from minilora.kernels.cpu import matmul, nf4, runtime

    warnings.simplefilter(
        "ignore", DeprecationWarning
    )  # Python 3.12 warns of threads and fork: that is what is tested
    torch.set_num_threads(2)
    nf4._GRAIN = 64  # a small weight is enough for both
    weight, x = torch.randn(512, 512), torch.randn(1, 512)

    def results() -> list[
        bytes
    ]:  # no product of several rows: OpenMP itself cannot be used in a forked child
        packed, absmax = nf4.quantize(weight, 64)
        dense = nf4.dequantize(packed, absmax, None, None, (512, 512), torch.float32, 64)
        y = matmul.nf4_linear(x, packed, absmax, None, None, None, (512, 512), 64)
        return [t.numpy().tobytes() for t in (packed, absmax, dense, y)]

    expected = results()
    assert runtime._pool is not None, "the pool was not used: nothing is tested"
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a hang ends the child by a signal
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
    in_a_process_of_its_own(forked_child)


# ---- memory


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
@pytest.mark.parametrize("rows", [1, 4])
def test_a_product_allocates_no_dense_weight_after_its_first_call(
    rows: int, dtype: torch.dtype
) -> None:
    w = minilora.quantize_nf4(gaussian(1024, 1024, dtype=dtype))
    x = gaussian(rows, 1024, dtype=dtype).requires_grad_()
    minilora.nf4_linear(x, w).sum().backward()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        minilora.nf4_linear(x, w).sum().backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert 2 * x.nbytes <= allocated < w.numel() * dtype.itemsize / 4, (
        "y and dx, and nothing of the weight's size"
    )


@pytest.mark.parametrize("adapter", [False, True], ids=["nf4_linear", "lora_linear"])
def test_the_graph_keeps_no_dense_weight(adapter: bool) -> None:
    w = minilora.quantize_nf4(gaussian(512, 512))
    x = gaussian(3, 512).requires_grad_()
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if adapter:
            minilora.lora_linear(
                x, w, gaussian(4, 512).requires_grad_(), gaussian(512, 4).requires_grad_(), 2.0
            )
        else:
            minilora.nf4_linear(x, w)
    assert w.nbytes <= sum(saved) < w.numel() * 2, (
        "the packed weight and small things; dense it is 4 bytes a weight"
    )
