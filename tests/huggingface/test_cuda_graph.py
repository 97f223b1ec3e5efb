"""Decoding as a CUDA graph: the tokens of eager decoding, or a refusal that says why.

A recorder stands for the GPU (see tests/tools/recorded.py): what Python decides is not repeated.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import recorded
import torch
from helpers import randomize
from torch import Tensor, nn

import minilora
from minilora.huggingface import NotRecordableError, cuda_graph, decode_graph
from minilora.huggingface.generation import generate, generate_batch, stream
from minilora.huggingface.loading import load_dense
from minilora.huggingface.sampling import Sampling

architectures = pytest.importorskip("architectures", reason="the models are transformers' own")

IDS = torch.tensor([[0, 0, 17, 24, 31, 38, 45], [11, 18, 25, 32, 39, 46, 53]])
PROMPTS = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
ANSWER = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "record", recorded.record)
    monkeypatch.setattr(cuda_graph, "check_device", lambda model: None)


def tiny(name: str = "LlamaForCausalLM", quantized: bool = False) -> Any:
    model, _ = architectures.tiny_model(name)
    if quantized:
        minilora.quantize(model)
        minilora.inject(model, r=4)
        randomize(model, "default", size=0.3)
    return model.eval()


def generated(model: Any, **options: Any) -> Any:
    """What transformers' own generation returns of every step."""
    told = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    return model.generate(**PROMPTS, **ANSWER, **told, **options)


def logits(model: Any, **options: Any) -> Tensor:
    """The logits of every new token, [9, 2, V]."""
    steps = torch.stack(generated(model, **options).logits)
    # A step that was repeated with the values of another would show.
    assert (steps[1:] != steps[:-1]).flatten(1).any(1).all()
    return steps


# The same tokens.


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4 with an adapter"])
def test_the_logits_are_those_of_eager_decoding_bit_for_bit(quantized: bool) -> None:
    model = tiny(quantized=quantized)
    expected = logits(model, cache_implementation="static")
    with decode_graph(model):
        assert torch.equal(logits(model), expected)


@pytest.mark.usefixtures("on_the_cpu")
def test_what_a_step_returned_is_not_written_again() -> None:
    # transformers copies the logits, but not the hidden states.
    model = tiny()
    expected = generated(model, cache_implementation="static")
    with decode_graph(model):
        found = generated(model)
    for step in range(ANSWER["max_new_tokens"]):
        for a, b in zip(found.hidden_states[step], expected.hidden_states[step], strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("on_the_cpu")
def test_all_ways_to_generate_say_the_same(folder: Path) -> None:
    model, tokenizer = load_dense(folder, dtype=torch.float32)
    prompts = ["say yes", "no", "a longer prompt than these"]

    def answers() -> list[Any]:
        said: list[str] = []
        sampling = Sampling(temperature=0.8, top_p=0.9, seed=3)
        return [
            generate(model, tokenizer, prompts[0], limit=12),
            generate(model, tokenizer, prompts[2], limit=12, sampling=sampling),
            generate_batch(model, tokenizer, prompts, limit=12, batch_size=2),
            stream(model, tokenizer, prompts[1], said.append, limit=12),
            said,
            *(generate(model, tokenizer, "say", limit=n) for n in (1, 2, 3, 4)),
        ]

    expected = answers()
    with decode_graph(model):
        assert answers() == expected


@pytest.mark.usefixtures("on_the_cpu")
def test_three_calls_of_the_layers_make_any_number_of_tokens() -> None:
    model = tiny()
    shapes = []
    model.model.layers[0].register_forward_hook(lambda _, inputs, out: shapes.append(out.shape[:2]))
    with decode_graph(model):
        for tokens in (9, 20):
            shapes.clear()
            model.generate(**PROMPTS, **ANSWER | {"max_new_tokens": tokens})
            assert shapes == [(2, 7), (2, 1), (2, 1)]

        # A call that is no generation is computed each time.
        shapes.clear()
        for _ in range(4):
            model(IDS)
        assert shapes == [(2, 7)] * 4


# The model afterwards.


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = {name: id(value) for name, value in vars(model).items()}
    yield
    assert {name: id(value) for name, value in vars(model).items()} == before


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("hooked", [False, True], ids=["own forward", "forward of a hook"])
def test_the_model_is_as_before(hooked: bool) -> None:
    model = tiny()
    if hooked:
        # As accelerate does.
        own = model.forward
        model.forward = lambda *args, **options: own(*args, **options)
        model._previous_max_cache_length = 40

    with unchanged(model), decode_graph(model):
        expected = logits(model)
    with unchanged(model), pytest.raises(KeyError), decode_graph(model):
        raise KeyError
    assert torch.equal(logits(model, cache_implementation="static"), expected)


@pytest.mark.parametrize("devices", [["cpu", "cpu"], ["cpu", "meta"]], ids=str)
def test_a_model_that_is_not_on_one_gpu_is_refused(devices: list[str]) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2, device=device) for device in devices))
    says = f"the model is on {' and '.join(sorted(set(devices)))}: a CUDA graph needs all of it"
    with unchanged(model), pytest.raises(ValueError, match=says), decode_graph(model):
        pass


# Refusals.


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_beams": 2}, r"its cache has another layers\[0\]\.keys from step to step"),
        ({"cache_implementation": "dynamic"}, "aten::_local_scalar_dense"),
        ({"use_cache": False}, "it is given no static cache"),
        ({"prefill_chunk_size": 2}, r"\['input_ids'\] is .* in one step and .* in another"),
    ],
    ids=str,
)
def test_what_a_graph_cannot_repeat_is_refused(options: dict[str, Any], says: str) -> None:
    model = tiny()
    refused = pytest.raises(NotRecordableError, match=f"LlamaForCausalLM cannot .*{says}")
    with unchanged(model), refused, decode_graph(model):
        logits(model, **options)
    assert logits(model).isfinite().all()


@pytest.mark.usefixtures("on_the_cpu")
def test_a_lack_of_memory_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(step: Callable[[], Any], device: torch.device) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda_graph, "record", fails)
    model = tiny()
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"), decode_graph(model):
        logits(model)


# Architectures.

REFUSED = {
    "another layers[0].cumulative_length_int": {
        "Cohere2ForCausalLM",
        "Exaone4ForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3nForCausalLM",
        "GptOssForCausalLM",
        "Llama4ForCausalLM",
        "MistralForCausalLM",
    },
    "another layers[2].cumulative_length_int": {"RecurrentGemmaForCausalLM"},
    "capturing: aten::lift_fresh": {"FalconForCausalLM", "GPTNeoForCausalLM"},
    "capturing: aten::_local_scalar_dense": {"XGLMForCausalLM"},
    "capturing: tolist": {"JetMoeForCausalLM"},
    "no static cache": {
        "MptForCausalLM",
        "RwkvForCausalLM",
        "SwitchTransformersForConditionalGeneration",
    },
}
DECODERS = sorted(
    name
    for name, found in architectures.ARCHITECTURES.items()
    if found.kind in ("decoder", "mixture of experts", "state space")
)
SAMPLE = random.Random(0).sample(DECODERS, 8)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    "name",
    [*SAMPLE, *(pytest.param(n, marks=pytest.mark.soak) for n in DECODERS if n not in SAMPLE)],
)
def test_an_architecture_decodes_as_a_graph_or_is_refused(name: str) -> None:
    model = tiny(name)
    expected = logits(model, cache_implementation="static")
    reason = next((reason for reason, names in REFUSED.items() if name in names), None)
    if reason is None:
        with decode_graph(model):
            assert torch.equal(logits(model), expected)
        return

    with pytest.raises(NotRecordableError) as raised, decode_graph(model):
        logits(model)
    assert reason in str(raised.value)


# The recorder.


class Counting(nn.Module):
    """Adds to x how often it was called, which Python counts."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


@pytest.mark.usefixtures("on_the_cpu")
def test_a_number_of_python_s_would_be_seen_to_be_repeated() -> None:
    model = tiny()
    model.model.norm = nn.Sequential(model.model.norm, Counting())
    expected = logits(model, cache_implementation="static")
    model.model.norm[1].calls = 0
    with decode_graph(model):
        found = logits(model)
    assert torch.equal(found[:3], expected[:3])
    assert not torch.equal(found[3:], expected[3:])


def test_what_is_recorded_is_computed_when_it_is_repeated() -> None:
    x, total = torch.ones(3), torch.zeros(3)

    def step() -> Tensor:
        total.add_(x)
        return (total * 2).view(3, 1)[1:]

    replay, result = recorded.record(step)
    assert total.tolist() == [0, 0, 0] and result.isnan().all()
    for k in (1, 2):
        replay()
        assert total.tolist() == [k, k, k] and result.tolist() == [[2 * k], [2 * k]]
    x.fill_(10)
    replay()
    assert result.tolist() == [[24], [24]]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: bool((x > 0).all()),
        lambda x: torch.equal(x, x),
        lambda x: torch.unique(x),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    ],
)
def test_what_waits_for_the_gpu_cannot_be_recorded(wait: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorded.record(lambda: wait(x))
