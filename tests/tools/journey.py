"""What a user does with a model, from the base to the merged folder, and what has to hold then.

quantize, inject, a training step, an adapter file, PEFT, eject, merge, with a model of
`architectures.ARCHITECTURES`, dense or in NF4. What does not work has to be refused, or warned of,
by the name of a layer; a layer that is refused is left out, and the rest has to pass. Anything else
is an AssertionError.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from architectures import tiny_model
from helpers import randomize, same_bits
from torch import Tensor, nn

import minilora
from minilora.huggingface.bypassed import refuse_bypassed
from minilora.layers import NF4Linear
from minilora.lora import LoRALayer
from minilora.targets import linear_layers, unreached_matrices

RANK = 4

# Mamba's A_log is the most of these small models, 5.1 %; of a large one it is 0.4 %.
MOST_LEFT = 0.06

# Of the largest output. PEFT and a merge add the update in another order than the layer does, which
# moves an output by some roundings of float32, 6e-8 each.
TOLERANCE = 1e-5

Call = Callable[[nn.Module], Tensor]


@dataclass
class Journey:
    """How far a model came.

    Attributes:
        name: the model's class.
        quantized: whether its layers are in NF4.
        layers: how many layers got an adapter.
        linear: how many linear layers there are.
        refused: what was refused, with names of layers, which were then left out.
        warned: what was warned of.
        complete: whether the rest passed every station.
    """

    name: str
    quantized: bool
    layers: int = 0
    linear: int = 0
    refused: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    complete: bool = False


def travel(name: str, quantized: bool, folder: Path) -> Journey:
    """Takes a model through all stations. Raises AssertionError if something is wrong silently."""
    layers = linear_layers(tiny_model(name)[0])
    journey = Journey(name, quantized, linear=len(layers))
    exclude: list[str] = []
    while True:
        try:
            with _recorded(journey):
                _all_stations(journey, tuple(exclude), folder)
        except (TypeError, ValueError) as error:
            journey.refused.append(str(error))
            if f"no linear layer of {name}" in str(error):
                return journey
            refused = [layer for layer in layers if layer not in exclude and _names(error, layer)]
            assert refused, f"{type(error).__name__} without the name of a layer: {error}"
            exclude += refused
        else:
            _assert_accounted_for(tiny_model(name)[0])
            journey.complete = True
            return journey


def _names(error: Exception, layer: str) -> bool:
    name = rf"(?<![\w.]){re.escape(layer)}(\.weight)?(?![\w.])"
    return re.search(name, str(error)) is not None


def _all_stations(journey: Journey, exclude: tuple[str, ...], folder: Path) -> None:
    _refuse_what_is_read(journey, exclude)
    model, call = _base(journey, exclude)
    base = _run(model, call)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    minilora.inject(model, r=RANK, exclude=exclude)
    journey.layers = _adapted(model)
    assert same_bits(_run(model, call), base), "inject changes the output"

    _train(journey, model, call)
    trained = _run(model, call)
    assert trained.isfinite().all()
    assert (trained - base).abs().max() > 100 * TOLERANCE * _size(base), "the adapter does nothing"

    path = folder / f"{journey.name}-{'nf4' if journey.quantized else 'dense'}"
    with _recorded(journey):
        minilora.save_adapter(model, path)
    again, _ = _base(journey, exclude)
    minilora.load_adapter(again, path)
    assert same_bits(_run(again, call), trained), "the saved adapter computes something else"

    _compare_with_peft(journey, path, exclude, call, trained)

    minilora.eject(again)
    assert same_bits(_run(again, call), base), "eject does not give the base"
    after = dict(again.named_parameters())
    assert after.keys() == before.keys()
    assert all(same_bits(after[name], old) for name, old in before.items()), "a weight changed"

    minilora.merge(model)
    assert not _adapted(model)
    merged = _run(model, call)
    _assert_close(merged, trained, "the merged model computes something else")

    if not same_bits(_run(_reloaded(model, path / "merged"), call), merged):
        plain, _ = tiny_model(journey.name)
        output = _run(plain.requires_grad_(False), call)
        theirs = not same_bits(_run(_reloaded(plain, path / "base"), call), output)
        assert theirs, "the merged folder computes something else"
        journey.warned.append("transformers saves and loads even the base otherwise")


def _reloaded(model: Any, path: Path) -> Any:
    model.save_pretrained(path)
    return type(model).from_pretrained(path).eval().requires_grad_(False)


def _refuse_what_is_read(journey: Journey, exclude: tuple[str, ...]) -> None:
    """The first forward of an adapted model, in training and after it, as a run would start."""
    model, call = _base(journey, exclude)
    minilora.inject(model, r=RANK, exclude=exclude)
    with refuse_bypassed(model):
        call(model.train())
        call(model.eval())


def _base(journey: Journey, exclude: tuple[str, ...]) -> tuple[Any, Call]:
    """The frozen model: PyTorch sums a product in another order if its weight needs a gradient."""
    model, call = tiny_model(journey.name)
    model.requires_grad_(False)
    if journey.quantized:
        minilora.quantize(model, exclude=exclude)
    return model, call


@torch.no_grad()
def _run(model: nn.Module, call: Call) -> Tensor:
    return call(model)


def _assert_accounted_for(model: nn.Module) -> None:
    """All but a small part of a model is linear layers, or what a warning counts or PyTorch knows.

    What is left are routers, decay rates, tables of relative positions and biases of experts.
    """
    known = (nn.Linear, NF4Linear, nn.Embedding, nn.modules.conv._ConvNd, nn.MultiheadAttention)
    inside = {
        module for kind in model.modules() if isinstance(kind, known) for module in kind.modules()
    }
    counted = {id(p) for p in unreached_matrices(model).values()}
    left = [
        p.numel()
        for module in model.modules()
        if module not in inside
        for p in module._parameters.values()
        if p is not None and p.ndim > 1 and id(p) not in counted
    ]
    share = sum(left) / sum(p.numel() for p in model.parameters())
    assert share < MOST_LEFT, f"{share:.0%} of the parameters are dense, and nothing says so"


def _adapted(model: nn.Module) -> int:
    return sum(isinstance(module, LoRALayer) for module in model.modules())


def _train(journey: Journey, model: nn.Module, call: Call) -> None:
    """One step that every adapter takes part in, from a B that is large enough to be seen."""
    randomize(model, size=0.1)
    output = call(model)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    (output * direction).sum().backward()
    if missing := minilora.audit(model):
        journey.warned.append(f"audit: no gradient for {', '.join(missing)}")
    optimizer = torch.optim.SGD(minilora.adapter_parameters(model), lr=1e-4)
    optimizer.step()


def _compare_with_peft(
    journey: Journey, path: Path, exclude: tuple[str, ...], call: Call, trained: Tensor
) -> None:
    """PEFT computes the same with the file, on the same base."""
    import peft

    base, _ = tiny_model(journey.name)
    if journey.quantized:
        quantized, _ = _base(journey, exclude)
        for name, layer in linear_layers(quantized).items():
            if isinstance(layer, NF4Linear):
                base.get_submodule(name).weight.data.copy_(layer.weight.dequantize())

    said = any(text.startswith("PEFT does not load") for text in journey.warned)
    try:
        theirs = peft.PeftModel.from_pretrained(base, path).eval()
        _assert_close(_run(theirs, call), trained, "PEFT computes something else")
    except Exception as error:
        assert said, f"save_adapter did not say so: {error}"
    else:
        assert not said, "save_adapter says that PEFT reads the file otherwise, and it does not"


def _size(output: Tensor) -> float:
    return float(output.abs().max())


def _assert_close(found: Tensor, expected: Tensor, message: str) -> None:
    off = float((found - expected).abs().max()) / _size(expected)
    assert off < TOLERANCE, f"{message}: off by {off:.1e} of the largest output"


@contextmanager
def _recorded(journey: Journey) -> Iterator[None]:
    """Adds minilora's warnings to the journey; those of other libraries are theirs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    own = [w for w in caught if "site-packages" not in w.filename]
    journey.warned += [str(w.message) for w in own]
