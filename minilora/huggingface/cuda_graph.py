"""Decoding on a GPU as a CUDA graph: a step is recorded once, and then started by a single call.

To make a token, a model of 32 layers launches more than a thousand kernels of a few microseconds,
and Python takes longer than that to launch one. A graph starts them all. It repeats what was
recorded, the same kernels on the same addresses. Therefore

* the inputs of a step are copied to where they were when it was recorded;
* keys and values have their place from the start: transformers' static cache;
* all that changes from step to step is on the GPU. A number that Python holds would be recorded as
  it was. Where the cache holds one that changes, recording is refused.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from minilora.huggingface.messages import one_line

# Calls of the model by a generation before one is recorded: the prompt, and a step that compiles
# and rounds what is compiled and rounded once.
_NOT_RECORDED = 2

# Of transformers' generation config.
_OPTIONS = {"cache_implementation": "static", "disable_compile": True}

# What transformers keeps of a static cache: its length, and older versions all of it.
_KEPT = ("_previous_max_cache_length", "_cache")


class NotRecordableError(RuntimeError):
    """A step of decoding cannot be repeated as a CUDA graph. Without `decode_graph` it works."""

    def __init__(self, model: Any, reason: str) -> None:
        super().__init__(
            f"{type(model).__name__} cannot decode as a CUDA graph: {reason}. "
            "Generate outside decode_graph"
        )


@contextmanager
def decode_graph(model: Any) -> Iterator[None]:
    """Inside, `generate`, `stream`, `generate_batch` and `model.generate` decode as a CUDA graph.

    Each generation computes its prompt and one step as usual, records the next step and repeats it
    for every further token. Hooks of the model's layers are not called when a step is repeated.

    Args:
        model: a causal language model of transformers, whole on one GPU. Inside, its `forward` and
            `generate` are replaced; afterwards it is as before.

    Raises:
        ValueError: the model is not on one GPU.
        NotRecordableError: in a generation whose steps a graph cannot repeat: with sliding-window
            attention, with beam search, without a cache of keys and values, or where the model
            waits for the GPU.

    Example:
        >>> from minilora.huggingface import decode_graph, generate
        >>> with decode_graph(model):  # doctest: +SKIP
        ...     answer = generate(model, tokenizer, "What is LoRA?")
    """
    check_device(model)
    steps = _Steps(model)
    replaced = {
        "forward": _like(model.forward, steps.forward),
        "generate": _like(model.generate, steps.generate),
    }
    before = {name: vars(model)[name] for name in replaced if name in vars(model)}
    vars(model).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del vars(model)[name]
        vars(model).update(before)


def check_device(model: Any) -> None:
    """Raises ValueError unless all parameters of a model are on one GPU."""
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1 or not devices[0].startswith("cuda"):
        raise ValueError(
            f"the model is on {' and '.join(devices)}: a CUDA graph needs all of it on one GPU. "
            "Move it there, or generate outside decode_graph"
        )


def record(step: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Records a step without computing it: returns what computes it, and where its results go."""
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        # Where recording fails, PyTorch leaves its own stream as the current one.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            results = step()
    return graph.replay, results


def _like(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Our function with the signature of theirs, which transformers looks at."""

    @functools.wraps(theirs)
    def call(*args: Any, **options: Any) -> Any:
        return ours(*args, **options)

    return call


class _Recorded(NamedTuple):
    """A step: what computes it, where it reads and writes.

    names, places: of its arguments, as `_apart` gives them
    held: what the cache held when it was recorded
    results: of the model's forward
    """

    replay: Callable[[], None]
    names: list[str]
    places: list[Any]
    held: dict[str, Any]
    results: Any


class _Steps:
    """What a model's `forward` and `generate` do inside `decode_graph`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._forward, self._generate = model.forward, model.generate
        self._generating, self._calls = False, 0
        self._recorded: _Recorded | None = None

    def generate(self, *args: Any, **options: Any) -> Any:
        own = vars(self._model)
        before = {name: own[name] for name in _KEPT if name in own}
        self._generating, self._calls = True, 0
        try:
            return self._generate(*args, **(_OPTIONS | options))
        finally:
            self._generating, self._recorded = False, None
            for name in _KEPT:
                own.pop(name, None)
            own.update(before)

    def forward(self, *args: Any, **options: Any) -> Any:
        self._calls += 1
        if not self._generating or self._calls <= _NOT_RECORDED:
            return self._forward(*args, **options)
        if self._recorded is None:
            self._recorded = self._record(args, options)
        return self._repeat(self._recorded, args, options)

    def _record(self, args: Any, options: Any) -> _Recorded:
        names, inputs = _apart(args, options)
        held = _held(inputs)
        if not held:
            self._refuse("it is given no static cache of keys and values")

        places = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
        structure = pytree.tree_structure((args, options), is_leaf=_is_cache)
        args, options = pytree.tree_unflatten(places, structure)
        device = next(self._model.parameters()).device
        try:
            replay, results = record(lambda: self._forward(*args, **options), device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._refuse(one_line(str(error)), error)
        return _Recorded(replay, names, places, held, results)

    def _repeat(self, recorded: _Recorded, args: Any, options: Any) -> Any:
        """Computes a step in the place of the recorded one."""
        names, inputs = _apart(args, options)
        if names != recorded.names:
            self._refuse(f"it is called with {', '.join(names)} after {', '.join(recorded.names)}")
        for name, place, value in zip(names, recorded.places, inputs, strict=True):
            if _kind(place) != _kind(value):
                self._refuse(f"{name} is {_kind(value)} in one step and {_kind(place)} in another")
        if changed := _changed(recorded.held, _held(inputs)):
            self._refuse(f"its cache has another {changed} from step to step")

        for place, value in zip(recorded.places, inputs, strict=True):
            if isinstance(value, Tensor):
                place.copy_(value)
        recorded.replay()
        # The next step writes to the same place.
        return pytree.tree_map_only(Tensor, torch.clone, recorded.results, is_leaf=_is_cache)

    def _refuse(self, reason: str, error: Exception | None = None) -> NoReturn:
        raise NotRecordableError(self._model, reason) from error


def _apart(args: Any, options: Any) -> tuple[list[str], list[Any]]:
    """The arguments of a call, taken apart into tensors, caches and other values: names, values."""
    found, _ = pytree.tree_flatten_with_path((args, options), is_leaf=_is_cache)
    return [pytree.keystr(path[1:]) for path, _ in found], [value for _, value in found]


def _kind(value: Any) -> Any:
    """What may not differ from step to step: of a tensor all but its values."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.device
    return value


def _is_cache(value: Any) -> bool:
    from transformers import Cache

    return isinstance(value, Cache)


def _held(inputs: list[Any]) -> dict[str, Any]:
    """What the layers of the caches among the inputs hold, by name: tensors, numbers."""
    held: dict[str, Any] = {}
    caches = [value for value in inputs if _is_cache(value)]
    # Encoder-decoders have a cache of caches.
    layers = [layer for cache in caches for layer in getattr(cache, "layers", ())]
    for i, layer in enumerate(layers):
        for name, value in vars(layer).items():
            several = value.items() if isinstance(value, dict) else [("", value)]
            held |= {f"layers[{i}].{name}{key}": part for key, part in several}
    return held


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The name of something that is another object now, if there is one."""
    names = before.keys() | now.keys()
    return next((name for name in sorted(names) if before.get(name) is not now.get(name)), None)
