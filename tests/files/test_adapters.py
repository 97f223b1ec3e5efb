"""save_adapter and load_adapter: a round trip is bit-identical, and misfits are refused by name."""

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import (
    CONFIG,
    WEIGHTS,
    adapters_of,
    attach_sizes,
    contents,
    nested,
    randomize,
)
from helpers import Shared, same_bits, snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import minilora
from minilora.targets import adapter_names

# What save_adapter says of whole parameters and patterns is tested in test_peft_limits.py.
pytestmark = pytest.mark.filterwarnings("ignore:vLLM and llama.cpp do not serve:UserWarning")


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


def assert_same_files(one: Path, other: Path) -> None:
    *texts, found = contents(one)
    *expected_texts, expected = contents(other)
    assert texts == expected_texts and list(found) == list(expected)
    assert all(found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in expected.items())


def saved(path: Path, r: int = 3, **arguments: Any) -> Path:
    return minilora.save_adapter(randomize(minilora.inject(mlp(), r=r, **arguments)), path)


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
    def base() -> nn.Sequential:
        return mlp(dtype, quantized=quantized)

    options = {"alpha": alpha, "dropout": dropout, "train_also": also}
    model = minilora.inject(base(), r, targets=targets, name="mine", **options)
    randomize(model).eval()
    path = minilora.save_adapter(model, tmp_path / "a")
    assert path == tmp_path / "a"
    assert sorted(p.name for p in path.iterdir()) == [CONFIG, WEIGHTS]

    fresh = minilora.load_adapter(base().eval(), path)
    assert_same_model(fresh, model, dtype)
    trainable = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in fresh.parameters()] == trainable
    assert_same_files(minilora.save_adapter(fresh, tmp_path / "b"), path)

    injected = minilora.inject(base(), r, targets=targets, name="mine", seed=5).eval()
    assert minilora.load_adapter(injected, path) is injected
    assert_same_model(injected, model, dtype)


def assert_same_model(found: nn.Module, expected: nn.Module, dtype: torch.dtype) -> None:
    """The same parameters, function and adapters, bit for bit."""
    state, expected_state = found.state_dict(), expected.state_dict()
    assert list(state) == list(expected_state)
    assert all(same_bits(state[key], value) for key, value in expected_state.items())

    x = torch.randn(4, 10, dtype=dtype)
    assert torch.equal(found(x), expected(x))

    configs, expected_configs = (
        {name: adapter.config() for name, adapter in adapters_of(model, "mine").items()}
        for model in (found, expected)
    )
    assert configs and configs == expected_configs


def test_an_adapter_is_loaded_under_another_name_if_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path, name="mine")
    assert adapter_names(minilora.load_adapter(mlp(), path)) == ["mine"]
    assert adapter_names(minilora.load_adapter(mlp(), path, "yours")) == ["yours"]


def test_a_name_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    model = minilora.inject(mlp(), r=3, name="mine")
    with pytest.raises(ValueError, match="no adapter 'yours'; it has 'mine'"):
        minilora.save_adapter(model, tmp_path / "a", "yours")
    with pytest.raises(ValueError, match="the model has no adapter"):
        minilora.save_adapter(mlp(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_two_adapters_of_one_model_are_saved_and_loaded_one_by_one(tmp_path: Path) -> None:
    model = mlp()
    for seed, (name, options) in enumerate({"a": {"r": 3}, "b": {"r": 2, "alpha": 1.0}}.items()):
        minilora.inject(model, name=name, targets=["up", "down"], **options)
        randomize(model, seed)
        minilora.save_adapter(model, tmp_path / name, name)
    with pytest.raises(ValueError, match="several adapters, 'a', 'b': say which with name="):
        minilora.save_adapter(model, tmp_path / "c")

    x = torch.randn(4, 10)
    both = minilora.load_adapter(minilora.load_adapter(mlp(), tmp_path / "a"), tmp_path / "b")
    for name in ("a", "b"):
        alone = minilora.load_adapter(mlp(), tmp_path / name)
        assert torch.equal(minilora.use(both, name)(x), alone(x))
        assert torch.equal(minilora.use(model, name)(x), alone(x))
        assert_same_files(minilora.save_adapter(both, tmp_path / "again", name), tmp_path / name)


def test_parameters_trained_as_a_whole_belong_to_a_single_adapter(tmp_path: Path) -> None:
    path = saved(tmp_path, train_also=["norm"], name="mine")
    model = minilora.inject(mlp(), r=3)
    before = snapshot(model)
    with pytest.raises(ValueError, match="trained as a whole belong to a single adapter"):
        minilora.load_adapter(model, path)
    assert snapshot(model) == before


def test_a_trained_parameter_of_the_model_itself_round_trips(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gain = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * self.linear(x)

    model = randomize(minilora.inject(Scaled(), r=2, train_also=["gain"]))
    fresh = minilora.load_adapter(Scaled(), minilora.save_adapter(model, tmp_path))
    assert torch.equal(fresh.gain, model.gain) and fresh.gain.requires_grad  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1.0, 4.0, 9.5])), min_size=5, max_size=5)
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_layer_gets_its_own_rank_and_alpha_back(
    tmp_path: Path, sizes: list[tuple[int, float]]
) -> None:
    names = ["a.a.up", "a.a.down", "a.up", "a.down", "up"]
    expected = dict(zip(names, sizes, strict=True))
    model = randomize(attach_sizes(nested(), expected))

    fresh = minilora.load_adapter(nested(), minilora.save_adapter(model, tmp_path))
    found = adapters_of(fresh)
    assert {path: (adapter.r, adapter.alpha) for path, adapter in found.items()} == expected


class Wrapper(nn.Module):
    """What FSDP puts around a module, without its machinery."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = inner

    def forward(self, x: Tensor) -> Any:
        return self._fsdp_wrapped_module(x)


def sharded(model: nn.Sequential) -> nn.Module:
    model.inner = Wrapper(model.inner)
    return Wrapper(model)


def checkpointed(model: nn.Sequential) -> nn.Module:
    for name, child in model.named_children():
        setattr(model, name, checkpoint_wrapper(child))  # type: ignore[no-untyped-call]
    return model


def distributed(model: nn.Module) -> nn.Module:
    """DDP in a group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        return nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda model: model,
    "compile": torch.compile,
    "data parallel": nn.DataParallel,
    "distributed": distributed,
    "sharded": sharded,
    "checkpointed": checkpointed,
    "checkpointed as a whole": checkpoint_wrapper,
    "compiled data parallel": lambda model: torch.compile(nn.DataParallel(model)),
    "data parallel of compiled, sharded": lambda model: nn.DataParallel(
        torch.compile(sharded(model))  # type: ignore[arg-type]
    ),
}


# torch.compile's own imports
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrappers_around_a_model_are_not_saved_and_do_not_matter_on_load(
    kind: str, tmp_path: Path
) -> None:
    def adapted() -> Any:
        return randomize(minilora.inject(mlp(), r=3, train_also=["norm"], targets=["up", "down"]))

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

    path = minilora.save_adapter(randomize(minilora.inject(many(), r=1)), tmp_path)
    with pytest.raises(ValueError, match=r"layer 0;.*layer 4; and 3 more$"):
        minilora.load_adapter(nn.Sequential(*(nn.ReLU() for _ in range(8)), nn.Linear(4, 4)), path)


def test_an_adapter_that_was_never_trained_is_refused_unless_asked_for(tmp_path: Path) -> None:
    path, model = minilora.save_adapter(minilora.inject(mlp(), r=3), tmp_path), mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"every B in .* is zero.*allow_zero=True"):
        minilora.load_adapter(model, path)
    assert snapshot(model) == before
    assert len(adapters_of(minilora.load_adapter(model, path, allow_zero=True))) == 3

    one = minilora.inject(mlp(), r=3)
    adapters_of(one)["inner.head"].B.data[0, 0] = 1e-30
    assert minilora.load_adapter(mlp(), minilora.save_adapter(one, tmp_path))


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
    with pytest.raises(FileNotFoundError, match=f"{missing} does not exist"):
        minilora.load_adapter(model, path)
    with pytest.raises(FileNotFoundError):
        minilora.load_adapter(model, tmp_path / "nowhere")
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is a JSON list, not an object"),
        ("{}", "peft_type is None"),
        ('{"peft_type": "LORA", "use_dora": true}', "use_dora=True"),
    ],
)
def test_an_invalid_config_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match="is not a LoRA adapter"):
        minilora.load_adapter(mlp(), path)


def test_an_adapter_on_a_shared_layer_round_trips(tmp_path: Path) -> None:
    model, x = randomize(minilora.inject(Shared(), r=2)), torch.randn(3, 12)
    with pytest.warns(UserWarning, match="adapter under the first, not outer"):
        path = minilora.save_adapter(model, tmp_path / "adapter")
    fresh = minilora.load_adapter(Shared(), path)
    assert fresh.outer is fresh.inner[0]
    assert torch.equal(fresh(x), model(x))
