"""What cannot be decoded as a CUDA graph is refused with the reason; the model stays as it was."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import recorded
import torch
from torch import Tensor, nn

from minilora.huggingface import NotRecordableError, cuda_graph, decode_graph

pytest.importorskip("transformers", reason="the models are its own")
import architectures
from decoding import ANSWER, PROMPTS, logits, tiny, unchanged
from transformers import StaticCache


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded.stand_for_the_gpu(monkeypatch)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_beams": 2}, r"cache\.layers\[0\]\.keys was set between two steps"),
        ({"cache_implementation": "dynamic"}, "in each step the CPU waits for the GPU"),
        ({"use_cache": False}, "it is given no static cache"),
        ({"prefill_chunk_size": 2}, r"\['input_ids'\] is .* in one step, .* in another"),
    ],
    ids=str,
)
def test_what_a_graph_cannot_repeat_is_refused(options: dict[str, Any], says: str) -> None:
    model = tiny()
    refused = pytest.raises(NotRecordableError, match=f"LlamaForCausalLM cannot .*{says}")
    with unchanged(model), refused, decode_graph(model):
        logits(model, **options)
    assert logits(model).isfinite().all()


class Counter(nn.Module):
    """Generates 0, 1, 2 and so on, and calls `change` with itself and its cache in each step."""

    def __init__(self, change: Callable[[Any, Any], object]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.change = change

    def forward(self, last: Tensor, cache: Any, **_: Any) -> Tensor:
        self.change(self, cache)
        return last + 1

    def generate(self, device: str = "cpu", **_: Any) -> list[float]:
        numbers = [torch.zeros(1)]
        cache = StaticCache(architectures.tiny_model("LlamaForCausalLM")[0].config, max_cache_len=8)
        cache.seen, cache.layers[0].rows = 0, [0]
        for _ in range(6):
            position = torch.zeros((), device=device)
            numbers.append(self(last=numbers[-1], cache=cache, position=position))
        return torch.cat(numbers).tolist()


def set_attribute(holder: Any, name: str, value: Any) -> None:
    setattr(holder, name, value)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    ("change", "sets"),
    [
        (lambda model, cache: None, None),
        (lambda model, cache: model.scale.data.add_(1), None),
        (lambda model, cache: set_attribute(cache, "seen", cache.seen + 1), "cache.seen"),
        (lambda model, cache: cache.layers[0].rows.append(0), "cache.layers[0].rows[3]"),
        (lambda model, cache: set_attribute(model, "state", torch.ones(1)), "model.state"),
        (lambda model, cache: set_attribute(model, "calls", object()), "model.calls"),
    ],
)
def test_what_python_sets_is_seen_before_it_is_recorded(change: Any, sets: str | None) -> None:
    model = Counter(change)
    with decode_graph(model):
        if sets is None:
            assert model.generate() == [0, 1, 2, 3, 4, 5, 6]
            return
        with pytest.raises(NotRecordableError, match=re.escape(f"each step sets {sets}, which")):
            model.generate()


@pytest.mark.usefixtures("on_the_cpu")
def test_an_input_on_another_device_is_refused() -> None:
    model = Counter(lambda model, cache: None)
    refused = pytest.raises(NotRecordableError, match=r"\['position'\] is on meta, not on cpu")
    with refused, decode_graph(model):
        model.generate(device="meta")


@pytest.mark.usefixtures("on_the_cpu")
def test_a_wrapper_that_generates_with_another_model_is_refused() -> None:
    inner = tiny()
    wrapper = nn.Module()
    wrapper.inner, wrapper.forward = inner, inner.forward
    wrapper.generate = lambda **options: inner.generate(**options)
    refused = pytest.raises(NotRecordableError, match="give decode_graph the one inside it")
    with refused, decode_graph(wrapper):
        wrapper.generate(**PROMPTS, **ANSWER)


@pytest.mark.usefixtures("on_the_cpu")
def test_one_inside_another_is_refused() -> None:
    model = tiny()
    with decode_graph(model):
        expected = logits(model)
        with pytest.raises(ValueError, match="inside decode_graph already"), decode_graph(model):
            pass
        assert torch.equal(logits(model), expected)


def ends_with(first: BaseException) -> Callable[..., Any]:
    """A recording that fails, and whose end fails for it, as PyTorch's does."""

    def record(step: Callable[[], Any], device: torch.device) -> Any:
        try:
            raise first
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    return record


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    ("first", "raised", "says"),
    [
        (RuntimeError("copied\nfrom the CPU"), NotRecordableError, "graph: copied from the CPU. "),
        (torch.OutOfMemoryError("too large"), torch.OutOfMemoryError, "too large"),
        (TypeError("their own"), TypeError, "their own"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
    ids=str,
)
def test_a_recording_that_fails_says_what_failed_first(
    first: BaseException,
    raised: type[BaseException],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_graph, "record", ends_with(first))
    model = tiny()
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        # What is handled meanwhile has nothing to do with it.
        with unchanged(model), pytest.raises(raised, match=says or None), decode_graph(model):
            logits(model)


@pytest.mark.usefixtures("on_the_cpu")
def test_an_error_of_the_model_is_its_own() -> None:
    model, calls = tiny(), itertools.count()

    def fails_in_the_observed_step(*_: Any) -> None:
        if next(calls) == 2:
            raise RuntimeError("a bug")

    model.model.layers[1].register_forward_hook(fails_in_the_observed_step)
    with unchanged(model), pytest.raises(RuntimeError, match=r"^a bug$"), decode_graph(model):
        logits(model)
