"""What only a real GPU can show: opcheck and compile on CUDA, graph capture, streams.

`make test-gpu` runs it.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import helpers
import pytest
import torch
from rounding import Rounded
from torch import Tensor, nn

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
DEVICE = "cuda"
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
ROWS = pytest.mark.parametrize("M", [1, 16, 100, 1000])
OPERATORS = torch.ops.minilora


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return helpers.gaussian(*shape, dtype=dtype, seed=seed).to(DEVICE)


def weight(double: bool = True) -> minilora.NF4Weight:
    return minilora.quantize_nf4(gaussian(*SHAPE), double_quant=double)


def products(M: int, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every product as an operator with its arguments."""
    O, I = SHAPE
    w = ops._flatten(weight())
    x, dy, z = gaussian(M, I, dtype=dtype), gaussian(M, O, dtype=dtype), gaussian(M, 4, dtype=dtype)
    A, B, bias = gaussian(4, I, dtype=dtype), gaussian(O, 4, dtype=dtype), gaussian(O, dtype=dtype)
    return [
        (OPERATORS.nf4_linear.default, (x, *w, None)),
        (OPERATORS.nf4_linear.default, (x, *w, bias)),
        (OPERATORS.nf4_linear_backward.default, (dy, *w)),
        (OPERATORS.nf4_lora_linear.default, (x, *w, None, z, B, 2.0)),
        (OPERATORS.nf4_lora_linear_backward.default, (dy, *w, z, A, 2.0)),
    ]


@HALVES
@ROWS
def test_opcheck_of_the_products(M: int, dtype: torch.dtype) -> None:
    for operator, args in products(M, dtype):
        torch.library.opcheck(operator, args)


def test_opcheck_of_quantizing_and_dequantizing() -> None:
    absmax = gaussian(300).abs()
    torch.library.opcheck(OPERATORS.quantize.default, (gaussian(3, 43), 64, "nf4"))
    torch.library.opcheck(OPERATORS.double_quantize.default, (absmax,))
    torch.library.opcheck(OPERATORS.double_dequantize.default, ops.double_quantize(absmax))
    for double in (False, True):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            args = (*ops._flatten(weight(double)), dtype)
            torch.library.opcheck(OPERATORS.dequantize.default, args)


def test_a_quantized_weight_is_the_same_on_cpu_and_gpu() -> None:
    x = gaussian(1000, 1000).cpu()
    for double in (False, True):
        here = minilora.quantize_nf4(x, double_quant=double)
        there = minilora.quantize_nf4(x.cuda(), double_quant=double)
        for a, b in zip(here.tensors, there.tensors, strict=True):
            assert (a is None and b is None) or torch.equal(a, b.cpu())
        assert torch.equal(here.dequantize(), there.dequantize().cpu())


def adapted_model(dtype: torch.dtype) -> nn.Sequential:
    """Two quantized layers with adapters, whose B is not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64)).to(DEVICE, dtype)
    minilora.inject(minilora.quantize(model), r=4, alpha=8)
    with torch.no_grad():
        for i, p in enumerate(minilora.adapter_parameters(model)):
            p.copy_(0.1 * gaussian(*p.shape, seed=i))
    return model


def training_step(
    model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, ...]:
    """Returns y and the gradients of A and B of both layers, for the loss sum(y^2)."""
    model.zero_grad()
    y = call(x)
    y.float().square().sum().backward()
    gradients = (p.grad for p in minilora.adapter_parameters(model))
    return y.detach(), *(g.clone() for g in gradients if g is not None)


def expected_training_step(model: nn.Sequential, x: Tensor) -> tuple[Rounded, ...]:
    r"""What `training_step` returns, in float64, with the variance of its rounding.

    h = x W1^T + s (x A1^T) B1^T + b1        y = relu(h) W2^T + s (relu(h) A2^T) B2^T + b2
    dA = s (dy B)^T x        dB = s dy^T (x A^T)        dx = dy W + s (dy B) A
    """
    s, exact = 2.0, Rounded.exact
    W1, W2 = (exact(model[i].weight.dequantize(torch.float32).to(x.dtype)) for i in (0, 2))
    b1, b2 = (exact(model[i].bias) for i in (0, 2))
    parameters = minilora.adapter_parameters(model)
    A1, B1, A2, B2 = (exact(p.to(x.dtype)) for p in parameters)

    x1 = exact(x)
    z1 = x1 @ A1.T
    h = x1 @ W1.T + (z1 @ B1.T) * s + b1
    x2 = h.relu()
    z2 = x2 @ A2.T
    y = x2 @ W2.T + (z2 @ B2.T) * s + b2

    dy = y * 2.0
    u2 = dy @ B2
    dh = h.relu_backward(dy @ W2 + (u2 @ A2) * s)
    u1 = dh @ B1
    return y, (u1.T @ x1) * s, (dh.T @ z1) * s, (u2.T @ x2) * s, (dy.T @ z2) * s


@pytest.fixture
def sums_in_float32() -> Iterator[None]:
    """cuBLAS adds the parts of a split sum in float32, as `Rounded` assumes, not in 16 bits."""
    matmul = torch.backends.cuda.matmul
    before = (
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
    )
    matmul.allow_fp16_reduced_precision_reduction = False
    matmul.allow_bf16_reduced_precision_reduction = False
    yield
    matmul.allow_fp16_reduced_precision_reduction = before[0]
    matmul.allow_bf16_reduced_precision_reduction = before[1]


@HALVES
def test_an_adapted_layer_compiles_without_a_graph_break_and_gives_its_gradients(
    dtype: torch.dtype, sums_in_float32: None
) -> None:
    model = adapted_model(dtype)
    compiled = torch.compile(model, fullgraph=True)
    for M in (1, 64, 2000):
        x = gaussian(M, 256, dtype=dtype)
        expected = expected_training_step(model, x)
        for call in (model, compiled):
            found = training_step(model, call, x)
            for computed, exact in zip(found, expected, strict=True):
                assert computed.abs().max() > 0
                assert exact.admits(computed), exact.deviations(computed).max()


@HALVES
@ROWS
def test_a_captured_graph_replays_to_the_same_bits(M: int, dtype: torch.dtype) -> None:
    for operator, args in products(M, dtype):
        # Compiles, and brings the tables of levels to the device.
        expected = operator(*args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = operator(*args)
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)


@HALVES
def test_two_streams_at_once_do_not_disturb_each_other(dtype: torch.dtype) -> None:
    streams = [torch.cuda.Stream() for _ in range(2)]
    for M in (1, 100, 2000):
        for operator, args in products(M, dtype):
            expected = operator(*args)
            torch.cuda.synchronize()

            found: list[list[Tensor]] = [[], []]
            for _ in range(20):
                for stream, into in zip(streams, found, strict=True):
                    with torch.cuda.stream(stream):
                        into.append(operator(*args))
            torch.cuda.synchronize()
            assert all(torch.equal(y, expected) for into in found for y in into)


@ROWS
@torch.no_grad()
def test_a_captured_layer_follows_its_input(M: int) -> None:
    """What generation replays for each token: the same kernels on whatever x holds."""
    dense = nn.Linear(256, 192).to(DEVICE, torch.bfloat16)
    layer = minilora.QLoRALinear(minilora.NF4Linear.from_linear(dense), r=4).to(DEVICE).eval()
    x = gaussian(M, 256, dtype=torch.bfloat16)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layer(x)

    x.copy_(gaussian(M, 256, dtype=torch.bfloat16, seed=1))
    graph.replay()
    assert torch.equal(found, layer(x))


def test_generation_as_a_graph_has_the_logits_of_eager_decoding() -> None:
    transformers = pytest.importorskip("transformers", reason="the model is transformers' own")
    from minilora.huggingface import decode_graph

    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 300}
    parts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **parts))
    model = minilora.quantize(model.to(DEVICE, torch.bfloat16).eval())
    helpers.randomize(minilora.inject(model, r=4), "default", size=0.1)

    padded = torch.tensor([[0, 0, 3, 4], [5, 6, 7, 8]], device=DEVICE)
    told = {"return_dict_in_generate": True, "output_logits": True, "disable_compile": True}
    answer = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def logits(prompts: Tensor) -> Tensor:
        asked = {"input_ids": prompts, "attention_mask": (prompts > 0).long()}
        options = {"cache_implementation": "static", **told, **answer}
        return torch.stack(model.generate(**asked, **options).logits)

    with decode_graph(model):
        graphs = [logits(padded), logits(padded[1:])]
        helpers.randomize(model, "default", size=0.2)
        graphs.append(logits(padded))
    assert torch.equal(graphs[2], logits(padded))
    helpers.randomize(model, "default", size=0.1)
    assert torch.equal(graphs[0], logits(padded)) and torch.equal(graphs[1], logits(padded[1:]))
    assert not torch.equal(graphs[0], graphs[2])


def test_a_refused_graph_leaves_sampling_and_other_graphs_as_they_were() -> None:
    transformers = pytest.importorskip("transformers", reason="the models are transformers' own")
    from minilora.huggingface import NotRecordableError, decode_graph

    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 300}
    parts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, **parts)
    model, other = (transformers.LlamaForCausalLM(config).to(DEVICE).eval() for _ in range(2))

    def waits(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.sum().item()

    model.model.norm.register_forward_hook(waits)

    prompt = torch.tensor([[5, 6, 7, 8]], device=DEVICE)
    asked = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": 9}
    refused = pytest.raises(NotRecordableError, match="the CPU waits for the GPU")
    with refused, decode_graph(model):
        model.generate(**asked)
    assert model.generate(**asked, do_sample=True).shape[1] > 4
    with decode_graph(other):
        found = other.generate(**asked, do_sample=False)
    assert torch.equal(found, other.generate(**asked, do_sample=False))
