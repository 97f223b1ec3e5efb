"""Models with odd linear layers, through quantize, inject, merge, eject, use and disabled.

A call either refuses by the layer's name, and the model is what it was: every module, parameter,
bit and output; or the result is right, and nothing else that a layer holds is lost.
"""

import copy
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzzing import REFUSED, SAME, Wrong, attempt
from helpers import adapters_of, randomize, same_bits, snapshot
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import minilora
from minilora import NF4Linear
from minilora.lora import LoRALayer
from minilora.nf4 import quantize_nf4

CI, SAMPLE, FULL = 100, 300, 600
SECONDS, MEGABYTES = 2, 200

SIZE = 16

# Kernels are compiled when they are first used, which is no case's fault.
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    _layer = nn.Sequential(nn.Linear(SIZE, SIZE, dtype=dtype))
    for double in (False, True):
        _model = minilora.quantize(copy.deepcopy(_layer), double_quant=double)
        minilora.merge(minilora.inject(_model, r=2))(torch.ones(3, SIZE, dtype=dtype))


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class OwnCall(nn.Linear):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 2


class OwnCallImpl(nn.Linear):
    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        return super()._call_impl(*args, **kwargs) * 2


class OwnWrapped(nn.Linear):
    def _wrapped_call_impl(self, *args: Any, **kwargs: Any) -> Any:
        return super()._call_impl(*args, **kwargs) + 1


class OwnGetattr(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found * 2 if name == "weight" else found


class OwnSetattr(nn.Linear):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "adapters":
            raise RuntimeError("no")
        super().__setattr__(name, value)


class Property(nn.Linear):
    @property
    def scale(self) -> int:
        return 2


class ExtraState(nn.Linear):
    def get_extra_state(self) -> Tensor:
        return torch.ones(2)

    def set_extra_state(self, state: Any) -> None: ...


class OwnSaving(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "mine"] = torch.ones(1)


class Slots(nn.Linear):
    __slots__ = ("more",)


class Plain(nn.Linear):
    """Nothing of its own."""


class NoSubclass(nn.Linear):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise TypeError("final")


class Tagged(nn.Parameter):
    pass


class Subclassed(Tensor):
    pass


Layer = Any
Make = Callable[[random.Random], Layer]


def linear(draw: random.Random) -> nn.Linear:
    return nn.Linear(SIZE, SIZE, bias=draw.random() < 0.7)


def of(kind: type[nn.Linear]) -> Make:
    return lambda draw: kind(SIZE, SIZE, bias=draw.random() < 0.7)


def with_weight(change: Callable[[Tensor], Any]) -> Make:
    def make(draw: random.Random) -> Layer:
        layer = linear(draw)
        value = change(layer.weight.detach().clone())
        if isinstance(value, nn.Parameter):
            layer.weight = value
        else:
            trains = value.is_floating_point()
            layer.weight = nn.Parameter(value, requires_grad=trains)
        return layer

    return make


def changed(change: Callable[[Layer], Any]) -> Make:
    def make(draw: random.Random) -> Layer:
        layer = nn.Linear(SIZE, SIZE)
        found = change(layer)
        return found if isinstance(found, nn.Module) else layer

    return make


def plain_weight(layer: Layer) -> None:
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight


def buffer_weight(layer: Layer) -> None:
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)


def plain_bias(layer: Layer) -> None:
    bias = layer.bias.detach()
    del layer.bias
    layer.bias = bias


def own_forward(layer: Layer) -> None:
    layer.forward = lambda x: nn.functional.linear(x, layer.weight) * 3


def own_call_impl(layer: Layer) -> None:
    layer._call_impl = lambda x: nn.functional.linear(x, layer.weight) * 3


def tied_inside(layer: Layer) -> None:
    layer.again = layer.weight


def extra_parameter(layer: Layer) -> None:
    layer.gain = nn.Parameter(torch.ones(3))


def pruned(layer: Layer) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)


def old_weight_norm(layer: Layer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


ODD: dict[str, Make] = {
    "plain": linear,
    "subclass": of(Plain),
    "property": of(Property),
    "own forward": of(OwnForward),
    "own __call__": of(OwnCall),
    "own _call_impl": of(OwnCallImpl),
    "own _wrapped_call_impl": of(OwnWrapped),
    "own __getattr__": of(OwnGetattr),
    "own __setattr__": of(OwnSetattr),
    "extra state": of(ExtraState),
    "own saving": of(OwnSaving),
    "slots": of(Slots),
    "no subclass": of(NoSubclass),
    "lazy": lambda draw: nn.LazyLinear(SIZE),
    "meta": lambda draw: nn.Linear(SIZE, SIZE, device="meta"),
    "no inputs": lambda draw: nn.Linear(SIZE, SIZE, bias=False),
    "half": lambda draw: nn.Linear(SIZE, SIZE, dtype=torch.float16),
    "bfloat16": lambda draw: nn.Linear(SIZE, SIZE, dtype=torch.bfloat16),
    "float64": lambda draw: nn.Linear(SIZE, SIZE, dtype=torch.float64),
    "complex": lambda draw: nn.Linear(SIZE, SIZE, dtype=torch.complex64),
    "int8": with_weight(lambda w: w.to(torch.int8)),
    "float8": with_weight(lambda w: w.to(torch.float8_e4m3fn)),
    "close to infinite": with_weight(lambda w: w.half() * 1e9 * 0 + 65504),
    "NaN": with_weight(lambda w: w.fill_(torch.nan)),
    "empty": with_weight(lambda w: w[:, :0]),
    "smaller": with_weight(lambda w: w[:1].clone()),
    "transposed": with_weight(lambda w: w.T),
    "expanded": with_weight(lambda w: w[:1].expand(SIZE, SIZE)),
    "overlapping": with_weight(lambda w: w.flatten().as_strided((SIZE, SIZE), (1, 1))),
    "with gaps": with_weight(lambda w: torch.stack([w, w], -1)[..., 0]),
    "vector": with_weight(lambda w: w[0]),
    "tagged parameter": with_weight(lambda w: Tagged(w)),
    "subclassed tensor": with_weight(lambda w: w.as_subclass(Subclassed)),
    "frozen": changed(lambda layer: layer.requires_grad_(False) and None),
    "plain weight": changed(plain_weight),
    "buffer weight": changed(buffer_weight),
    "no weight": changed(lambda layer: layer.register_parameter("weight", None)),
    "plain bias": changed(plain_bias),
    "bias of one": changed(lambda x: setattr(x, "bias", nn.Parameter(torch.ones(1)))),
    "bias of another dtype": changed(
        lambda x: setattr(x, "bias", nn.Parameter(torch.ones(SIZE, dtype=torch.float64)))
    ),
    "own instance forward": changed(own_forward),
    "own instance _call_impl": changed(own_call_impl),
    "tied inside": changed(tied_inside),
    "extra parameter": changed(extra_parameter),
    "buffer": changed(lambda layer: layer.register_buffer("steps", torch.arange(3))),
    "hidden buffer": changed(lambda x: x.register_buffer("steps", torch.ones(3), persistent=False)),
    "submodule": changed(lambda layer: layer.add_module("norm", nn.LayerNorm(SIZE))),
    "attribute": changed(lambda layer: setattr(layer, "note", {"a": [1]})),
    "attribute 'adapters'": changed(lambda layer: setattr(layer, "adapters", {"a": 1})),
    "attribute 'active'": changed(lambda layer: setattr(layer, "active", True)),
    "attribute 'packed'": changed(lambda layer: setattr(layer, "packed", "yes")),
    "buffer 'absmax'": changed(lambda layer: layer.register_buffer("absmax", torch.ones(1))),
    "attribute 'block_size'": changed(lambda layer: setattr(layer, "block_size", 7)),
    "wrong size": changed(lambda layer: setattr(layer, "out_features", SIZE + 1)),
    "pruned": changed(pruned),
    "weight norm": changed(old_weight_norm),
    "spectral norm": changed(lambda layer: nn.utils.spectral_norm(layer) and None),
    "new weight norm": changed(lambda layer: parametrizations.weight_norm(layer) and None),
    "parametrized": changed(
        lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()) and None
    ),
    "parametrized bias": changed(
        lambda layer: parametrize.register_parametrization(layer, "bias", Doubled()) and None
    ),
    "scripted": changed(torch.jit.script),
    "traced": changed(lambda layer: torch.jit.trace(layer, torch.ones(2, SIZE))),
    "hooks": changed(lambda x: x.register_forward_hook(lambda m, i, y: y + 1) and None),
    "pre-hook": changed(lambda x: x.register_forward_pre_hook(lambda m, i: (i[0] * 2,)) and None),
    "state dict hook": changed(
        lambda x: (
            x.register_state_dict_post_hook(lambda m, d, p, _: d.update(z=torch.ones(1))) and None
        )
    ),
    "quantized": changed(lambda layer: NF4Linear.from_linear(layer)),
    "compiled call": changed(lambda layer: setattr(layer, "_compiled_call_impl", None)),
}

NAMES = ("up", "adapters", "weight", "a name", "forward_", "0")


class Tied(nn.Module):
    """Two layers of one weight, and one layer twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.one, self.two = layer, layer
        self.three = nn.Linear(SIZE, SIZE)
        if isinstance(getattr(layer, "weight", None), nn.Parameter):
            self.three.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.three(self.two(self.one(x))))


class Chain(nn.Module):
    """Odd names, in a dictionary, one after the other."""

    def __init__(self, layers: dict[str, nn.Module], deep: int) -> None:
        super().__init__()
        self.inner = nn.ModuleDict(layers)
        for _ in range(deep):
            self.inner = nn.ModuleDict({"deep": self.inner})
        self.deep = deep

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner
        for _ in range(self.deep):
            inner = inner["deep"]  # type: ignore[assignment]
        for layer in inner.values():
            x = layer(x.to(_dtype(layer)))
        return x


def _dtype(layer: Any) -> torch.dtype:
    """What the layer computes in, so that layers of several dtypes can follow each other."""
    if isinstance(layer, NF4Linear):
        return layer.weight_dtype
    found = [p.dtype for p in layer.parameters(recurse=False) if p.is_floating_point()]
    return found[0] if found else torch.float32


# Those of ODD that every operation takes.
FINE = ("plain", "subclass", "property", "half", "bfloat16", "float64", "transposed", "expanded")
FINE += ("overlapping", "with gaps", "tagged parameter", "frozen", "extra parameter", "buffer")
FINE += ("hidden buffer", "submodule", "attribute", "hooks", "pre-hook", "state dict hook")
FINE += ("bias of another dtype", "compiled call")


def build(draw: random.Random) -> tuple[nn.Module, list[str]]:
    """A model, and the names of its odd layers' kinds."""
    some = FINE if draw.random() < 0.5 else tuple(ODD)
    kinds = [draw.choice(some) for _ in range(draw.randint(1, 3))]
    kinds.insert(draw.randrange(len(kinds) + 1), "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = [ODD[kind](draw) for kind in kinds]
    shape = draw.random()
    if shape < 0.1 and isinstance(layers[0], nn.Linear):
        return layers[0], kinds[:1]
    if shape < 0.2:
        return Tied(layers[-1]), kinds[-1:]
    names = draw.sample(NAMES, len(layers))
    model: nn.Module = Chain(dict(zip(names, layers, strict=True)), draw.choice([0, 0, 1, 5]))
    if shape > 0.95 and set(kinds) <= {"plain", "buffer", "extra parameter", "attribute"}:
        model = torch.fx.symbolic_trace(model) if draw.random() < 0.5 else nn.Sequential(model)
    return model.train(draw.random() < 0.5), kinds


def run(seed: int, folder: Path) -> str:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = build(draw)
        operations = draw.choice(PLANS)
        ended = {apply(model, operation, draw) for operation in operations}
    return REFUSED if REFUSED in ended else SAME


PLANS = (
    ("quantize",),
    ("inject",),
    ("quantize", "inject", "merge"),
    ("inject", "merge"),
    ("inject", "disabled", "use", "eject"),
    ("quantize", "inject", "disabled", "eject"),
    ("inject", "inject", "use", "merge"),
    ("quantize", "quantize"),
    ("inject", "quantize", "eject"),
    ("failing inject", "inject", "merge"),
    ("inject", "failing merge", "merge"),
    ("inject", "failing warning", "merge"),
)


def named(model: nn.Module) -> list[str]:
    """What an error may name: a layer, or what is missing."""
    names = [n for n, m in model.named_modules() if n and isinstance(m, nn.Linear | NF4Linear)]
    return [*names, "no linear layer", "the model is itself", "has no adapter", "the adapter"]


class Failing(minilora.LoRA):
    """An adapter that fails while the model is edited, or when it is merged."""

    fails = "train"

    def train(self, mode: bool = True) -> Any:
        if self.fails == "train" and Failing.left <= 0:
            raise ValueError("the adapter failed")
        Failing.left -= 1
        return super().train(mode)

    left = 1


def apply(model: nn.Module, operation: str, draw: random.Random) -> str:
    """One operation, with its oracle."""
    before, state, held, y = snapshot(model), bits(model), attributes(model), output(model)
    dense = weights(model)
    expected: Any = None

    if operation == "quantize":
        block = draw.choice([32, 64])
        double = draw.random() < 0.5

        def call():
            return minilora.quantize(model, block_size=block, double_quant=double)
    elif operation == "inject":
        used = {n for m in model.modules() if isinstance(m, LoRALayer) for n in m.adapters}
        name = "second" if "default" in used else "default"

        def call():
            return minilora.inject(model, r=2, name=name)
    elif operation == "failing inject":
        Failing.left = 1

        def call():
            return minilora.inject(model, r=2, adapter=Failing)
    elif operation == "merge":
        expected = {n: merged(m) for n, m in adapted(model).items()}

        def call():
            return minilora.merge(model)
    elif operation == "failing merge":
        for m in list(adapted(model).values())[-1:]:
            m.adapters["default"].merged_into = lambda W: (_ for _ in ()).throw(
                ValueError("the adapter")
            )

        def call():
            return minilora.merge(model)
    elif operation == "failing warning":
        expected = {n: merged(m) for n, m in adapted(model).items()}

        def call():
            return with_errors(lambda: minilora.merge(model))
    elif operation == "eject":

        def call():
            return minilora.eject(model)
    elif operation == "use":
        names = draw.choice([["default"], [], ["default", "default"], ["second"]])

        def call():
            return minilora.use(model, *names)
    else:

        def call():
            return disabled_output(model)

    names_allowed = named(model) + ["tied", "alias"] * (operation == "failing warning")
    value, error = attempt(call, names_allowed, (ValueError, TypeError, UserWarning))
    if operation == "failing merge":
        for m in adapted(model).values():
            vars(m.adapters["default"]).pop(
                "merged_into", None
            ) if "default" in m.adapters else None
    if error is not None:
        unchanged(model, before, state, held, y, operation, error)
        return REFUSED
    if operation.startswith("failing ") and operation != "failing warning" and len(dense) > 1:
        raise Wrong("silent", f"{operation} did not fail")
    right(model, operation, value, dense, expected, held, y)
    return SAME


def with_errors(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


def disabled_output(model: nn.Module) -> Any:
    with minilora.disabled(model):
        return output(model)


def adapted(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALayer)}


def merged(layer: Any) -> tuple[Tensor, Tensor]:
    """W + s B A in float64, and the size of its terms."""
    weight: Any = layer.weight
    W = weight.dequantize(torch.float32) if isinstance(layer, NF4Linear) else weight.detach()
    if W.is_meta or not W.is_floating_point():
        return W, W
    W = W.double()
    size = W.abs()
    for name in layer.active:
        a = layer.adapters[name]
        W = W + a.scale * (a.B.double() @ a.A.double()).detach()
        size = size + a.scale * (a.B.double().abs() @ a.A.double().abs()).detach()
    return W, size


def weights(model: nn.Module) -> dict[str, Any]:
    """The weights of linear layers by name: dense values, or the record of a quantized one."""
    found: dict[str, Any] = {}
    for name, m in model.named_modules():
        if name and isinstance(m, NF4Linear):
            found[name] = copy.deepcopy(m.weight)
        elif name and isinstance(m, nn.Linear):
            weight = m._parameters.get("weight")
            if isinstance(weight, Tensor) and not is_lazy(weight):
                found[name] = weight.detach().clone()
    return found


def is_lazy(w: Any) -> bool:
    return bool(nn.parameter.is_lazy(w))


def bits(model: nn.Module) -> list[Tensor]:
    tensors = [t for t in model.state_dict().values() if isinstance(t, Tensor)]
    return [t.detach().clone() for t in tensors if not is_lazy(t) and not t.is_meta]


def equal(found: Tensor, expected: Tensor) -> bool:
    if expected.is_complex():
        return torch.equal(found, expected)
    return same_bits(found.as_subclass(Tensor), expected.as_subclass(Tensor))


def output(model: nn.Module) -> Tensor | str:
    x = torch.linspace(-1, 1, 3 * SIZE).view(3, SIZE)
    if any(is_lazy(p) for p in model.parameters()):
        return "not run: a lazy layer would change"
    modes = [(m, m.training) for m in model.modules()]
    try:
        with torch.no_grad():
            return torch.as_tensor(model.eval()(x))
    except Exception as error:
        return type(error).__name__
    finally:
        for m, training in modes:
            m.training = training


# What our layers hold beside a layer's own.
OURS = {
    "_held_view",
    "adapters",
    "active",
    "weight_dtype",
    "block_size",
    "quant_type",
    "compute_dtype",
    "forward",
}
OURS |= {"_parameters", "_buffers", "_modules", "weight", "packed", "absmax", "absmax2", "offset"}
OURS |= {"nf4_layout", "training"}


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What every linear layer holds: attributes, hooks, buffers, parameters, submodules."""
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear | NF4Linear):
            tables = {**m._parameters, **m._buffers, **m._modules, **vars(m)}
            found[name] = {k: v for k, v in tables.items() if k not in OURS}
    return found


def kept(model: nn.Module, before: dict[str, dict[str, Any]]) -> bool:
    now = attributes(model)
    return all(
        all(k in now[n] and (now[n][k] is v or _same(now[n][k], v)) for k, v in each.items())
        for n, each in before.items()
    )


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


def unchanged(
    model: nn.Module,
    before: list[Any],
    state: list[Tensor],
    held: dict[str, dict[str, Any]],
    y: Any,
    operation: str,
    error: BaseException,
) -> None:
    same = snapshot(model) == before and all(map(equal, bits(model), state))
    same = same and attributes(model).keys() == held.keys() and kept(model, held)
    now = output(model)
    same = same and (now == y if isinstance(y, str) else not isinstance(now, str) and equal(now, y))
    if not same:
        raise Wrong("changed", f"{operation} raised {error!r}, and changed the model")


def right(
    model: nn.Module,
    operation: str,
    value: Any,
    dense: dict[str, Any],
    expected: Any,
    held: dict[str, dict[str, Any]],
    y: Any,
) -> None:
    if not kept(model, held):
        raise Wrong("silent", f"{operation} lost what a layer held")
    after = weights(model)
    if operation == "quantize":
        for name, w in after.items():
            old = dense[name]
            if not isinstance(w, Tensor) and isinstance(old, Tensor):
                args = w.block_size, w.double_quantized, w.quant_type
                if not same_bits(
                    w.dequantize(), quantize_nf4(old.contiguous(), *args).dequantize()
                ):
                    raise Wrong("silent", f"{name} was quantized wrongly")
        twin_output(model, y)
    elif operation == "inject":
        if not isinstance(y, str) and not adapted_twice(model):
            compare(output(model), y, "inject changed the output of an untrained model")
        used = (list(adapters_of(model, "second")) and "second") or "default"
        randomize(model, used, size=0.1)
    elif operation in ("merge", "failing warning"):
        for name, (W, size) in expected.items():
            found = after[name].double()
            info = torch.finfo(after[name].dtype)
            bound = 8 * 2.0**-24 * size + info.eps / 2 * 1.01 * size + info.smallest_normal
            if not ((found - W).abs() <= bound).all():
                raise Wrong("silent", f"{name} was merged wrongly")
        near(output(model), y, "merge changed the output")
    elif operation == "eject":
        if adapted(model) or not all(map(same_weight, after.values(), dense.values())):
            raise Wrong("silent", "eject changed a weight")
    elif operation == "disabled":
        adapters = adapted(model)
        were = {n: m.active for n, m in adapters.items()}
        for m in adapters.values():
            m.active = ()
        base = output(model)
        for n, m in adapters.items():
            m.active = were[n]
        compare(value, base, "disabled does not compute the base")
        compare(output(model), y, "disabled changed the model")
    elif operation == "use":
        active = [m.active for m in adapted(model).values()]
        if any(len(set(names)) != len(names) for names in active):
            raise Wrong("silent", "an adapter is active twice")


def adapted_twice(model: nn.Module) -> bool:
    return any(len(m.adapters) > 1 for m in adapted(model).values())


def same_weight(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.is_meta or equal(a, b)
    return same_bits(a.dequantize(), b.dequantize())


def compare(found: Any, y: Any, text: str) -> None:
    if isinstance(y, str) or isinstance(found, str):
        if isinstance(y, str) != isinstance(found, str):
            raise Wrong("silent", f"{text}: {found} and {y}")
    elif found.dtype != y.dtype or not ((found == y) | (found.isnan() & y.isnan())).all():
        raise Wrong("silent", text)


def near(found: Any, y: Any, text: str) -> None:
    """Several layers, whose dtypes round to three digits at worst."""
    if isinstance(y, str) or isinstance(found, str):
        compare(found, y, text)
        return
    rounding = 2e-3 if found.dtype in (torch.float32, torch.float64) else 0.05
    scale = max(1.0, float(y.abs().max().real)) if y.isfinite().all() else torch.inf
    if found.dtype != y.dtype or not ((found - y).abs() <= 8 * rounding * scale).all():
        raise Wrong("silent", text)


def twin_output(model: nn.Module, y: Any) -> None:
    """The model computes what it computes with the decoded weights in dense layers."""
    if isinstance(y, str) or isinstance(model, torch.fx.GraphModule):
        return
    twin = copy.deepcopy(model)
    for m in twin.modules():
        if isinstance(m, NF4Linear):
            weight = nn.Parameter(m.weight.dequantize(), requires_grad=False)
            for name in ("packed", "absmax", "absmax2", "offset"):
                del m._parameters[name]
            del m._buffers["nf4_layout"]
            m.__class__ = nn.Linear  # type: ignore[assignment]
            m._parameters = {"weight": weight, **m._parameters}
    near(output(model), output(twin), "a quantized model computes something else")
