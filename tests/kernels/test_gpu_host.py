"""What Python does for a product on a GPU: counted, with launches recorded in place of made."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
import torch.nn.functional as F
from helpers import gaussian
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import minilora
from minilora import ops
from minilora.kernels.gpu import choose, lora, matmul, runtime
from minilora.kernels.reference.lora import frozen_adapters, in_dtype

pytestmark = pytest.mark.skipif(not gpu.INTERPRETED, reason="CPU tensors stand for the GPU's here")

TOOLS = Path(__file__).parents[1] / "tools"
O, I, R = 128, 256, 8

Launch = tuple[str, Any, tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What the GPU's kernels are asked for from now on. CPU tensors go there without a dispatch."""
    recorded: list[Launch] = []

    def start(kernel: Any, grid: Any, args: Any, settings: Any) -> None:
        recorded.append((kernel.__name__, grid, args, settings))

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("PyTorch's dispatcher was called")

    monkeypatch.setattr(runtime, "start", start)
    for file in ("lora", "matmul"):
        backend = sys.modules[f"minilora.kernels.gpu.{file}"]
        monkeypatch.setitem(sys.modules, f"minilora.kernels.cpu.{file}", backend)
    for name in ("nf4_inference", "nf4_linear", "nf4_lora_linear"):
        monkeypatch.setattr(ops, name, ops._undispatched(name, refuse))
    return recorded


def layers() -> list[nn.Module]:
    """A quantized layer, and one with an adapter, both in bfloat16 and ready to generate."""
    dense = nn.Linear(I, O, bias=False).bfloat16()
    plain = minilora.NF4Linear.from_linear(dense)
    adapted = minilora.QLoRALinear(minilora.NF4Linear.from_linear(dense), r=R)
    for lora_of in adapted.adapters.values():
        lora_of.to(torch.bfloat16)
    return [plain.eval(), adapted.eval()]


def operators(call: Callable[[], Any]) -> Counter[str]:
    """How often each of PyTorch's operators runs in a call, those inside others included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return Counter(event.name for event in profile.events() if event.name.startswith("aten::"))


def arguments(launch: Launch) -> Any:
    """A launch with the addresses of its tensors."""

    def described(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(described, value))
        return (value.data_ptr(), value.dtype) if isinstance(value, Tensor) else value

    name, grid, args, settings = launch
    return name, grid, described(args), settings


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, I), (1, 1, I), (3, I), (3, 1, I)])
def test_the_second_call_checks_nothing_again_and_allocates_its_results_alone(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    checks = []
    monkeypatch.setattr(runtime, "check_weight", checks.append)
    x = gaussian(*shape).bfloat16()

    # The partial sums and y; and z = x A^T, which PyTorch computes with views of its own.
    for layer, allocations in zip(layers(), (2, 3), strict=True):
        layer(x)
        assert len(checks) == 1
        checks.clear()
        launches.clear()

        found = operators(lambda layer=layer: layer(x))
        assert not checks
        assert [name for name, *_ in launches] == ["_partial", "_sum"]
        assert found["aten::empty"] <= allocations
        if allocations == 3:
            found -= operators(lambda layer=layer: F.linear(x, layer.adapters["default"].A))
        assert found.keys() <= {"aten::empty", "aten::new_empty"}, found


def test_nothing_is_recorded_for_autograd_where_no_gradient_is_wanted(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes: list[Any] = []
    monkeypatch.setattr(torch.autograd.Function, "apply", lambda *args: nodes.append(args))
    x = gaussian(3, I).bfloat16()
    with torch.no_grad():
        for layer in layers():
            assert layer(x).grad_fn is None
        plain, _ = layers()
        assert plain.train()(x).grad_fn is None
    assert not nodes and len(launches) == 6


@torch.no_grad()
def test_the_short_way_and_the_operator_launch_the_same(launches: list[Launch]) -> None:
    plain, adapted = layers()
    (lora_of,) = adapted.adapters.values()
    for shape in ((1, I), (2, 3, I), (70, I)):
        x = gaussian(*shape).bfloat16()
        z = x @ lora_of.A.T
        plain(x)
        adapted(x)
        short, launches[:] = launches[:], []

        matmul.nf4_linear(x, ops_weight(plain), None)
        lora.nf4_lora_linear(x, ops_weight(adapted), None, z, lora_of.B, lora_of.scale)
        assert len(short) == len(launches) > 0
        for a, b in zip(short, launches, strict=True):
            assert described(a) == described(b)
        launches.clear()


@torch.no_grad()
def test_x_with_gaps_is_multiplied_as_a_matrix(launches: list[Launch]) -> None:
    _, adapted = layers()
    x = gaussian(4, 3, 2 * I).bfloat16()[..., :I]
    assert adapted(x).shape == (4, 3, O)
    found = operators(lambda: adapted(x))
    assert found["aten::mm"] and not found["aten::bmm"]


def ops_weight(layer: Any) -> Any:
    """The weight of a layer as an operator gives it to a kernel."""
    return ops.PackedWeight(*ops._flatten(layer.weight))


def described(launch: Launch) -> Any:
    """A launch without the addresses of its tensors."""

    def described(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(described, value))
        if isinstance(value, Tensor):
            return value.dtype, value.shape, value.stride()
        return value

    name, grid, args, settings = launch
    return name, grid, described(args), settings


# What a CUDA graph needs.


@torch.no_grad()
def test_a_step_of_generation_can_be_captured(launches: list[Launch]) -> None:
    """The same kernels on the same addresses; nothing comes from the CPU or waits for the GPU."""
    for layer in layers():
        x = gaussian(1, 1, I).bfloat16()
        layer(x)
        steps = []
        for _ in range(2):
            launches.clear()
            used = operators(lambda layer=layer, x=x: layer(x))
            forbidden = {"aten::_local_scalar_dense", "aten::item", "aten::copy_", "aten::_to_copy"}
            assert not used.keys() & (forbidden | {"aten::nonzero", "aten::to"}), used
            steps.append([arguments(launch) for launch in launches])

        # Of the first kernel all but the buffer of its sums: x, the weight and the tables.
        (_, grid, args, settings), (_, *others) = steps[0][0], steps[1][0]
        assert others[0] == grid and others[2] == settings
        assert [a for a in args if a != args[3]] == [a for a in others[1] if a != others[1][3]]
        assert args[0][0] == x.data_ptr()
        assert [step[0] for step in steps[0]] == [step[0] for step in steps[1]]


class Counting(TorchDispatchMode):
    """Counts the operators of this library that it sees."""

    seen = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        self.seen += function.namespace == "minilora"
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_what_watches_the_operators_still_sees_them() -> None:
    plain, _ = layers()
    x = gaussian(3, 2, I).bfloat16()
    with Counting() as counting:
        expected = plain(x)
    assert counting.seen == 1
    assert torch.equal(torch.vmap(plain)(x), expected)


@torch.no_grad()
def test_frozen_adapters_round_a_factor_once_and_change_no_bit(launches: list[Launch]) -> None:
    adapted = minilora.QLoRALinear(layers()[0], r=R).eval()
    (adapter,) = adapted.adapters.values()
    halves, singles = gaussian(3, I).bfloat16(), gaussian(3, I)

    def factors() -> list[Tensor]:
        """B as the kernels are given it, for both dtypes of x, twice."""
        launches.clear()
        for x in (halves, halves, singles.half(), halves):
            adapted(x)
        return [args[2].right for name, _, args, _ in launches if name == "_sum"]

    outside = factors()
    with frozen_adapters():
        inside = factors()
    assert all(map(torch.equal, inside, outside))
    assert len({t.data_ptr() for t in inside}) == 2
    assert [t.dtype for t in inside] == [torch.bfloat16] * 2 + [torch.float16, torch.bfloat16]

    # A factor that needs no rounding is itself, and outside a change is seen again.
    with frozen_adapters():
        assert in_dtype(adapter.B, torch.float32) is adapter.B
    adapter.B.add_(1)
    assert torch.equal(factors()[0], adapter.B.bfloat16())


# Falling back.


def test_a_product_that_runs_out_of_resources_is_computed_on_a_smaller_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real launches, but a tile with more than two stages does not fit."""
    tile = {"path": "tile", "BM": 16, "BO": 32, "BI": 64, "warps": 4, "stages": 4}
    monkeypatch.setattr(choose, "_table", lambda *_: [{"rows": 9} | tile, choose.DENSE])
    choose.forget()
    tried = []
    most = 2
    real = runtime.start

    def start(kernel: Any, grid: Any, args: Any, settings: Any) -> None:
        tried.append((kernel.__name__, settings.get("num_stages")))
        if settings.get("num_stages", 0) > most:
            raise runtime.OutOfResources(10**6, 101376, "shared memory")
        real(kernel, grid, args, settings)

    monkeypatch.setattr(runtime, "start", start)
    w = ops_weight(layers()[0])
    x, dy = gaussian(3, I).bfloat16(), gaussian(3, O).bfloat16()
    expected = matmul.forward(x, w, None, None, choose.DENSE)

    tried.clear()
    says = r"forward: .*'stages': 4} needs more than cpu has .*'stages': 2} is used .*--tune"
    with pytest.warns(UserWarning, match=says):
        found = matmul.forward(x, w, None, None)
    assert [stages for _, stages in tried] == [4, 3, 2]
    assert torch.allclose(found, expected, atol=0.1)

    # It is remembered, without another warning; a product that says how it wants to be computed
    # gets the error.
    tried.clear()
    matmul.forward(x, w, None, None)
    assert [stages for _, stages in tried] == [2]
    with pytest.raises(runtime.OutOfResources):
        matmul.forward(x, w, None, None, tile)

    tried.clear()
    most = 1
    with pytest.warns(UserWarning, match="backward: .*'path': 'dense'} is used from now on"):
        found = matmul.backward(dy, w, None)
    assert tried[-1][0] == "_dequantize"
    assert torch.equal(found, matmul.backward(dy, w, None, choose.DENSE))
    choose.forget()


# Launches that Triton is not asked about a second time.


def test_a_remembered_launch_is_the_one_that_triton_would_make() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOLS / "launch_cases.py")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    count, remembered, kernels = json.loads(done.stdout)
    assert count > 4 * remembered and remembered >= kernels > 15
