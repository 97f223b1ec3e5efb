"""What the CPU benchmarks compute, on tiny models: both sides, the headline, the live tensors."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import BENCH, ROOT, load

pytest.importorskip("transformers", reason="the benchmarks train its models")

import minilora

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "heads": 4}


sides = load("sides")
headline = load("headline")
LiveTensors: Any = load("memory_timeline").LiveTensors


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """The scripts set the number of threads of their process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# -- both sides compute the same -----------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_blocks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with rows of 64 and 128 weights.

    bitsandbytes 0.50.2 decodes other rows wrongly on the CPU: those of 96 are up to 2 off.
    """
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    path = tmp_path_factory.mktemp("whole-blocks")
    config = AutoConfig.from_pretrained(folder)
    config.intermediate_size = 128
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def on_the_same_bytes(
    whole_blocks: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any]:
    pytest.importorskip("peft", reason="the other side")
    pytest.importorskip("bitsandbytes", reason="the other side")
    losses = load("losses")
    out = tmp_path_factory.mktemp("quantized")
    losses.quantize(whole_blocks, out)
    return losses.ours(out), sides.peft_side(whole_blocks, losses.CASE)


def test_both_sides_have_the_same_adapters(on_the_same_bytes: tuple[Any, Any]) -> None:
    for side in on_the_same_bytes:
        # 7 linear layers in each of two blocks.
        assert sides.set_adapters(side.model) == 14
    ours, theirs = (sorted(sides.adapters(side.model)) for side in on_the_same_bytes)
    assert len(ours) == len(theirs) == 14
    for (name, A, B), (other, C, D) in zip(ours, theirs, strict=True):
        assert name == other
        assert torch.equal(A, C) and torch.equal(B, D)
        assert A.std().item() == pytest.approx(1 / 8, rel=0.2)


def test_the_losses_agree_at_every_step(on_the_same_bytes: tuple[Any, Any], folder: Path) -> None:
    """In float32, with the same bytes: a few roundings of a loss of about 6."""
    found = []
    for side in on_the_same_bytes:
        sides.set_adapters(side.model)
        optimizer = torch.optim.AdamW(side.trained, lr=1e-3)
        losses = []
        for step in range(4):
            loss = side.loss(sides.text_ids(folder, 1, 32, offset=32 * step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
        # Every B starts at zero.
        assert all(B.any() for _, _, B in sides.adapters(side.model))
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_minilora_s_side_is_in_4_bits_and_trains_adapters_alone(folder: Path) -> None:
    case = sides.Case(rank=4, checkpointing=True, dropout=0.5)
    side = sides.minilora_side(folder, case)
    assert {type(m).__name__ for _, m in adapted(side.model)} == {"QLoRALinear"}
    assert all(m.adapters["default"].dropout == 0.5 for _, m in adapted(side.model))
    assert {p.dtype for p in side.trained} == {torch.float32}
    with side.context():
        assert side.model.is_gradient_checkpointing
    assert not side.model.is_gradient_checkpointing
    stream = sides.minilora_float32_side(folder, case).model
    assert stream.get_input_embeddings().weight.dtype == torch.float32
    assert all(m.compute_dtype == torch.bfloat16 for _, m in adapted(stream))


def adapted(model: torch.nn.Module) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, minilora.NF4Linear)]


def test_a_wrong_token_is_further_from_the_best_than_rounding_explains(folder: Path) -> None:
    generate, case = load("generate"), sides.Case(batch=1, length=8)
    model = generate.build(sides.OURS, folder, case)
    ids = sides.text_ids(folder, 1, 8)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    right = generate.distances(folder, case, tokens.tolist(), torch.get_num_threads())
    assert right["distance"] <= right["bound"]

    with torch.no_grad():
        worst = model(tokens).logits[0, -2].argmin()
    tokens[0, -1] = worst
    wrong = generate.distances(folder, case, tokens.tolist(), torch.get_num_threads())
    assert wrong["distance"] > wrong["bound"]


# -- the headline --------------------------------------------------------------------------------


def test_without_a_gpu_the_headline_says_so() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(BENCH / "headline.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no GPU here: the 65B model on a GPU capped at 48 GB was not run")


@pytest.mark.parametrize(
    ("shape", "billions"), [("7b", 6.7), ("13b", 13.0), ("33b", 32.5), ("65b", 65.2)]
)
def test_the_shapes_have_the_paper_s_numbers_of_parameters(shape: str, billions: float) -> None:
    """arXiv:2302.13971, table 2."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(headline.config_of(headline.SHAPES[shape]))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.1)


def test_no_layer_is_ever_dense() -> None:
    config, device = headline.config_of(TINY), torch.device("cpu")
    largest = {64 * 64, 64 * 128}

    class Watch(LiveTensors):  # type: ignore[misc]
        def count(self, tensor: torch.Tensor, made_by: str) -> None:
            super().count(tensor, made_by)
            if not tensor.is_meta and tensor.is_floating_point():
                assert tensor.numel() not in largest, f"{made_by} made a dense layer"

    with Watch():
        model = headline.build(config, headline.in_memory(device), device)
    assert len(adapted(model)) == 14
    assert type(model.get_submodule("lm_head")) is torch.nn.Linear
    assert not any(t.is_meta for t in headline.tensors(model))


def test_random_weights_have_the_variance_of_a_layer() -> None:
    device = torch.device("cpu")
    torch.manual_seed(0)
    weight = headline.random_weight(256, 512, headline.in_memory(device), device)
    W = weight.dequantize(torch.float32)
    # Uniform absmax between 0.5 and 1.5 of the offset adds a twelfth; the map is not quite uniform.
    assert W.var().item() * 512 == pytest.approx(1, abs=0.15)
    assert abs(W.mean().item()) < 0.1 * W.std().item()


@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_twin_takes_real_steps(
    is_mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(headline.SHAPES, "tiny", TINY)
    mapped = tmp_path if is_mapped else None
    result = headline.on_cpu("tiny", 8, 2, mapped, torch.get_num_threads())
    assert result["losses"][1] < result["losses"][0]
    assert result["trained"] == 2 * 16 * (4 * 128 + 3 * 192)
    assert not any(tmp_path.iterdir())
    assert ("mapped from disk" in headline.line("tiny", 8, result)) == is_mapped


def test_a_disk_that_is_too_small_is_named(tmp_path: Path) -> None:
    context = headline.mapped_file(tmp_path, 1 << 60)
    with pytest.raises(SystemExit, match=r"--mapped .*: the codes take .* GB are free there"):
        context.__enter__()


# -- live tensors --------------------------------------------------------------------------------


def test_a_storage_counts_once_and_until_it_is_freed() -> None:
    with LiveTensors() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100).t()
        assert live.now == 4000
        c = a + 1
        del a
        assert live.now == 8000
        del b
        assert live.now == 4000
        live.restart()
        assert live.most == 4000
        d = c.double()
        assert (live.now, live.most) == (12000, 12000)
        del c, d
        assert (live.now, live.most) == (0, 12000)
    grouped = load("memory_timeline").largest(live.at_most)
    assert [(one["bytes"], one["dtype"]) for one in grouped] == [
        (8000, "float64"),
        (4000, "float32"),
    ]


@pytest.mark.soak
def test_a_hundred_steps_agree() -> None:
    """The whole script, on SmolLM2-135M: fails if two losses are further apart than 1e-3."""
    command = [sys.executable, str(BENCH / "losses.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "100 steps in float32" in done.stdout
