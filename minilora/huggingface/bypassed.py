"""Layers whose weight a model reads without calling the layer, so that an adapter has no effect.

Some models multiply by the weight of a layer themselves: Mamba's mixer takes `dt_proj.weight`, and
an adapter of `dt_proj` would change nothing and never learn. No list of such models could be
complete, so the first forward of a run is watched: PyTorch reports every operation, and one that
takes an adapted layer's weight while the layer is not running is a read without a call.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minilora.layers import NF4Linear
from minilora.lora import LoRALayer
from minilora.nf4 import NF4Weight
from minilora.surgery import audit
from minilora.targets import linear_layers, shortest_end

MOST_NAMES_SHOWN = 8

# Operations that give their first argument the dtype, device or shape of the second.
_LIKE = ("to", "type_as", "expand_as", "view_as", "reshape_as")

# Operations whose result is the weight in another form, which is not yet used: `Module.to` calls
# them too.
_CONVERSIONS = ("to", "float", "half", "bfloat16", "double")


@contextmanager
def refuse_bypassed(model: nn.Module) -> Iterator[None]:
    """Inside the block, reading the weight of a layer with an adapter is no substitute for a call.

    Watches layers with adapters and layers in 4 bits. Nothing is copied, but each operation takes
    some microseconds longer, and PyTorch leaves out its fused attention kernel, which rounds
    otherwise: meant for one forward, or the first step of a run. Compiled and sharded models are
    not watched.

    Raises:
        TypeError: at the end of the block; with the name of every layer that was bypassed, and the
            `exclude=` that leaves them out.

    Example:
        >>> class Reader(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.proj = torch.nn.Linear(8, 8)
        ...
        ...     def forward(self, x):
        ...         return x @ self.proj.weight.T
        >>> model = minilora.inject(Reader(), r=2)
        >>> try:
        ...     with refuse_bypassed(model):
        ...         y = model(torch.randn(3, 8))
        ... except TypeError as error:
        ...     print(str(error)[:61])
        Reader reads the weight of proj without calling the layer, so
    """
    layers = linear_layers(model)
    watched = {n: m for n, m in layers.items() if isinstance(m, LoRALayer | NF4Linear)}
    reads = _Reads(watched)

    with ExitStack() as hooks:
        for module in model.modules():
            reads.watch(module, hooks)
        try:
            with reads:
                yield
        except (TypeError, AttributeError) as error:
            # A weight in 4 bits that is used as a tensor has raised an error of its own; where a
            # method of tensors was looked for, the error holds the weight.
            reads.record(getattr(error, "obj", None))
            if reads.found:
                raise TypeError(_message(model, reads.found, watched)) from error
            raise
    if reads.found:
        raise TypeError(_message(model, reads.found, watched))


class _Reads(TorchFunctionMode):
    """Records the layers whose weight an operation takes while no module that owns it runs.

    Attributes:
        found: names of these layers, in the order of the reads.
    """

    def __init__(self, layers: Mapping[str, Any]) -> None:
        super().__init__()
        self.found: list[str] = []
        self._running: Counter[str] = Counter()
        self._names = {id(_stored_weight(layer)): name for name, layer in layers.items()}
        # Keeps the tensors of which `_names` has the id.
        self._converted: list[Any] = []

    def watch(self, module: nn.Module, hooks: ExitStack) -> None:
        """Follows the calls of a module that owns a weight, or shares it with the layer."""
        held = module._parameters.values()
        names = [self._names[id(p)] for p in held if id(p) in self._names]
        if not names:
            return

        def enter(*_: Any) -> None:
            self._running.update(names)

        def leave(*_: Any) -> None:
            self._running.subtract(names)

        hooks.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
        hooks.callback(module.register_forward_hook(leave, always_call=True).remove)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        read = [v for v in _operands(func, args, kwargs) if self._name(v) is not None]
        try:
            result = func(*args, **kwargs)
        except TypeError:
            self.record(*read)
            raise

        if read and getattr(func, "__name__", "") in _CONVERSIONS:
            self._names[id(result)] = str(self._name(read[0]))
            self._converted.append(result)
        elif _holds_tensor(result):
            self.record(*read)
        return result

    def _name(self, value: Any) -> str | None:
        """The layer whose weight this is, unless an owner of the weight runs."""
        name = self._names.get(id(_stored_weight(value)))
        return None if name is None or self._running[name] else name

    def record(self, *values: Any) -> None:
        """Remembers the layers whose weights are among the values."""
        for value in values:
            name = self._name(value)
            if name is not None and name not in self.found:
                self.found.append(name)


def _stored_weight(value: Any) -> Any:
    """What identifies a weight, in a layer and among the arguments of an operation.

    The parameter itself; of a weight or a layer in 4 bits, the parameter that holds its codes.
    """
    if isinstance(value, NF4Linear | NF4Weight):
        return value.packed
    return value._parameters.get("weight") if isinstance(value, nn.Module) else value


def _operands(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments of an operation whose values it uses."""
    name = getattr(func, "__name__", "")
    if name in _LIKE or name.startswith("new_") or name.endswith("_like"):
        # x.to(weight) uses the values of x alone.
        args, kwargs = args[: name in _LIKE], {}
    for value in (*args, *kwargs.values()):
        yield from value if isinstance(value, list | tuple) else (value,)


def _holds_tensor(result: Any) -> bool:
    """Whether an operation gave values, and not a dtype or a size."""
    values = result if isinstance(result, list | tuple) else (result,)
    return any(isinstance(value, Tensor) for value in values)


_GRADIENT_WAY_OUT = "Exclude those layers with targets, or fix the path of the gradient"


def check_gradients(model: nn.Module, way_out: str = _GRADIENT_WAY_OUT) -> None:
    """Raises ValueError, which names the layers, if an adapter got no gradient from a backward.

    Such an adapter would never learn. `way_out` says what to do about it.
    """
    missing = audit(model)
    if not missing:
        return
    shown = ", ".join(missing[:MOST_NAMES_SHOWN])
    if len(missing) > MOST_NAMES_SHOWN:
        shown += f" and {len(missing) - MOST_NAMES_SHOWN} more"
    raise ValueError(
        f"adapters got no gradient in the first step and would never learn ({len(missing)} of "
        f"them): {shown}. Likely reasons: reentrant gradient checkpointing (the input of a frozen "
        "base requires no gradient); a fused loss that reads lm_head.weight and bypasses the "
        f"layer; a part of the model that this data does not reach, or whose output is detached. "
        f"{way_out}"
    )


def _message(model: nn.Module, found: list[str], layers: Mapping[str, nn.Module]) -> str:
    shown = ", ".join(found[:MOST_NAMES_SHOWN])
    more = f" and {len(found) - MOST_NAMES_SHOWN} more" if len(found) > MOST_NAMES_SHOWN else ""
    exclude = tuple(dict.fromkeys(_way_out(name, found, layers) for name in found))
    return (
        f"{type(model).__name__} reads the weight of {shown}{more} without calling the layer, so "
        f"that an adapter there has no effect: leave it out with exclude={exclude}"
    )


def _way_out(name: str, found: list[str], layers: Iterable[str]) -> str:
    """The shortest dotted end of a name that only layers have which are like those found.

    Layers are alike if their names are but for the numbers of blocks: a 4-bit weight is an error at
    the first read, and the next block would be the next error.
    """
    alike = {_without_numbers(other) for other in found}
    others = [layer for layer in layers if _without_numbers(layer) not in alike]
    return shortest_end(name, others)


def _without_numbers(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())
