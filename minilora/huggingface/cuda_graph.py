"""Decoding on a GPU as a CUDA graph: a step is recorded once, and then started by a single call.

To make a token, a model of 32 layers launches more than a thousand kernels of a few microseconds,
and Python takes longer than that to launch one. A graph starts them all. It repeats what was
recorded, the same kernels on the same addresses. Therefore

* the inputs of a step are copied to where they were when it was recorded;
* keys and values have their place from the start: transformers' static cache;
* all that changes from step to step must be in the GPU's memory. A number that Python holds would
  stay what it was, and a tensor that Python replaces would be read where the old one was.

The step before is observed. A model that waits for the GPU in it, or sets an attribute of its own
or of its cache, is refused.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from minilora.huggingface.messages import one_line

# Which of a generation's calls of the model is observed, and the next is recorded. Before it are
# the prompt and a step as a warm-up, in which kernels are compiled and adapters rounded.
_OBSERVED = 3

# Of transformers' generation config.
_OPTIONS = {"cache_implementation": "static", "disable_compile": True}

# In PyTorch's error where the CPU would wait for the GPU.
_WAITING = "synchronizing CUDA operation"

# Attributes that transformers leaves on a model: the length of a static cache, or the cache.
_LEFT = ("_previous_max_cache_length", "_cache")


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

    Each generation computes its prompt and two steps as usual, records the third step and repeats
    it for every further token. Hooks of the model's layers are not called when a step is repeated.

    Args:
        model: a causal language model of transformers, entirely on one GPU. Inside, its `forward`
            and `generate` are replaced; afterwards it is as before.

    Raises:
        ValueError: the model is not on one GPU, or inside `decode_graph` already.
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
        "forward": _with_signature_of(model.forward, steps.forward),
        "generate": _with_signature_of(model.generate, steps.generate),
    }
    before = {name: vars(model)[name] for name in replaced if name in vars(model)}
    if any(hasattr(function, "_decode_graph") for function in before.values()):
        raise ValueError("the model is inside decode_graph already: leave the inner one out")

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


@contextmanager
def refuse_to_wait() -> Iterator[None]:
    """Inside, what makes the CPU wait for the GPU raises a RuntimeError, with _WAITING in it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def record(step: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Records a step without computing it: returns what computes it, and where its results go."""
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        # Where recording fails, PyTorch leaves the stream that it recorded as the current one.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, stream=_recorded_stream(device)),
        ):
            results = step()
    return graph.replay, results


@functools.cache
def _recorded_stream(device: torch.device) -> torch.cuda.Stream:
    """PyTorch's own is on the device that was the first to be recorded."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _with_signature_of(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Our function as transformers looks at it: with the arguments that theirs takes."""

    @functools.wraps(theirs)
    def call(*args: Any, **options: Any) -> Any:
        return ours(*args, **options)

    vars(call)["_decode_graph"] = True
    return call


class _Recorded(NamedTuple):
    """A step: what computes it, where it reads and writes.

    names, places: of its arguments, as `_flatten` gives them
    cache: the attributes of its cache
    results: of the model's forward
    """

    replay: Callable[[], None]
    names: list[str]
    places: list[Any]
    cache: dict[str, Any]
    results: Any


class _Steps:
    """What a model's `forward` and `generate` do inside `decode_graph`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._forward, self._generate = model.forward, model.generate
        self._generating, self._calls = False, 0
        self._recorded: _Recorded | None = None

    def generate(self, *args: Any, **options: Any) -> Any:
        own = vars(self._model)
        before = {name: own[name] for name in _LEFT if name in own}
        self._generating, self._calls = True, 0
        try:
            answer = self._generate(*args, **(_OPTIONS | options))
        finally:
            self._generating, self._recorded = False, None
            for name in _LEFT:
                own.pop(name, None)
            own.update(before)

        if not self._calls:
            self._refuse("it generates with another model: give decode_graph the one inside it")
        return answer

    def forward(self, *args: Any, **options: Any) -> Any:
        self._calls += 1
        if not self._generating or self._calls < _OBSERVED:
            return self._forward(*args, **options)
        if self._calls == _OBSERVED:
            return self._observe(args, options)
        if self._recorded is None:
            self._recorded = self._record(args, options)
        return self._repeat(self._recorded, args, options)

    def _observe(self, args: Any, options: Any) -> Any:
        """Computes a step as usual, and refuses what a graph would not repeat."""
        names, inputs = _flatten(args, options)
        for name, value in zip(names, inputs, strict=True):
            if isinstance(value, Tensor) and value.device != self._device:
                self._refuse(f"{name} is on {value.device}, not on {self._device}")

        if not any(map(_is_cache, inputs)):
            self._refuse("it is given no static cache of keys and values")
        before = _cache_attributes(inputs) | _module_attributes(self._model)
        try:
            with refuse_to_wait():
                results = self._forward(*args, **options)
        except RuntimeError as error:
            if _WAITING not in str(error):
                raise
            self._refuse("in each step the CPU waits for the GPU", error)
        now = _cache_attributes(inputs) | _module_attributes(self._model)
        if changed := _changed(before, now):
            self._refuse(f"each step sets {changed}, which a graph does not")
        return results

    def _record(self, args: Any, options: Any) -> _Recorded:
        names, inputs = _flatten(args, options)
        structure = pytree.tree_structure((args, options), is_leaf=_is_cache)
        cache = _cache_attributes(inputs)
        places = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
        args, options = pytree.tree_unflatten(places, structure)
        handled = sys.exc_info()[1]
        try:
            replay, results = record(lambda: self._forward(*args, **options), self._device)
        except Exception as error:
            first = _first_of(error, handled)
            if isinstance(first, torch.OutOfMemoryError) or not isinstance(first, RuntimeError):
                raise first from None
            self._refuse(one_line(str(first)), error)
        return _Recorded(replay, names, places, cache, results)

    def _repeat(self, recorded: _Recorded, args: Any, options: Any) -> Any:
        """Computes a step in the place of the recorded one."""
        names, inputs = _flatten(args, options)
        if names != recorded.names:
            self._refuse(f"it is called with {', '.join(names)} after {', '.join(recorded.names)}")
        for name, place, value in zip(names, recorded.places, inputs, strict=True):
            if _fixed(place) != _fixed(value):
                self._refuse(f"{name} is {_fixed(value)} in one step, {_fixed(place)} in another")
        if changed := _changed(recorded.cache, _cache_attributes(inputs)):
            self._refuse(f"{changed} was set between two steps")

        for place, value in zip(recorded.places, inputs, strict=True):
            if isinstance(value, Tensor):
                place.copy_(value)
        recorded.replay()
        # The next step writes to the same place.
        return pytree.tree_map_only(Tensor, torch.clone, recorded.results, is_leaf=_is_cache)

    def _refuse(self, reason: str, error: BaseException | None = None) -> NoReturn:
        raise NotRecordableError(self._model, reason) from error


def _flatten(args: Any, options: Any) -> tuple[list[str], list[Any]]:
    """The arguments of a call as tensors, caches and other values: their names, and they."""
    found, _ = pytree.tree_flatten_with_path((args, options), is_leaf=_is_cache)
    return [pytree.keystr(path[1:]) for path, _ in found], [value for _, value in found]


def _fixed(value: Any) -> Any:
    """What may not differ from step to step: of a tensor all but its values."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.device
    return value


def _is_cache(value: Any) -> bool:
    from transformers import Cache

    return isinstance(value, Cache)


def _cache_attributes(inputs: list[Any]) -> dict[str, Any]:
    """The attributes of the caches among the inputs, and of their layers, by name."""
    found: dict[str, Any] = {}
    for cache in filter(_is_cache, inputs):
        found |= _attributes("cache", cache)
        # An encoder-decoder's cache has no layers, but two caches.
        for i, layer in enumerate(getattr(cache, "layers", ())):
            found |= _attributes(f"cache.layers[{i}]", layer)
    return found


def _module_attributes(model: nn.Module) -> dict[str, Any]:
    """The attributes of all modules, by name: parameters, buffers and what else Python holds."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found |= _attributes(name or "model", module)
    return found


def _attributes(name: str, holder: Any) -> dict[str, Any]:
    """name.attribute -> value; of a list or dictionary each element."""
    found: dict[str, Any] = {}
    for attribute, value in vars(holder).items():
        path = f"{name}.{attribute.strip('_')}"
        if isinstance(value, dict):
            found |= {f"{path}[{key!r}]": part for key, part in value.items()}
        elif isinstance(value, list | tuple):
            found |= {f"{path}[{i}]": part for i, part in enumerate(value)}
        else:
            found[path] = value
    return found


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The name of something that is another object now, if there is one."""
    names = before.keys() | now.keys()
    return next((name for name in sorted(names) if before.get(name) is not now.get(name)), None)


def _first_of(error: BaseException, handled: BaseException | None) -> BaseException:
    """What went wrong first: the end of a recording that failed raises an error of its own."""
    while error.__context__ not in (None, handled):
        error = error.__context__
    return error
