"""plan's memory against the bytes of live tensors in real runs: activations, logits, loading."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from architectures import tiny_model
from live_memory import LiveMemory, parameter_bytes
from markup import parse
from torch import Tensor, nn

import minilora
from minilora.reports.formatting import format_bytes
from minilora.reports.memory import full_finetuning
from minilora.reports.planning import Plan

transformers = pytest.importorskip("transformers", reason="the models are transformers'")

# What a plan may be off by.
WITHIN = 0.05

BF16, F32 = torch.bfloat16, torch.float32

LLAMA = {
    "model_type": "llama",
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
}
# Norms of queries and keys, a head that is larger than hidden_size / heads, an untied output.
QWEN3 = {
    **LLAMA,
    "model_type": "qwen3",
    "hidden_size": 192,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,
}


class Case(NamedTuple):
    """A run, and a plan of it."""

    sizes: dict[str, Any]
    batch_size: int
    length: int
    r: int = 8
    quantize: bool = True
    checkpointing: bool = False
    dropout: float = 0.0
    targets: Any = "all-linear"
    dtype: torch.dtype = BF16
    grad_accum: int = 1

    def model(self) -> Any:
        sizes = {**self.sizes, "dtype": self.dtype}
        config = transformers.AutoConfig.for_model(sizes.pop("model_type"), **sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return transformers.AutoModelForCausalLM.from_config(config, dtype=self.dtype).train()

    def plan(self, efficient: bool) -> Plan:
        return minilora.plan(
            self.model(),
            self.r,
            quantize="all-linear" if self.quantize else False,
            targets=self.targets,
            batch_size=self.batch_size,
            length=self.length,
            checkpointing=self.checkpointing,
            dropout=self.dropout,
            grad_accum=self.grad_accum,
            efficient=efficient,
        )


RUNS = {
    "llama": Case(LLAMA, 4, 192),
    "llama, checkpointing": Case(LLAMA, 8, 96, checkpointing=True),
    "llama, dense": Case(LLAMA, 3, 256, quantize=False),
    "llama, dense, checkpointing": Case(LLAMA, 4, 192, r=16, quantize=False, checkpointing=True),
    "llama, dropout": Case(LLAMA, 5, 150, dropout=0.1),
    "llama, dense, dropout": Case(LLAMA, 5, 150, quantize=False, dropout=0.1),
    "llama, float32, large rank": Case(LLAMA, 4, 128, r=40, dtype=F32),
    "llama, accumulated gradients": Case(LLAMA, 4, 160, r=32, checkpointing=True, grad_accum=2),
    "qwen3": Case(QWEN3, 4, 192),
    "qwen3, checkpointing, dropout": Case(QWEN3, 3, 256, checkpointing=True, dropout=0.1),
    "qwen3, queries and values": Case(QWEN3, 4, 192, targets=["q_proj", "v_proj"]),
}


class Measured(NamedTuple):
    """Bytes of live tensors: what a run holds, and the most that a step adds."""

    held: int
    step: int


def measure(case: Case, loss: Callable[[Any, dict[str, Tensor]], Tensor], within: Any) -> Measured:
    """Takes a step of a run, inside of `within(model)`, and counts."""
    from minilora.huggingface.activation_checkpointing import gradient_checkpointing

    model = case.model()
    if case.quantize:
        minilora.quantize(model)
    minilora.inject(model, case.r, targets=case.targets, dropout=case.dropout)
    parameters = minilora.adapter_parameters(model)
    optimizer = minilora.PagedAdamW(parameters)

    ids = torch.arange(case.batch_size * case.length).reshape(case.batch_size, -1) % 2000
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    checkpointing = gradient_checkpointing(model) if case.checkpointing else nullcontext()
    with within(model), checkpointing:
        # The first step fills caches and makes the optimizer's states.
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        for _ in range(case.grad_accum - 1):
            loss(model, batch).backward()

        states = [t for s in optimizer.state_dict()["state"].values() for t in s.values()]
        floats = [t for t in states if isinstance(t, torch.Tensor) and t.numel() > 1]
        gradients = [p.grad for p in parameters if p.grad is not None]
        with LiveMemory([*model.parameters(), *gradients]) as step:
            loss(model, batch).backward()
    earlier = sum(t.nbytes for t in gradients)
    held = parameter_bytes(model) + sum(t.nbytes for t in floats)
    return Measured(held, earlier + step.peak)


def added(plan: Plan, *phases: str) -> int:
    """The most that one of these phases has beside what the run holds."""
    assert plan.run
    held = sum(plan.run.held.values())
    return max(sum(plan.phases[phase].values()) for phase in phases) - held


@pytest.mark.parametrize("name", RUNS)
def test_a_step_with_the_modules_of_transformers(name: str) -> None:
    """Without the weights, which are counted exactly and could outweigh the rest."""
    case = RUNS[name]
    plan = case.plan(efficient=False)
    found = measure(case, lambda model, batch: model(**batch).loss, nullcontext)
    assert plan.run and sum(plan.run.held.values()) == found.held
    assert added(plan, "loss", "backward", "step") == pytest.approx(found.step, rel=WITHIN)


@pytest.mark.parametrize("name", RUNS)
def test_a_step_of_finetune(name: str) -> None:
    module = pytest.importorskip("minilora.huggingface.efficient", reason="huggingface is there")
    from minilora.training.loss import token_losses

    case = RUNS[name]
    plan = case.plan(efficient=True)
    found = measure(case, token_losses, module.efficient_training)
    assert plan.run and sum(plan.run.held.values()) == found.held
    # A chunk of logits lives inside an operator, where tensors are not seen.
    assert added(plan, "backward", "step") == pytest.approx(found.step, rel=WITHIN)


# What is loaded in a process of its own: large enough for what else a process does to be small.
LARGE = {
    **LLAMA,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}

LOAD = """
import sys

import minilora


def memory(kind):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])


options = {"quantization_config": minilora.NF4Config()} if sys.argv[1] == "NF4" else {}
# Compiles kernels, and imports what the large model needs too.
minilora.load(sys.argv[2], **options)
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
model, _ = minilora.load(sys.argv[3], **options)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.soak
@pytest.mark.parametrize("how", ["NF4", "dense"])
def test_loading(how: str, tmp_path: Path) -> None:
    """The most that a process has in memory while it loads a model.

    On a busy machine the threads that read run ahead, and pages of the files count as well.
    """
    large = Case(LARGE, 1, 1, quantize=how == "NF4")
    for name, case in (("small", Case(LLAMA, 1, 1)), ("large", large)):
        case.model().save_pretrained(tmp_path / name)
    folders = tmp_path / "small", tmp_path / "large"
    program = [sys.executable, "-c", LOAD, how, *map(str, folders)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)

    planned = sum(large.plan(efficient=True).phases["loading"].values())
    assert planned == pytest.approx(int(done.stdout), rel=WITHIN)


def test_full_fine_tuning_for_comparison() -> None:
    case = Case(LLAMA, 4, 192)
    plan = case.plan(efficient=False)
    assert plan.run
    run = full_finetuning(plan.run, plan.parameters)

    model = case.model()
    ids = torch.arange(4 * 192).reshape(4, 192) % 2000
    with LiveMemory(model.parameters()) as step:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    held = sum(run.held.values())
    assert run.held["dense"] == parameter_bytes(model)
    assert run.held["optimizer"] == 2 * run.gradients == 2 * parameter_bytes(model)
    assert run.peak()[1] - held == pytest.approx(step.peak, rel=WITHIN)


def test_a_paged_optimizer_is_not_counted_and_a_second_batch_finds_gradients() -> None:
    options: dict[str, Any] = {"batch_size": 8, "length": 256}
    model = Case(LLAMA, 1, 1).model()
    plan = minilora.plan(model, 4, **options)
    paged = minilora.plan(model, 4, **options, paged_optimizer=True)
    assert plan.bytes["optimizer"] == paged.bytes["optimizer"] > 0
    assert plan.total_bytes - paged.total_bytes == plan.bytes["optimizer"]
    assert not any("optimizer" in kinds for kinds in paged.phases.values())
    assert paged.compared["full fine-tuning"] < plan.compared["full fine-tuning"]

    again = minilora.plan(model, 4, **options, grad_accum=4)
    assert all(again.phases[p]["gradients"] == again.bytes["gradients"] for p in ("loss", "step"))
    assert "gradients" not in plan.phases["loss"]


@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.1}, {"paged_optimizer": True, "grad_accum": 2}], ids=str
)
def test_what_a_plan_is_compared_with_is_planned_alike(options: dict[str, Any]) -> None:
    model = Case(LLAMA, 1, 1).model()
    options |= {"batch_size": 8, "length": 128, "checkpointing": True}
    compared = minilora.plan(model, 4, **options).compared
    dense = minilora.plan(model, 4, quantize=False, **options)
    assert compared["LoRA on a dense base"] == dense.total_bytes
    assert compared["full fine-tuning"] == dense.compared["full fine-tuning"]


def test_what_a_plan_of_a_batch_says() -> None:
    model = Case(LLAMA, 1, 1).model()
    plan = minilora.plan(model, 4, batch_size=3, length=50)
    assert plan.run and plan.run.batch.checkpointing
    assert plan.total_bytes == max(sum(kinds.values()) for kinds in plan.phases.values())
    assert plan.total_bytes == sum(plan.phases[str(plan.peak_phase)].values())
    text = str(plan)
    assert "plus activations" not in text
    assert f"3 x 50 tokens with gradient checkpointing: {format_bytes(plan.total_bytes)}" in text
    for method, needed in plan.compared.items():
        assert f"{method} {format_bytes(needed)}" in text

    bars = [r for r in parse(plan._repr_html_()).iter("rect") if r.get("height") == "22"]
    assert len(bars) == len(plan.phases[str(plan.peak_phase)])

    # Without a batch all is as it was.
    plain = minilora.plan(model, 4)
    assert (plain.phases, plain.peak_phase, plain.compared) == ({}, None, {})
    assert plain.total_bytes == sum(plain.bytes.values()) and "plus activations" in str(plain)


# Decoders of other architectures: what reading their modules finds.
DECODERS = {
    "OPTForCausalLM": {"gated": False, "rms": False},
    "GPTNeoXForCausalLM": {"gated": False, "rms": False},
    "GraniteForCausalLM": {"gated": True, "rms": True},
    "Olmo2ForCausalLM": {"gated": True, "rms": True},
    "SmolLM3ForCausalLM": {"gated": True, "rms": True},
}


@pytest.mark.parametrize("name", DECODERS)
def test_other_decoders_are_read_from_their_modules(name: str) -> None:
    model, _ = tiny_model(name)
    plan = minilora.plan(model, 2, batch_size=2, length=16)
    assert plan.run
    decoder = plan.run.decoder
    config = model.config
    assert (decoder.hidden, decoder.layers) == (config.hidden_size, config.num_hidden_layers)
    assert {key: getattr(decoder, key) for key in DECODERS[name]} == DECODERS[name]


@pytest.mark.parametrize("name", ["MambaForCausalLM", "MixtralForCausalLM", "Lfm2ForCausalLM"])
@pytest.mark.filterwarnings("ignore:.*matrices outside:UserWarning")
def test_the_activations_of_what_is_no_plain_decoder_are_refused(name: str) -> None:
    model, _ = tiny_model(name)
    with pytest.raises(ValueError, match=f"activations of {name} cannot be planned.*leave out"):
        minilora.plan(model, 2, batch_size=2, length=16)
    with pytest.raises(ValueError, match="cannot be planned"):
        minilora.plan(nn.Sequential(nn.Linear(4, 4)), 2, batch_size=2, length=16)
