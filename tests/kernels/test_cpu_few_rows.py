"""kernels/cpu/few_rows.py: both kernels against float64 within derived bounds, and each other.

W in bfloat16 has a unit roundoff of 2^-8, a float32 sum of n products an error of at most n 2^-24
times the sum of their magnitudes, and y is rounded once.
"""

import ctypes
import dataclasses
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from helpers import gaussian
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import minilora
from minilora import NF4Weight
from minilora.kernels.cpu import few_rows as module
from minilora.kernels.cpu import team
from minilora.kernels.cpu.avx512 import AVX512_BF16
from minilora.kernels.cpu.few_rows import few_rows, is_faster
from minilora.kernels.reference.nf4 import double_dequantize

BF16 = torch.bfloat16
needs_bf16 = pytest.mark.skipif(not AVX512_BF16, reason="the processor has no AVX512-BF16")

# Kernel -> the dtype of x that it is given, the unit roundoffs of its weights and of its result.
KERNELS = {
    "bfloat16": (BF16, 2**-8, 2**-8),
    "float32": (torch.float32, 2**-24, 0.0),
}


def kernels() -> list[Any]:
    """The kernels as parameters; one that this processor lacks is skipped."""
    marks = {"bfloat16": needs_bf16, "float32": ()}
    return [pytest.param(name, id=name, marks=marks[name]) for name in KERNELS]


def exact(x: Tensor, w: minilora.NF4Weight, A: Tensor, B: Tensor, scale: float) -> Tensor:
    update = (x.double() @ A.double().T) @ B.double().T
    return x.double() @ w.dequantize(torch.float64).T + scale * update


def bound(
    kernel: str, x: Tensor, w: minilora.NF4Weight, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    _, weight, result = KERNELS[kernel]
    x, W, A, B = x.double().abs(), w.dequantize(torch.float64).abs(), A.double(), B.double()
    base, update = x @ W.T, scale * (x @ A.abs().T) @ B.abs().T
    sums = (w.shape[1] + A.shape[0] + 2) * 2**-24
    error = (weight + sums) * base + 2 * sums * update
    return error + result * (base + update + error)


@pytest.mark.parametrize("kernel", kernels())
@given(
    M=st.integers(1, 33),
    O=st.integers(1, 70),
    blocks=st.integers(1, 5),
    block_size=st.sampled_from([32, 64, 128, 256]),
    double_quant=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    r=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_a_product_is_within_the_bound_of_float64(
    kernel: str,
    M: int,
    O: int,
    blocks: int,
    block_size: int,
    double_quant: bool,
    quant_type: str,
    r: int,
    seed: int,
) -> None:
    if kernel == "bfloat16":
        block_size = max(64, block_size)
    I = blocks * block_size
    w = minilora.quantize_nf4(gaussian(O, I, seed=seed), block_size, double_quant, quant_type)
    x = gaussian(M, I, seed=seed + 1, dtype=KERNELS[kernel][0])
    A, B = gaussian(r, I, seed=seed + 2), gaussian(O, r, seed=seed + 3)

    for scale in (0.0, 1.5):
        y = few_rows(x, w, A, B, scale) if scale else few_rows(x, w)
        assert y.dtype == x.dtype and y.shape == (M, O)
        error = (y.double() - exact(x, w, A, B, scale)).abs()
        assert (error <= bound(kernel, x, w, A, B, scale)).all()


def weight_of_ones(O: int, blocks: int, block_size: int, double_quant: bool) -> NF4Weight:
    """A weight whose levels are all 1, so that every element is its block's absmax."""
    shape, n = torch.Size((O, blocks * block_size)), O * blocks
    scales: tuple[Any, ...] = (gaussian(n).abs(), None, None)
    if double_quant:
        codes = torch.randint(256, (n,), generator=torch.Generator().manual_seed(0))
        scales = codes.to(torch.uint8), gaussian(-(-n // 256), seed=1).abs(), torch.tensor(3.7)
    packed = torch.full((shape.numel() // 2,), 0xFF, dtype=torch.uint8)
    return NF4Weight(packed, *scales, shape, torch.float32, block_size)


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [64, 128, 256])
def test_the_absmax_of_every_block_is_the_stored_one_bit_for_bit(
    kernel: str, double_quant: bool, block_size: int
) -> None:
    """Also where a row of W has blocks of two groups: 150 rows of 5 blocks, 256 blocks per group.

    A row of the identity picks one absmax per row of W. An update of minus that absmax leaves 0
    only if it is the same float32 number.
    """
    O, blocks, dtype = 150, 5, KERNELS[kernel][0]
    w = weight_of_ones(O, blocks, block_size, double_quant)
    absmax = w.absmax if w.absmax2 is None else double_dequantize(*w.tensors[1:])
    absmax = absmax.view(O, blocks)
    x = torch.eye(w.shape[1], dtype=dtype)[::block_size]
    for k in range(blocks):
        row, minus = x[k : k + 1], -absmax[:, k : k + 1].contiguous()
        assert not few_rows(row, w, row, minus, 1.0).any()

    # Groups of 4, 8 and 16 rows of x scale the levels instead, and round them.
    for rows in (x[:3], x, x.repeat(3, 1)):
        picked = absmax.T.to(dtype).repeat(3, 1)[: len(rows)]
        assert torch.equal(few_rows(rows, w), picked)


@needs_bf16
@pytest.mark.parametrize("M", [1, 2, 4, 5, 8, 9, 16, 17, 31, 32])
def test_a_row_is_the_same_whatever_rows_are_beside_it(M: int) -> None:
    """Except alone, where levels are rounded before they are scaled, rather than after."""
    w = minilora.quantize_nf4(gaussian(150, 4096 + 128))
    x = gaussian(M, 4096 + 128, dtype=BF16)
    A, B = gaussian(9, 4096 + 128), gaussian(150, 9)
    together = few_rows(x, w, A, B, 0.5)

    for m in range(M):
        other = gaussian(2, 4096 + 128, seed=m + 1, dtype=BF16)
        rows = torch.cat([other[:1], x[m : m + 1], other[1:]])
        alone = few_rows(rows, w, A, B, 0.5)[1:2] if M > 1 else few_rows(x, w, A, B, 0.5)
        # Groups of 4, 8 and 16 rows add the same products in passes of other lengths.
        error = (together[m : m + 1].double() - alone.double()).abs()
        assert (error <= 2**-7 * alone.double().abs() + 1e-3).all()


@needs_bf16
def test_the_two_kernels_agree_as_their_bounds_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    w = minilora.quantize_nf4(gaussian(131, 640))
    x, A, B = gaussian(7, 640, dtype=BF16), gaussian(8, 640), gaussian(131, 8)
    fast = few_rows(x, w, A, B, 2.0)
    monkeypatch.setattr(module, "AVX512_BF16", False)
    portable = few_rows(x, w, A, B, 2.0)

    assert portable.dtype == BF16
    allowed = bound("bfloat16", x, w, A, B, 2.0)
    assert ((fast.double() - portable.double()).abs() <= 2 * allowed).all()
    # The portable one decodes to float32: only the result is rounded.
    error = (portable.double() - exact(x, w, A, B, 2.0)).abs()
    assert (error <= bound("float32", x, w, A, B, 2.0) + 2**-8 * portable.double().abs()).all()


@pytest.mark.parametrize("kernel", kernels())
def test_nothing_beyond_the_result_is_written(kernel: str) -> None:
    dtype = KERNELS[kernel][0]
    w = minilora.quantize_nf4(gaussian(77, 128))
    guard = 64
    for M in (1, 3, 8, 16, 21):
        memory = torch.full((guard + M * 77 + guard,), 7.0, dtype=dtype)

        class Inputs(torch.Tensor):
            """Hands out the middle of `memory` as its new tensor."""

            def new_empty(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
                return memory[guard : guard + M * 77].view(M, 77)  # noqa: B023

        x = gaussian(M, 128, dtype=dtype)
        y = few_rows(x.as_subclass(Inputs), w)
        assert torch.equal(memory[guard:-guard].view(M, 77), few_rows(x, w))
        assert (memory[:guard] == 7).all() and (memory[-guard:] == 7).all()
        assert y.shape == (M, 77)


@pytest.mark.parametrize("kernel", kernels())
def test_strided_rows_and_leading_sizes(kernel: str) -> None:
    dtype = KERNELS[kernel][0]
    w = minilora.quantize_nf4(gaussian(40, 64))
    wide = gaussian(2, 3, 129, dtype=dtype)
    # Neither contiguous nor aligned.
    x = wide[..., 1::2]
    y = few_rows(x, w)
    assert y.shape == (2, 3, 40)
    assert torch.equal(y.view(6, 40), few_rows(x.reshape(6, 64).clone(), w))
    assert few_rows(x[:0], w).shape == (0, 3, 40)
    A, B = gaussian(64, 5).T, gaussian(5, 40).T
    expected = few_rows(x, w, A.contiguous(), B.contiguous(), 1.0)
    assert torch.equal(few_rows(x, w, A, B, 1.0), expected)


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_infinity_reach_every_output_of_their_row_and_no_other(
    kernel: str, value: float
) -> None:
    w = minilora.quantize_nf4(gaussian(20, 128))
    x = gaussian(5, 128, dtype=KERNELS[kernel][0])
    x[2, 17] = value
    finite = few_rows(x, w).isfinite()
    assert not finite[2].any() or value == float("inf")
    assert finite[[0, 1, 3, 4]].all()


def test_shapes_and_devices_that_do_not_fit_are_refused() -> None:
    w = minilora.quantize_nf4(gaussian(20, 128))
    x, A, B = gaussian(1, 128, dtype=BF16), gaussian(4, 128), gaussian(20, 4)
    for wrong in ((A[:, :64], B), (A, B[:, :2]), (A, B[:10])):
        with pytest.raises(ValueError, match=r"do not fit a weight \(20, 128\)"):
            few_rows(x, w, *wrong, 1.0)
    with pytest.raises(ValueError, match="the adapter on meta: move one"):
        few_rows(x, w, A.to("meta"), B, 1.0)
    with pytest.raises(ValueError, match="a part of the weight is on meta"), torch.no_grad():
        minilora.nf4_linear(x, w.to("meta"))
    gaps = dataclasses.replace(w, packed=w.packed.repeat_interleave(2)[::2])
    with pytest.raises(ValueError, match="a part of the weight is strided"), torch.no_grad():
        minilora.nf4_linear(x, gaps)
    with pytest.raises(ValueError, match="a part of the weight is strided"):
        gaps.dequantize()
    with pytest.raises(ValueError, match="does not fit an NF4 weight"), torch.no_grad():
        minilora.nf4_linear(x[:, :64], w)


@pytest.mark.parametrize(
    ("rows", "dtype", "block_size", "used"),
    [
        (1, torch.float32, 64, True),
        (4, torch.float32, 64, True),
        (5, torch.float32, 64, False),
        (1, torch.float16, 64, False),
        (4, BF16, 32, True),
        (5, BF16, 32, False),
        (32, BF16, 64, AVX512_BF16),
        (33, BF16, 64, False),
    ],
    ids=str,
)
def test_when_it_is_used(rows: int, dtype: torch.dtype, block_size: int, used: bool) -> None:
    w = minilora.quantize_nf4(gaussian(16, 256), block_size)
    assert is_faster(rows, w, dtype) == used
    crossing = minilora.quantize_nf4(gaussian(16, 96), 64)
    assert not is_faster(1, crossing, dtype)


def test_generation_does_not_dispatch_but_whoever_watches_operators_sees_them() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    w = minilora.quantize_nf4(gaussian(32, 64))
    x, A, B = gaussian(2, 64), gaussian(4, 64), gaussian(32, 4)
    with torch.no_grad():
        quick = minilora.lora_linear(x, w, A, B, 2.0)
        with Watch():
            watched = minilora.lora_linear(x, w, A, B, 2.0)
            minilora.nf4_linear(x, w)
    assert torch.equal(quick, watched)
    assert seen.count("minilora.nf4_inference.default") == 2


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64], ids=str)
def test_with_and_without_gradients_a_layer_computes_the_same(
    rows: int, dtype: torch.dtype
) -> None:
    w = minilora.quantize_nf4(gaussian(48, 128))
    x, bias = gaussian(rows, 128, dtype=dtype), gaussian(48)
    A, B = gaussian(4, 128), gaussian(48, 4)
    y = minilora.lora_linear(x, w, A, B, 2.0, bias)
    with torch.no_grad():
        z = minilora.lora_linear(x, w, A, B, 2.0, bias)
    assert y.dtype == z.dtype == dtype
    # Two roundings of y, and in bfloat16 also of A, B and x A^T.
    unit = 2**-8 if dtype == BF16 else 128 * 2**-24
    size = x.double().abs() @ w.dequantize(torch.float64).abs().T
    size = size + 2 * (x.double().abs() @ A.double().abs().T) @ B.double().abs().T + 1
    assert ((y.double() - z.double()).abs() <= 6 * unit * (size + bias.double().abs())).all()


_FORKED = """
import os, sys, time
import torch
import minilora
from minilora import ops
torch.set_num_threads(2)
w = minilora.quantize_nf4(torch.randn(512, 512, generator=torch.Generator().manual_seed(0)))
x = torch.ones(1, 512, dtype=torch.bfloat16)
expected = ops.nf4_inference(x, w, None)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(ops.nf4_inference(x, w, None), expected) else 1)
for _ in range(600):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.1)
os.kill(child, 9)
sys.exit("the child hangs")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_computes_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", _FORKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_several_calling_threads_at_once_get_their_own_results() -> None:
    weights = [minilora.quantize_nf4(gaussian(256, 256, seed=i)) for i in range(3)]
    x = gaussian(2, 256, dtype=BF16)
    expected = [few_rows(x, w) for w in weights]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(200):
            if not torch.equal(few_rows(x, weights[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_and_the_pool_without_openmp(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = minilora.quantize_nf4(gaussian(1030, 256))
    x, A, B = gaussian(3, 256), gaussian(2, 256), gaussian(1030, 2)
    expected = few_rows(x, w, A, B, 1.0)
    before = torch.get_num_threads()
    monkeypatch.setattr(module, "_GRAIN", 1)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(few_rows(x, w, A, B, 1.0), expected)
        monkeypatch.setattr(team, "_OPENMP", {})
        assert torch.equal(few_rows(x, w, A, B, 1.0), expected)
    finally:
        torch.set_num_threads(before)


def test_the_call_is_laid_out_as_the_kernels_read_it() -> None:
    # team.py reads the number of rows from the first field, and writes the kernel to the second.
    assert (module._Call.O.offset, module._Call.kernel.offset) == (0, 8)
    assert ctypes.sizeof(module._Call) == module._CALL.itemsize


_GENERIC = """
import torch, minilora
from minilora.kernels.cpu.avx512 import AVX512, AVX512_BF16
from minilora.kernels.cpu.few_rows import few_rows
assert not AVX512 and not AVX512_BF16
g = torch.Generator().manual_seed(0)
w = minilora.quantize_nf4(torch.randn(33, 128, generator=g))
x = torch.randn(3, 128, generator=g)
exact = x.double() @ w.dequantize(torch.float64).T
size = x.double().abs() @ w.dequantize(torch.float64).abs().T
assert ((few_rows(x, w).double() - exact).abs() <= 130 * 2**-24 * size).all()
y = few_rows(x.bfloat16(), w)
exact = x.bfloat16().double() @ w.dequantize(torch.float64).T
assert ((y.double() - exact).abs() <= 2**-8 * size * 1.01).all()
"""


def test_a_processor_without_avx512_runs_the_plain_loop(tmp_path: Any) -> None:
    environment = {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _GENERIC],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("adapter", [False, True], ids=["NF4Linear", "QLoRALinear"])
def test_in_training_mode_a_layer_meets_the_weight_that_dequantize_returns(adapter: bool) -> None:
    """What a training run computes does not depend on the processor's instructions."""
    model = torch.nn.Sequential(torch.nn.Linear(128, 32, bias=False, dtype=BF16))
    minilora.quantize(model, "0")
    if adapter:
        minilora.inject(model, 2, targets="0")
    x = gaussian(3, 128, dtype=BF16)
    expected = x @ model[0].weight.dequantize(BF16).T
    with torch.no_grad():
        assert torch.equal(model.train()(x), expected)
        assert torch.equal(model.eval()(x), few_rows(x, model[0].weight))
    assert torch.equal(model.train()(x.requires_grad_()), expected)
    assert model.eval()(x).requires_grad
