"""plan says in advance what quantize and inject then do: layers, parameters, bytes and errors.

And it changes nothing.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markup import parse
from torch import nn
from transformers_folders import make_model

import minilora
from minilora.reports.formatting import format_bytes
from minilora.reports.pictures import WIDTH
from minilora.reports.planning import Plan, nf4_bytes
from minilora.targets import adapted_layers
from minilora.whole import whole_parameters


def mlp(dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    made = {
        "up": nn.Linear(30, 41),
        "norm": nn.LayerNorm(41),
        "down": nn.Linear(41, 7, bias=False),
        "lm_head": nn.Linear(7, 90),
    }
    return nn.ModuleDict(made).to(dtype)


def split(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """plan's arguments as quantize's and inject's."""
    quantize = {
        k: v
        for k, v in arguments.items()
        if k in ("targets", "exclude", "block_size", "double_quant")
    }
    inject = {
        k: v
        for k, v in arguments.items()
        if k not in ("quantize", "block_size", "double_quant", "trust_remote_code")
    }
    return quantize, inject


def done(model: Any, arguments: dict[str, Any]) -> Any:
    """The model after what the plan is about."""
    quantize, inject = split(arguments)
    if arguments.get("quantize", True):
        minilora.quantize(model, **quantize)
    return minilora.inject(model, **inject)


def assert_came_true(plan: Plan, model: Any, parameters: int) -> None:
    """Compares a plan with the model after quantize and inject, and with AdamW after one step."""
    layers: dict[str, Any] = dict(adapted_layers(model))
    ours = {name: list(layer.adapters.parameters()) for name, layer in layers.items()}
    assert [row.name for row in plan.rows] == list(layers)
    for row, layer in zip(plan.rows, layers.values(), strict=True):
        assert (row.out_features, row.in_features) == (layer.out_features, layer.in_features)
        assert row.adapter_parameters == sum(p.numel() for p in ours[row.name])
        assert row.base_bytes == layer.weight.nbytes

    trained = minilora.adapter_parameters(model)
    assert plan.parameters == parameters
    assert plan.trainable == sum(p.numel() for p in trained)

    quantized = [m for m in model.modules() if isinstance(m, minilora.NF4Linear)]
    # What is trained whole stands beside the base's.
    whole = {id(p): p for p in whole_parameters(model).values()}.values()
    everything = sum(p.nbytes for p in [*model.parameters(), *whole])

    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(trained, foreach=False)
    optimizer.step()
    states = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    assert plan.bytes["quantized"] == sum(layer.weight.nbytes for layer in quantized)
    assert plan.bytes["adapters"] == sum(p.nbytes for tensors in ours.values() for p in tensors)
    assert plan.bytes["dense"] == everything - plan.bytes["quantized"] - plan.bytes["adapters"]
    assert plan.bytes["gradients"] == sum(p.grad.nbytes for p in trained)
    assert plan.bytes["optimizer"] == sum(s.nbytes for s in states)
    assert plan.total_bytes == sum(plan.bytes.values())


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@given(
    st.integers(1, 7),
    st.sampled_from(["all-linear", ["up", "lm_head"], "down"]),
    st.sampled_from([(), ("norm",), ("norm", "norm.bias"), ("up.bias", "norm")]),
    st.booleans(),
    st.sampled_from([32, 64, 256]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=40)
def test_a_plan_equals_what_happens(
    r: int,
    targets: Any,
    also: tuple[str, ...],
    quantize: bool,
    block_size: int,
    double_quant: bool,
    dtype: torch.dtype,
) -> None:
    arguments = {"r": r, "targets": targets, "train_also": also, "quantize": quantize}
    arguments |= {"block_size": block_size, "double_quant": double_quant}
    model = mlp(dtype)
    with torch.device("meta"):
        empty = mlp(dtype)
    plan = minilora.plan(model, **arguments)
    assert minilora.plan(empty, **arguments) == plan
    parameters = count(model)
    assert_came_true(plan, done(model, arguments), parameters)
    wrapped = {row.name for row in plan.rows}
    assert set(plan.left_out) == {"up", "down", "lm_head"} - wrapped


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"quantize": False, "r": 3},
        {"targets": ["q_proj", "down_proj"], "train_also": ["norm"]},
        {"train_also": ["embed_tokens", "lm_head"]},
        {"targets": "lm_head", "quantize": False},
        {"rank_pattern": {"q_proj": 3, re.compile("0.*proj"): 5}, "lora_bias": True},
        {"layers_to_transform": 1, "alpha_pattern": {"mlp.up_proj": 3.5}},
    ],
)
def test_the_plan_of_a_language_model_equals_what_happens(
    arguments: dict[str, Any], tie: bool, tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama(tie_word_embeddings=tie)
    plan = minilora.plan(model, **arguments)
    parameters = count(model)
    assert_came_true(plan, done(model, arguments), parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
def test_a_config_or_a_folder_is_planned_as_the_model_it_makes(
    tie: bool, dtype: torch.dtype, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    tiny_llama(tie_word_embeddings=tie).to(dtype).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == dtype
    plan = minilora.plan(model, r=4, train_also=["norm"])
    for source in (model.config, str(tmp_path), tmp_path):
        found = minilora.plan(source, r=4, train_also=["norm"])
        assert (found.rows, found.left_out, found.parameters, found.trainable) == (
            plan.rows,
            plan.left_out,
            plan.parameters,
            plan.trainable,
        )
        assert found.bytes == plan.bytes
    assert (
        minilora.plan(str(tmp_path)).model == str(tmp_path)
        and minilora.plan(model.config).model == "LlamaForCausalLM"
    )
    assert_came_true(plan, done(model, {"r": 4, "train_also": ["norm"]}), plan.parameters)


def test_a_model_that_is_quantized_already_is_planned_as_it_is() -> None:
    model = minilora.quantize(mlp(), exclude=["lm_head"])
    plan = minilora.plan(model, r=2, targets=["up", "down"])
    assert plan.parameters == count(mlp())
    assert_came_true(plan, minilora.inject(model, r=2, targets=["up", "down"]), plan.parameters)


@pytest.mark.parametrize("kind", ["llama", "llama, tied", "qwen2, with biases"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_folder_in_4_bits_is_planned_as_the_model_that_it_makes(
    kind: str, double_quant: bool, tmp_path: Path
) -> None:
    model = minilora.quantize(make_model(kind), exclude=["o_proj"], double_quant=double_quant)
    folder = minilora.save_quantized(model, tmp_path / "stored")
    stored, loaded = minilora.plan(folder, r=3), minilora.plan(model, r=3)
    assert (stored.rows, stored.bytes) == (loaded.rows, loaded.bytes)
    assert (stored.parameters, stored.trainable) == (loaded.parameters, loaded.trainable)
    assert stored.bytes["quantized"] and stored.quantize


def test_what_transformers_stores_with_bitsandbytes_is_planned_so_too(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the writer")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_model("llama, tied").save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "stored")
    stored = minilora.plan(tmp_path / "stored", r=3)
    loaded = minilora.plan(minilora.load(tmp_path / "stored")[0], r=3)
    assert (stored.rows, stored.bytes) == (loaded.rows, loaded.bytes)


@given(st.integers(1, 5000), st.sampled_from([32, 64, 128, 4096]), st.booleans())
@settings(max_examples=50)
def test_nf4_bytes_counts_every_tensor(n: int, block_size: int, double_quant: bool) -> None:
    assert (
        nf4_bytes(n, block_size, double_quant)
        == minilora.quantize_nf4(torch.randn(n), block_size, double_quant).nbytes
    )


def test_the_formula_of_the_paper() -> None:
    # QLoRA, section 3: 4 bits, 8 bits per block of 64, 32 bits per group of 256 blocks
    assert abs(8 * nf4_bytes(4096 * 4096) / 4096**2 - (4 + 8 / 64 + 32 / (64 * 256))) < 1e-5
    assert 8 * nf4_bytes(4096 * 4096, double_quant=False) / 4096**2 == 4 + 32 / 64


@pytest.mark.parametrize("train", [True, False])
def test_a_plan_changes_nothing(train: bool) -> None:
    model = mlp().train(train)
    model["norm"].requires_grad_(False)
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    minilora.plan(model, r=2, train_also=["norm"])
    assert torch.equal(torch.get_rng_state(), state)
    for (name, module), (was, old) in zip(
        model.named_modules(), before.named_modules(), strict=True
    ):
        assert (name, type(module), module.training) == (was, type(old), train)
    for p, old_p in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, old_p) and p.requires_grad == old_p.requires_grad


@pytest.mark.parametrize("already", [False, True])
def test_what_is_quantized_may_be_more_than_what_has_an_adapter(already: bool) -> None:
    """As `finetune` does it: the base in NF4 whole, adapters on the targets alone."""
    model = mlp()
    if already:
        minilora.quantize(model, "all-linear")
    plan = minilora.plan(model, r=2, targets=["up"], quantize="all-linear")
    if not already:
        minilora.quantize(model, "all-linear")
    minilora.inject(model, r=2, targets=["up"])
    packed = [
        m for m in model.modules() if isinstance(getattr(m, "weight", None), minilora.NF4Weight)
    ]
    assert len(packed) == 2 and [row.name for row in plan.rows] == ["up"]
    assert plan.bytes["quantized"] == sum(m.weight.nbytes for m in packed)
    adapters = sum(p.nbytes for p in minilora.adapter_parameters(model))
    assert (
        plan.bytes["dense"]
        == sum(p.nbytes for p in model.parameters()) - plan.bytes["quantized"] - adapters
    )


def test_a_plan_prints_as_a_table() -> None:
    model = nn.ModuleDict({"a": mlp(), "b": mlp()})
    plan = minilora.plan(model, r=4)
    text = str(plan)
    lines = text.splitlines()
    assert lines[0].startswith(
        f"ModuleDict: {plan.parameters:,} parameters, {plan.trainable:,} trainable ("
    )
    assert re.fullmatch(r"  layer +out x in +count +adapter +base", lines[1])
    rows = [re.split(r" {2,}", line.strip()) for line in lines[2:4]]
    assert rows == [
        ["up", "41 x 30", "2", "568", format_bytes(2 * nf4_bytes(41 * 30))],
        ["down", "7 x 41", "2", "384", format_bytes(2 * nf4_bytes(41 * 7))],
    ]
    assert re.fullmatch(r"  no adapter: a\.lm_head, b\.lm_head", lines[4])
    for kind in ("quantized", "dense", "adapters", "gradients", "optimizer"):
        assert f"{kind} {format_bytes(plan.bytes[kind])}" in lines[6]
    assert lines[5] == f"  total {format_bytes(plan.total_bytes)}, plus activations"
    assert max(map(len, lines)) <= 132
    columns = [line.rstrip().find("2  ") for line in lines[2:4]]
    assert len(set(columns)) == 1, "the columns are not aligned"


def test_the_bar_of_a_plan_is_divided_in_proportion_to_its_bytes() -> None:
    plan = minilora.plan(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), r=4)
    bars = [r for r in parse(plan._repr_html_()).iter("rect") if r.get("height") == "22"]

    held = [n for n in plan.bytes.values() if n]
    assert [float(bar.get("width", "")) for bar in bars] == pytest.approx(
        [WIDTH * n / plan.total_bytes for n in held], abs=0.05
    )
    assert float(bars[-1].get("x", "")) + float(bars[-1].get("width", "")) == pytest.approx(
        WIDTH, abs=0.2
    )
    assert repr(plan) == str(plan) and "Row(" not in repr(plan)


def attention() -> nn.Module:
    return nn.ModuleDict({"up": nn.Linear(8, 8), "attention": nn.MultiheadAttention(8, 2)})


class OwnForward(nn.Linear):
    """A subclass whose forward an adapter would replace."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


ERRORS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "no such target": (mlp, {"targets": "dwn"}),
    "nothing left": (mlp, {"targets": "up", "exclude": ["up"]}),
    "no rank": (mlp, {"r": 0}),
    "alpha": (mlp, {"r": 2, "alpha": -1.0}),
    "train_also": (mlp, {"r": 2, "train_also": ["nrom"]}),
    "its own forward": (lambda: nn.Sequential(OwnForward(8, 8)), {"r": 2}),
    "attention": (attention, {"r": 2}),
    "an adapter already": (lambda: minilora.inject(mlp(), r=2), {"r": 2}),
    "one layer": (lambda: nn.Linear(8, 8), {"r": 2}),
    "no rank for one layer": (mlp, {"r": 2, "rank_pattern": {"up": 0}}),
    "dropout": (mlp, {"r": 2, "dropout": 1.5}),
    "dropout that is no number": (mlp, {"r": 2, "dropout": float("nan")}),
    "no such layer": (mlp, {"r": 2, "alpha_pattern": {"upp": 3.0}}),
    "no such block": (mlp, {"r": 2, "layers_to_transform": [3]}),
    "an excluded layer that is not there": (mlp, {"r": 2, "exclude": ["dwn"]}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_plan_refuses_what_inject_refuses_with_the_same_words(case: str) -> None:
    make, arguments = ERRORS[case]
    with pytest.raises((ValueError, TypeError)) as expected:
        minilora.inject(make(), **arguments)
    with pytest.raises(expected.type) as found:
        minilora.plan(make(), **arguments, quantize=False)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0, "length": 8}, "batch_size=0: must be a whole number, 1 ... 1,000,"),
        ({"batch_size": 1, "length": -8}, "length=-8: must be"),
        ({"batch_size": True, "length": 8}, "batch_size=True: must be"),
        ({"batch_size": 1, "length": "8"}, "length='8': must be"),
        ({"batch_size": 1, "length": 1.5}, "length=1.5: must be"),
        ({"batch_size": 10**10, "length": 8}, "batch_size=10000000000: must be"),
        ({"batch_size": 4}, "batch_size=4 without length: .* give length (--length)"),
        ({"length": 8}, "length=8 without batch_size: .* (--batch-size)"),
        ({"grad_accum": 0}, "grad_accum=0: must be"),
        ({"grad_accum": None}, "grad_accum=None: must be"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_before_the_model_is_built(
    arguments: dict[str, Any], message: str
) -> None:
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=pattern):
        minilora.plan("no-such-model", **arguments)


def test_a_plan_refuses_what_quantize_refuses(tiny_llama: Callable[..., Any]) -> None:
    # Quantizing a tied head would untie it.
    cases: list[tuple[nn.Module, dict[str, Any]]] = [
        (mlp(), {"block_size": 48}),
        (tiny_llama(tie_word_embeddings=True), {"targets": ["lm_head"]}),
    ]
    for model, arguments in cases:
        with pytest.raises(ValueError) as expected:
            minilora.quantize(copy.deepcopy(model), **arguments)
        with pytest.raises(ValueError, match=re.escape(str(expected.value))):
            minilora.plan(model, r=2, **arguments)


class Mixture(nn.Module):
    """A layer of experts beside linear ones, as transformers stacks them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.experts = nn.Parameter(torch.ones(4, 10, 6))
        self.position = nn.Parameter(torch.ones(1, 5, 6))
        self.convolution = nn.Conv1d(6, 4, 3)


def test_experts_are_counted_and_warned_of_with_their_share() -> None:
    model = Mixture()
    assert (count(model), model.experts.numel()) == (240 + 30 + 70 + 76, 240)
    with pytest.warns(UserWarning, match=r"58% of the parameters are matrices outside"):
        plan = minilora.plan(model, r=2)
    assert plan.unreached == 240
    assert "not quantized: 240 parameters (58%) outside of linear layers" in str(plan)
    assert plan.bytes["dense"] == 4 * (count(model) - 60)

    with pytest.raises(ValueError, match=r"58%.*strict=False"):
        minilora.plan(model, r=2, strict=True)


def test_the_experts_of_a_transformers_config_are_counted() -> None:
    transformers = pytest.importorskip("transformers", reason="the config is Mixtral's")
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    config = transformers.MixtralConfig(**sizes, **heads, num_local_experts=4)
    with pytest.warns(UserWarning, match="experts"):
        plan = minilora.plan(config, r=2)
    # Two layers of four experts: gate and up [48, 32], down [32, 24].
    assert plan.unreached == 2 * 4 * (48 * 32 + 32 * 24)


@pytest.mark.parametrize("options", [{}, {"targets": "up"}])
def test_a_model_without_experts_is_planned_in_silence(options: dict[str, Any]) -> None:
    plan = minilora.plan(mlp(), r=2, strict=True, **options)
    assert plan.unreached == 0 and "outside of linear" not in str(plan)
