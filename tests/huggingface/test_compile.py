"""torch.compile(fullgraph=True): loss and gradients as in eager mode, and no second compilation.

fullgraph raises at a graph break, and `fail_on_recompile` at a compilation after the warm-up.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from helpers import randomize
from torch import Tensor, nn

import minilora
from minilora.huggingface import gradient_checkpointing

pytest.importorskip("transformers", reason="the model is transformers' own")

Make = Callable[..., Any]
Found = tuple[Tensor, dict[str, Tensor]]

IDS = torch.arange(24).reshape(2, 12) * 7 % 128

# The compiler's own warnings: of torch.jit, and of a Function that dynamo traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

every_base = pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def injected(make: Make, quantized: bool, **options: Any) -> Any:
    """A Llama of one block in training mode, with an adapter that is other than zero."""
    model = make()
    del model.model.layers[1:]
    if quantized:
        minilora.quantize(model)
    minilora.inject(model, r=4, **options)
    return randomize(model, options.get("name", "default"), size=0.1).train()


def compile_whole(model: Any, backend: str = "aot_eager") -> Any:
    return torch.compile(model, fullgraph=True, backend=backend)


def step(run: Any, model: nn.Module, ids: Tensor = IDS) -> Found:
    """The loss and the gradients, by name; dropout draws the same each time."""
    torch.manual_seed(7)
    model.zero_grad()
    loss = run(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_close(found: Found, expected: Found) -> None:
    """Within 1e-5, in float32."""
    assert found[1].keys() == expected[1].keys() and expected[1]
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
    for name, gradient in expected[1].items():
        assert gradient.dtype == torch.float32 and gradient.any(), name
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-5)


def distance(found: Found, exact: Found) -> float:
    """Between all gradients of two steps."""
    squares = [(g - exact[1][name]).square().sum() for name, g in found[1].items()]
    return float(torch.stack(squares).sum().sqrt())


# Options of `inject`, and the context that a step runs in.
CASES: dict[str, tuple[dict[str, Any], Callable[[Any], AbstractContextManager[Any]]]] = {
    "norms-trained": ({"train_also": ["norm"]}, nullcontext),
    "checkpointing-dropout": ({"dropout": 0.5}, gradient_checkpointing),
}


@every_base
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_step_is_the_eager_one(case: str, quantized: bool, tiny_llama: Make) -> None:
    options, context = CASES[case]
    model = injected(tiny_llama, quantized, **options)
    compiled = compile_whole(model)
    with context(model):
        expected = step(model, model)
        assert_close(step(compiled, model), expected)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_close(step(compiled, model), expected)
            assert_close(step(compiled, model, IDS.flip(0)), step(model, model, IDS.flip(0)))


@every_base
def test_a_compiled_step_under_autocast_is_as_exact_as_the_eager_one(
    quantized: bool, tiny_llama: Make
) -> None:
    # In bfloat16 the two round differently: each is compared with float32.
    model = injected(tiny_llama, quantized)
    compiled = compile_whole(model)
    exact = step(model, model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = step(model, model)
        found = step(compiled, model)
        with torch.compiler.set_stance("fail_on_recompile"):
            again = step(compiled, model)
    assert distance(eager, exact) > 0 and distance(found, exact) < 1.5 * distance(eager, exact)
    assert all(torch.equal(g, found[1][name]) for name, g in again[1].items())


# tests/core/test_class_assignment.py switches the adapters of dense layers.
@pytest.mark.parametrize(
    "quantized", [pytest.param(False, marks=pytest.mark.soak), True], ids=["dense", "nf4"]
)
def test_adapters_switched_after_compiling(quantized: bool, tiny_llama: Make) -> None:
    model = injected(tiny_llama, quantized, name="a")
    minilora.inject(model, r=2, name="b", seed=1, targets=["o_proj", "down_proj"])
    randomize(model, "b")
    compiled = compile_whole(model)

    @contextmanager
    def using(*names: str) -> Iterator[None]:
        minilora.use(model, *names)
        yield
        minilora.use(model, "a")

    ways: list[Callable[[], AbstractContextManager[Any]]] = [
        lambda: using("a"),
        lambda: using("b"),
        lambda: using("a", "b"),
        lambda: minilora.disabled(model),
    ]

    def logits(run: Any) -> list[Tensor]:
        found = []
        for way in ways:
            with way(), torch.no_grad():
                found.append(run(input_ids=IDS, use_cache=False).logits)
        return found

    expected = logits(model)
    assert all(
        not torch.allclose(x, y, atol=1e-2) for i, x in enumerate(expected) for y in expected[:i]
    )
    for found, right in zip(logits(compiled), expected, strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=0)

    # Each way was compiled once; new values of an adapter need no compilation.
    randomize(model, "b", seed=2)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            for found, right in zip(logits(compiled), logits(model), strict=True):
                torch.testing.assert_close(found, right, atol=1e-5, rtol=0)

    minilora.use(model, "b")
    assert_close(step(compiled, model), step(model, model))


def test_a_graph_break_and_a_recompilation_are_seen(tiny_llama: Make) -> None:
    """That the checks above can fail."""
    model = injected(tiny_llama, False)
    compiled = compile_whole(model)
    step(compiled, model)
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError):
        step(compiled, model, IDS[:, :5])

    torch._dynamo.reset()
    model.model.norm.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(torch._dynamo.exc.Unsupported):
        step(compile_whole(model), model)


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend compiles C++")
@every_base
@pytest.mark.parametrize("case", CASES)
def test_the_default_backend_agrees_too(case: str, quantized: bool, tiny_llama: Make) -> None:
    options, context = CASES[case]
    model = injected(tiny_llama, quantized, **options)
    compiled = compile_whole(model, "inductor")
    # Random numbers of its own would draw another dropout.
    with torch._inductor.config.patch(fallback_random=True), context(model):
        expected = step(model, model)
        assert_close(step(compiled, model), expected)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_close(step(compiled, model), expected)
