"""save_adapter and load_adapter: what comes back is what was saved, to the bit; and what does not fit is refused by name."""

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minilora
from minilora.files.tensors import read_tensors
from minilora.surgery import AdapterSpec, adapters, attach

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def mlp(
    dtype: torch.dtype = torch.float32, seed: int = 0, quantized: bool = False, hidden: int = 12
) -> nn.Sequential:
    torch.manual_seed(seed)
    inner = nn.Sequential(
        OrderedDict(
            down=nn.Linear(hidden, 7, bias=False), norm=nn.LayerNorm(7), head=nn.Linear(7, 5)
        )
    )
    model = nn.Sequential(OrderedDict(up=nn.Linear(10, hidden), act=nn.Tanh(), inner=inner)).to(
        dtype
    )
    return minilora.quantize(model, exclude=["head"]) if quantized else model


def trained(model: nn.Module, seed: int = 1) -> nn.Module:
    """What training leaves: every trainable parameter somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in minilora.adapter_parameters(model):
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def snapshot(model: nn.Module) -> list[Any]:
    """Modules by identity, parameters by identity, value (their version counter) and requires_grad."""
    modules = [(n, id(m), type(m)) for n, m in model.named_modules()]
    parameters = [
        (n, id(p), p.requires_grad, p._version)
        for n, p in model.named_parameters(remove_duplicate=False)
    ]
    return [modules, parameters, list(model.state_dict())]


def contents(folder: Path) -> tuple[bytes, dict[str, str], dict[str, Tensor]]:
    """Config, metadata (whose order in the file is safetensors' own, and random) and tensors."""
    tensors, metadata = read_tensors(folder / WEIGHTS)
    return (folder / CONFIG).read_bytes(), metadata, tensors


def assert_same_files(one: Path, other: Path) -> None:
    *texts, found = contents(one)
    *expected_texts, expected = contents(other)
    assert texts == expected_texts and list(found) == list(expected)
    assert all(found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in expected.items())


def saved(path: Path, r: int = 3, **arguments: Any) -> Path:
    return minilora.save_adapter(trained(minilora.inject(mlp(), r=r, **arguments)), path)


# ---- round trips


@given(
    st.integers(1, 5),
    st.floats(0.25, 64),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from(["all-linear", "down", ["up", "inner.head"]]),
    st.sampled_from([(), ("norm",), ("inner.norm.bias",)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_adapter_round_trips_bit_for_bit(
    tmp_path: Path,
    r: int,
    alpha: float,
    dropout: float,
    targets: Any,
    also: tuple[str, ...],
    dtype: torch.dtype,
    quantized: bool,
) -> None:
    model = mlp(dtype, quantized=quantized)
    trained(
        minilora.inject(
            model, r, alpha=alpha, dropout=dropout, targets=targets, train_also=also, name="mine"
        )
    ).eval()
    path = minilora.save_adapter(model, tmp_path / "a")
    assert path == tmp_path / "a" and sorted(p.name for p in path.iterdir()) == [CONFIG, WEIGHTS]
    injected = minilora.inject(mlp(dtype, quantized=quantized), r, targets=targets, seed=5)
    for fresh in (mlp(dtype, quantized=quantized), injected):
        assert minilora.load_adapter(fresh.eval(), path) is fresh
        found, expected = fresh.state_dict(), model.state_dict()
        assert list(found) == list(expected)
        assert all(
            found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in expected.items()
        )
        assert torch.equal(fresh(x := torch.randn(4, 10, dtype=dtype)), model(x))
        for name, layer in adapters(fresh).items():
            was = adapters(model)[name]
            assert (layer.r, layer.alpha, layer.scale, layer.dropout) == (
                was.r,
                was.alpha,
                was.scale,
                was.dropout,
            )
            assert layer.adapter_name == "mine"
        if fresh is not injected:
            assert [p.requires_grad for p in fresh.parameters()] == [
                p.requires_grad for p in model.parameters()
            ]
            assert_same_files(minilora.save_adapter(fresh, tmp_path / "b"), path)


def test_a_trained_parameter_of_the_model_itself_round_trips(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gain = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * self.linear(x)

    model = trained(minilora.inject(Scaled(), r=2, train_also=["gain"]))
    fresh = minilora.load_adapter(Scaled(), minilora.save_adapter(model, tmp_path))
    assert torch.equal(fresh.gain, model.gain) and fresh.gain.requires_grad  # type: ignore[arg-type]


def nested() -> nn.ModuleDict:
    """Names that are ends of one another: "up", "a.up", "a.a.up"."""
    deep = nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})
    middle = nn.ModuleDict({"a": deep, "up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})
    return nn.ModuleDict({"a": middle, "up": nn.Linear(8, 8)})


@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1.0, 4.0, 9.5])), min_size=5, max_size=5)
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_layer_gets_its_own_rank_and_alpha_back(
    tmp_path: Path, specs: list[tuple[int, float]]
) -> None:
    names = ["a.a.up", "a.a.down", "a.up", "a.down", "up"]
    chosen = {n: AdapterSpec(r, alpha) for n, (r, alpha) in zip(names, specs, strict=True)}
    path = minilora.save_adapter(trained(attach(nested(), chosen)), tmp_path)
    fresh = minilora.load_adapter(nested(), path)
    assert {n: (layer.r, layer.alpha) for n, layer in adapters(fresh).items()} == {
        n: (s.r, s.alpha) for n, s in chosen.items()
    }


# ---- prefixes


class Wrapper(nn.Module):
    """What DataParallel and FSDP put around a module, without their machinery."""

    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, inner)

    def forward(self, x: Tensor) -> Any:
        return next(self.children())(x)


def sharded(model: nn.Sequential) -> nn.Module:
    model.inner = Wrapper(model.inner, "_fsdp_wrapped_module")
    return Wrapper(model, "_fsdp_wrapped_module")


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda model: model,
    "compile": torch.compile,
    "data parallel": lambda model: Wrapper(model, "module"),
    "sharded": sharded,
    "compiled data parallel": lambda model: torch.compile(Wrapper(model, "module")),
    "data parallel of compiled, sharded": lambda model: Wrapper(
        torch.compile(sharded(model)), "module"
    ),
}


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # torch.compile's own imports
@pytest.mark.parametrize("kind", WRAPPERS)
def test_what_is_put_round_a_model_is_not_saved_and_does_not_matter_on_load(
    kind: str, tmp_path: Path
) -> None:
    def adapted() -> Any:
        return trained(minilora.inject(mlp(), r=3, train_also=["norm"], targets=["up", "down"]))

    plain, wrapped = minilora.save_adapter(adapted(), tmp_path / "plain"), tmp_path / "wrapped"
    minilora.save_adapter(WRAPPERS[kind](adapted()), wrapped)
    assert_same_files(wrapped, plain)
    inner = mlp()
    minilora.load_adapter(WRAPPERS[kind](inner), plain)
    expected = list(adapted().state_dict().values())
    assert all(
        torch.equal(a, b) for a, b in zip(inner.state_dict().values(), expected, strict=True)
    )
    assert len([p for p in inner.parameters() if p.requires_grad]) == 6


# ---- what does not fit


Refused = dict[str, tuple[Callable[[], nn.Module], list[str]]]
MISFITS: Refused = {
    "other sizes": (
        lambda: mlp(hidden=13),
        ["up: the file has A [3, 10] and B [12, 3]", "inner.down: the file has A [3, 12]"],
    ),
    "other names": (
        lambda: nn.Sequential(mlp()),
        ["no linear layer up", "no linear layer inner.down"],
    ),
    "a layer less": (
        lambda: mlp()[:2],
        ["no linear layer inner.down", "no parameter inner.norm.weight"],
    ),
    "another rank": (
        lambda: minilora.inject(mlp(), r=2),
        ["up: the file has A [3, 10]", "inner.down"],
    ),
    "fewer adapters": (
        lambda: minilora.inject(mlp(), r=3, targets="up"),
        ["inner.down has no adapter in the model"],
    ),
    "more adapters": (
        lambda: minilora.inject(mlp(), r=3),
        ["the file has nothing for inner.head, which has an adapter"],
    ),
    "another norm": (
        lambda: nn.Sequential(OrderedDict(mlp().named_children())).apply(
            lambda m: setattr(m, "norm", nn.LayerNorm(6)) if "norm" in m._modules else None
        ),
        ["inner.norm.weight: the file has [7], the model [6]"],
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_model_that_does_not_fit_is_refused_by_name_and_left_as_it_was(
    case: str, tmp_path: Path
) -> None:
    make, messages = MISFITS[case]
    path, model = saved(tmp_path, targets=["up", "down"], train_also=["norm"]), make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"does not fit this {type(model).__name__}") as error:
        minilora.load_adapter(model, path)
    assert all(message in str(error.value) for message in [*messages, str(path)])
    assert snapshot(model) == before


def test_only_the_first_mismatches_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    def many() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))

    path = minilora.save_adapter(trained(minilora.inject(many(), r=1)), tmp_path)
    with pytest.raises(ValueError, match=r"layer 0;.*layer 4; and 3 more$"):
        minilora.load_adapter(nn.Sequential(*(nn.ReLU() for _ in range(8)), nn.Linear(4, 4)), path)


def test_an_adapter_that_was_never_trained_is_refused_unless_asked_for(tmp_path: Path) -> None:
    path, model = minilora.save_adapter(minilora.inject(mlp(), r=3), tmp_path), mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"every B in .* is zero.*allow_zero=True"):
        minilora.load_adapter(model, path)
    assert snapshot(model) == before
    assert len(adapters(minilora.load_adapter(model, path, allow_zero=True))) == 3
    one = minilora.inject(mlp(), r=3)
    one.inner.head.lora_B.data[0, 0] = 1e-30
    assert adapters(minilora.load_adapter(mlp(), minilora.save_adapter(one, tmp_path)))


@pytest.mark.parametrize(
    "edit", [{"lora_alpha": 7.0}, {"lora_dropout": 0.5}, {"base_model_name_or_path": "another"}]
)
def test_a_config_edited_after_saving_is_refused(edit: dict[str, Any], tmp_path: Path) -> None:
    path, model = saved(tmp_path), mlp()
    before, config = snapshot(model), path / CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | edit))
    with pytest.raises(
        ValueError, match=f"{CONFIG} is not the config that {WEIGHTS} was saved with"
    ):
        minilora.load_adapter(model, path)
    assert snapshot(model) == before


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(missing: str, tmp_path: Path) -> None:
    path, model = saved(tmp_path), mlp()
    (path / missing).unlink()
    before = snapshot(model)
    with pytest.raises(FileNotFoundError, match=f"{missing} is not there"):
        minilora.load_adapter(model, path)
    with pytest.raises(FileNotFoundError):
        minilora.load_adapter(model, tmp_path / "nowhere")
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "peft_type"),
        ("{}", "peft_type is None"),
        ('{"peft_type": "LORA", "use_dora": true}', "use_dora=True"),
    ],
)
def test_a_config_that_says_nothing_is_refused_by_name(
    text: str, message: str, tmp_path: Path
) -> None:
    path = saved(tmp_path)
    (path / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        minilora.load_adapter(mlp(), path)
    assert str(path / CONFIG) in str(error.value)


@pytest.mark.parametrize("drop", ["lora_A", "lora_B", ".lora_"])
def test_a_file_with_half_an_adapter_is_refused(drop: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = saved(tmp_path)
    tensors = load_file(path / WEIGHTS)
    save_file(
        {k: v for k, v in tensors.items() if not (drop in k and ("up" in k or drop == ".lora_"))},
        path / WEIGHTS,
    )
    with pytest.raises(ValueError, match="is no LoRA adapter"):
        minilora.load_adapter(mlp(), path)
