"""A layer with an adapter is the same layer: what inject, use, disabled and eject leave as it was.

One test per property, each on six architectures with dense and with 4-bit linear layers.
"""

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import ARCHITECTURES, adapters_of, quantize_untied, randomize, tiny_model
from torch import Tensor, nn

import minilora
from minilora import LoRALinear, NF4Linear
from minilora.lora import LoRALayer
from minilora.targets import linear_layers

pytest.importorskip("transformers", reason="the six architectures are transformers' own")

KINDS = [(name, quantized) for name in ARCHITECTURES for quantized in (False, True)]
every_kind = pytest.mark.parametrize(
    ("name", "quantized"), KINDS, ids=[f"{n}-{'nf4' if q else 'dense'}" for n, q in KINDS]
)

# Compiling takes seconds for each layer.
compiled_kinds = pytest.mark.parametrize(
    ("name", "quantized", "layers"),
    [
        ("llama", True, 1),
        ("t5", True, 1),
        *(pytest.param(*kind, 2, marks=pytest.mark.soak) for kind in KINDS),
    ],
)

Run = Callable[[nn.Module], Tensor]


def make(name: str, quantized: bool, layers: int = 2) -> tuple[Any, Run]:
    """A small model with its forward; in 4 bits all linear layers that are not tied."""
    model, run = tiny_model(name, layers)
    if quantized:
        quantize_untied(model)
    return model.requires_grad_(False), run


@every_kind
def test_the_identity_holds_before_training_and_eject_undoes_it(name: str, quantized: bool) -> None:
    model, run = make(name, quantized)
    before = run(model)
    minilora.inject(model, r=2)
    assert torch.equal(run(model), before)

    randomize(model)
    assert not torch.equal(run(model), before)
    with minilora.disabled(model):
        assert torch.equal(run(model), before)
    assert torch.equal(run(minilora.eject(model)), before)


@every_kind
def test_the_bases_keys_and_parameters_are_the_same_objects(name: str, quantized: bool) -> None:
    model, _ = make(name, quantized)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    modules = dict(model.named_modules())
    minilora.inject(model, r=2)

    assert [k for k in model.state_dict() if ".adapters." not in k] == keys
    found = {n: p for n, p in model.named_parameters() if ".adapters." not in n}
    assert found.keys() == parameters.keys()
    assert all(found[n] is p for n, p in parameters.items())
    assert all(model.get_submodule(n) is m for n, m in modules.items())

    minilora.eject(model)
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()) == modules


@every_kind
def test_hooks_go_on_running(name: str, quantized: bool) -> None:
    model, run = make(name, quantized)
    path, layer = next(iter(linear_layers(model).items()))
    calls: list[str] = []
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda *_: calls.append("after"))
    run(minilora.inject(model, r=2))
    assert calls[:2] == ["before", "after"], path
    calls.clear()
    run(minilora.eject(model))
    assert calls[:2] == ["before", "after"], path


@every_kind
def test_what_is_tied_stays_tied(name: str, quantized: bool) -> None:
    model, run = make(name, quantized)

    def tied() -> list[list[str]]:
        names: dict[int, list[str]] = {}
        for path, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(path)
        return sorted(found for found in names.values() if len(found) > 1)

    before, expected = tied(), run(model)
    minilora.inject(model, r=2)
    model.tie_weights()
    assert tied() == before and torch.equal(run(model), expected)
    minilora.eject(model)
    model.tie_weights()
    assert tied() == before and torch.equal(run(model), expected)


@every_kind
def test_a_module_that_is_registered_twice_is_adapted_once(name: str, quantized: bool) -> None:
    model, run = make(name, quantized)
    path, layer = next(iter(linear_layers(model).items()))
    model.also = layer
    minilora.inject(model, r=2)
    assert isinstance(layer, LoRALayer) and model.also is model.get_submodule(path) is layer
    assert list(layer.adapters) == ["default"]
    run(minilora.eject(model))
    assert model.also is layer and not isinstance(layer, LoRALayer)


@every_kind
def test_a_deep_copy_and_a_pickle_compute_the_same(name: str, quantized: bool) -> None:
    model, run = make(name, quantized)
    randomize(minilora.inject(model, r=2))
    expected = run(model)
    assert torch.equal(run(copy.deepcopy(model)), expected)

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(run(loaded), expected)
    assert torch.equal(run(minilora.eject(loaded)), run(minilora.eject(model)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own tracing
@pytest.mark.filterwarnings("ignore::UserWarning")
@compiled_kinds
def test_a_compiled_model_follows_inject_use_disabled_and_eject(
    name: str, quantized: bool, layers: int
) -> None:
    torch._dynamo.reset()
    model, run = make(name, quantized, layers)
    base = run(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def same(expected: Tensor) -> bool:
        return torch.allclose(run(compiled), expected, atol=1e-5)

    assert same(base)
    minilora.inject(model, r=2)
    assert same(base)
    randomize(model)
    adapted = run(model)
    assert same(adapted) and not torch.allclose(adapted, base, atol=1e-3)
    with minilora.disabled(model):
        assert same(base)
    assert same(adapted)
    minilora.use(model)
    assert same(base)
    minilora.use(model, "default")
    assert same(adapted)
    minilora.eject(model)
    assert same(base)


@every_kind
def test_a_layer_with_accelerates_hook_keeps_it_and_gets_its_adapter(
    name: str, quantized: bool
) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="the hook is accelerate's")

    class Counts(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    model, run = make(name, quantized)
    base = run(model)
    counter = Counts()
    for layer in linear_layers(model).values():
        hooks.add_hook_to_module(layer, counter)

    minilora.inject(model, r=2)
    assert torch.equal(run(model), base) and counter.calls
    randomize(model)
    adapted = run(model)
    assert not torch.equal(adapted, base), "the hook hides the adapter"

    for layer in linear_layers(model).values():
        hooks.remove_hook_from_module(layer)
    assert torch.equal(run(model), adapted)
    assert torch.equal(run(minilora.eject(model)), base)


def test_a_layer_that_accelerate_offloads_is_refused_by_name() -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="the hook is accelerate's")
    model = nn.Sequential(nn.Linear(8, 8))
    weights = {n: p.detach().clone() for n, p in model[0].named_parameters()}
    hook = hooks.AlignDevicesHook("cpu", offload=True, weights_map=weights)
    hooks.add_hook_to_module(model[0], hook)
    with pytest.raises(TypeError, match=r"^0 \(Linear\) is offloaded by accelerate"):
        minilora.inject(model, r=2)


SHARDED = """
import gc, sys, warnings
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
warnings.filterwarnings("ignore")
import minilora
from helpers import ARCHITECTURES, quantize_untied, randomize, tiny_model
from minilora.lora import LoRALayer

dist.init_process_group("gloo")
torch.set_num_threads(1)


def losses(model, run):
    parameters = minilora.adapter_parameters(model)
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    found = []
    for _ in range(3):
        loss = run(model).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def one(name, quantized):
    models = []
    for _ in range(2):
        model, run = tiny_model(name)
        if quantized:
            quantize_untied(model)
        randomize(minilora.inject(model, r=2), size=0.05)
        models.append(model)
    plain, sharded = models
    expected = losses(plain, run)

    # The repeated blocks: what the outermost lists of modules hold.
    lists = [n for n, m in sharded.named_modules() if isinstance(m, torch.nn.ModuleList)]
    for path in lists:
        if not any(path.startswith(outer + ".") for outer in lists):
            for block in sharded.get_submodule(path):
                fully_shard(block)
    fully_shard(sharded)
    worst = max(abs(a - b) for a, b in zip(expected, losses(sharded, run), strict=True))
    scale = max(map(abs, expected))
    assert worst <= 1e-5 * max(1.0, scale), (name, quantized, worst, expected)
    layer = next(m for m in sharded.modules() if isinstance(m, LoRALayer))
    assert type(layer.adapters["default"].A).__name__ == "DTensor"
    minilora.use(sharded)
    run(sharded)


for name in ARCHITECTURES:
    for quantized in (False, True):
        one(name, quantized)
        gc.collect()
if dist.get_rank() == 0:
    print("equal", len(ARCHITECTURES))
dist.destroy_process_group()
"""


@pytest.mark.soak
def test_two_processes_of_fully_shard_train_as_one(tmp_path: Any) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script)]
    paths = ":".join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"equal {len(ARCHITECTURES)}" in done.stdout


def test_a_layer_that_is_itself_sharded_is_not_ejected() -> None:
    model = minilora.inject(nn.Sequential(nn.Linear(8, 8)), r=2)
    model[0].__class__ = type("FSDPLoRALinear", (LoRALinear,), {})  # as fully_shard does
    with pytest.raises(TypeError, match=r"^0 has become a FSDPLoRALinear"):
        minilora.eject(model)


class Named(nn.Linear):
    """A subclass without a forward of its own."""


def test_a_subclass_of_linear_keeps_its_class_under_the_adapter() -> None:
    model, x = nn.Sequential(Named(8, 6)), torch.randn(3, 8)
    base = model(x)
    randomize(minilora.inject(model, r=2))
    assert isinstance(model[0], Named) and isinstance(model[0], LoRALinear)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), model(x)) and type(other[0]) is type(model[0])
    assert type(minilora.eject(model)[0]) is Named and torch.equal(model(x), base)


def test_quantize_and_merge_keep_a_layer_in_its_place() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    layer, calls = model[0], []
    layer.register_forward_hook(lambda *_: calls.append(1))
    minilora.quantize(model)
    assert model[0] is layer and type(layer) is NF4Linear
    randomize(minilora.inject(model, r=2))
    expected = model(torch.ones(1, 64))
    minilora.merge(model)
    assert model[0] is layer and type(layer) is nn.Linear
    assert vars(layer).keys() == vars(nn.Linear(64, 64)).keys()
    assert torch.allclose(model(torch.ones(1, 64)), expected, atol=1e-5) and len(calls) == 2
    assert adapters_of(model) == {}
