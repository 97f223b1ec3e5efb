"""What only a card can show: opcheck and compile on CUDA, graph capture, streams, a second stream's scratch. `make test-gpu`."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import minilora
from minilora import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.skipif(
        os.environ["TRITON_INTERPRET"] == "1",
        reason="kernels are interpreted in this process: make test-gpu",
    ),
]

SHAPE = (192, 256)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def weight(double: bool = True) -> minilora.NF4Weight:
    return minilora.quantize_nf4(gaussian(*SHAPE), double_quant=double)


def products(M: int, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    w, (O, I) = weight(), SHAPE
    x, dy, z, A, B = (
        gaussian(*size, dtype=dtype) for size in ((M, I), (M, O), (M, 4), (4, I), (O, 4))
    )
    layout = list(SHAPE), 64
    return [
        (ops.nf4_linear, (x, *w.tensors, None, *layout)),
        (ops.nf4_linear, (x, *w.tensors, gaussian(O, dtype=dtype), *layout)),
        (ops.nf4_linear_backward, (dy, *w.tensors, *layout)),
        (ops.nf4_lora_linear, (x, *w.tensors, None, z, B, 2.0, *layout)),
        (ops.nf4_lora_linear_backward, (dy, *w.tensors, z, A, 2.0, *layout)),
    ]


@HALVES
@pytest.mark.parametrize("M", [1, 16, 100, 1000])
def test_opcheck_of_the_products(M: int, dtype: torch.dtype) -> None:
    for op, args in products(M, dtype):
        torch.library.opcheck(op, args)


def test_opcheck_of_the_rest() -> None:
    absmax = gaussian(300).abs()
    torch.library.opcheck(ops.quantize, (gaussian(3, 43), 64))
    torch.library.opcheck(ops.double_quantize, (absmax,))
    torch.library.opcheck(ops.double_dequantize, tuple(ops.double_quantize(absmax)))
    for double in (False, True):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            torch.library.opcheck(ops.dequantize, (*weight(double).tensors, list(SHAPE), dtype, 64))


def test_a_quantized_weight_is_the_same_on_cpu_and_gpu() -> None:
    x = gaussian(1000, 1000).cpu()
    for double in (False, True):
        here, there = (
            minilora.quantize_nf4(x, double_quant=double),
            minilora.quantize_nf4(x.cuda(), double_quant=double),
        )
        for a, b in zip(here.tensors, there.tensors, strict=True):
            assert (a is None and b is None) or torch.equal(a, b.cpu())
        assert torch.equal(here.dequantize(), there.dequantize().cpu())


@HALVES
def test_an_adapted_layer_compiles_without_a_graph_break_and_gives_its_gradients(
    dtype: torch.dtype,
) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 64)
    ).to("cuda", dtype)
    minilora.inject(minilora.quantize(model), r=4)
    with torch.no_grad():
        for p in minilora.adapter_parameters(model):
            p.normal_(std=0.1)
    compiled = torch.compile(model, fullgraph=True)
    for M in (1, 64, 2000):
        x = gaussian(M, 256, dtype=dtype)
        results = []
        for f in (model, compiled):
            model.zero_grad()
            y = f(x)
            y.float().square().sum().backward()
            results.append(
                [y.detach(), *(p.grad.clone() for p in minilora.adapter_parameters(model))]
            )
        for a, b in zip(*results, strict=True):
            assert a.abs().max() > 0 and (a - b).abs().max() <= 0.02 * a.abs().max()


@HALVES
@pytest.mark.parametrize("M", [1, 16, 100, 1000])
def test_a_captured_graph_replays_to_the_same_bits(M: int, dtype: torch.dtype) -> None:
    for op, args in products(M, dtype):
        expected = op(*args)  # compiles, and brings the tables of levels to the device
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = op(*args)
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)


@HALVES
def test_two_streams_at_once_do_not_disturb_each_other(dtype: torch.dtype) -> None:
    streams = [torch.cuda.Stream() for _ in range(2)]
    for M in (1, 100, 2000):
        for op, args in products(M, dtype):
            expected = op(*args)
            torch.cuda.synchronize()
            found: list[list[Tensor]] = [[], []]
            for _ in range(20):
                for stream, into in zip(streams, found, strict=True):
                    with torch.cuda.stream(stream):
                        into.append(op(*args))
            torch.cuda.synchronize()
            assert all(torch.equal(y, expected) for into in found for y in into)
