"""kernels/cpu/matmul.py: scratch memory, and what a product allocates and keeps.

tests/core/test_functional.py tests the values.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import gaussian
from torch import Tensor

import minilora
from minilora import ops
from minilora.kernels.cpu import matmul


def test_the_scratch_belongs_to_one_thread() -> None:
    barrier = threading.Barrier(2)

    def address(_: int) -> int:
        held = matmul._scratch(1000, torch.float32)
        # Both threads hold theirs.
        barrier.wait(timeout=10)
        assert matmul._scratch(10, torch.bfloat16).data_ptr() == held.data_ptr(), "it is reused"
        return held.data_ptr()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(address, (0, 1))
    assert first != second


@pytest.mark.parametrize("rows", [1, 4])
def test_the_scratch_never_leaves_a_product(rows: int) -> None:
    w = minilora.quantize_nf4(gaussian(96, 128))
    other = minilora.quantize_nf4(gaussian(96, 128, seed=1))
    x, dy = gaussian(rows, 128), gaussian(rows, 96)

    y, dx = ops.nf4_linear(x, w, None), ops.nf4_linear_backward(dy, w)
    before = y.clone(), dx.clone()
    ops.nf4_linear(x, other, None)
    ops.nf4_linear_backward(dy, other)
    assert torch.equal(y, before[0]) and torch.equal(dx, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 4])
def test_a_product_allocates_no_dense_weight_after_its_first_call(
    rows: int, dtype: torch.dtype
) -> None:
    w = minilora.quantize_nf4(gaussian(1024, 1024, dtype=dtype))
    x = gaussian(rows, 1024, dtype=dtype).requires_grad_()
    minilora.nf4_linear(x, w).sum().backward()

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        minilora.nf4_linear(x, w).sum().backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())

    # y and dx, and nothing of the weight's size.
    assert 2 * x.nbytes <= allocated < w.numel() * dtype.itemsize / 4


@pytest.mark.parametrize("adapter", [False, True], ids=["nf4_linear", "lora_linear"])
def test_the_graph_keeps_no_dense_weight(adapter: bool) -> None:
    w = minilora.quantize_nf4(gaussian(512, 512))
    x = gaussian(3, 512).requires_grad_()
    A, B = gaussian(4, 512).requires_grad_(), gaussian(512, 4).requires_grad_()
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if adapter:
            minilora.lora_linear(x, w, A, B, 2.0)
        else:
            minilora.nf4_linear(x, w)

    # x, z and the factors; a dense weight has 4 bytes per weight.
    assert sum(saved) < w.nbytes
