"""Decoding as a CUDA graph: the tokens of eager decoding, or a refusal that says why.

A recorder stands for the GPU (see tests/tools/recorded.py): what Python decides is not repeated.
"""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import recorded
import torch
from torch import Tensor, nn

from minilora.huggingface import NotRecordableError, decode_graph
from minilora.huggingface.generation import generate, generate_batch, stream
from minilora.huggingface.loading import load_dense
from minilora.huggingface.sampling import Sampling

pytest.importorskip("transformers", reason="the models are its own")
import architectures
from decoding import ANSWER, IDS, PROMPTS, generated, logits, tiny, unchanged


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded.stand_for_the_gpu(monkeypatch)


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
            *(generate(model, tokenizer, "say", limit=n) for n in (1, 2, 3, 4, 5)),
        ]

    expected = answers()
    with decode_graph(model):
        assert answers() == expected


@pytest.mark.usefixtures("on_the_cpu")
def test_four_calls_of_the_layers_make_any_number_of_tokens() -> None:
    model = tiny()
    shapes = []
    model.model.layers[0].register_forward_hook(lambda _, inputs, out: shapes.append(out.shape[:2]))
    with decode_graph(model):
        for tokens in (9, 20):
            shapes.clear()
            model.generate(**PROMPTS, **ANSWER | {"max_new_tokens": tokens})
            assert shapes == [(2, 9), (2, 1), (2, 1), (2, 1)]

        # A call that is no generation is computed each time.
        shapes.clear()
        for _ in range(4):
            model(IDS)
        assert shapes == [(2, 9)] * 4


# The model afterwards.


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


# Architectures.

REFUSED = {
    "sets cache.layers[0].cumulative_length_int": {
        "Cohere2ForCausalLM",
        "Exaone4ForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3nForCausalLM",
        "GptOssForCausalLM",
        "Llama4ForCausalLM",
        "MistralForCausalLM",
    },
    "sets cache.layers[2].cumulative_length_int": {"RecurrentGemmaForCausalLM"},
    "the CPU waits for the GPU": {
        "FalconForCausalLM",
        "GPTNeoForCausalLM",
        "JetMoeForCausalLM",
        "SwitchTransformersForConditionalGeneration",
        "XGLMForCausalLM",
    },
    "no static cache": {"MptForCausalLM", "RwkvForCausalLM"},
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
    """Adds to x how often it was called, which Python counts where it is not looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        return x + next(self.calls)


@pytest.mark.usefixtures("on_the_cpu")
def test_a_count_kept_by_python_is_repeated_unchanged() -> None:
    model = tiny()
    model.model.norm = nn.Sequential(model.model.norm, Counting())
    expected = logits(model, cache_implementation="static")
    model.model.norm[1].calls = itertools.count()
    with decode_graph(model):
        found = logits(model)
    assert torch.equal(found[:4], expected[:4])
    assert not torch.equal(found[4:], expected[4:])


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
        lambda x: torch.allclose(x, x),
        lambda x: torch.unique_consecutive(x),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    ],
)
def test_what_waits_for_the_gpu_cannot_be_recorded(wait: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        recorded.record(lambda: wait(x))
