"""The core stands alone: without any subpackage, and lora.py without any library but PyTorch.

And what CONTRIBUTING says of additions is true: each of its diffs touches one file and works.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from layout import SUBPACKAGES
from sizes import ROOT

CORE_TESTS = ["test_lora.py", "test_layers.py", "test_targets.py", "test_merging.py"]


# An editable install would find a deleted subpackage in the checkout that it was made from.
NOT_INSTALLED = """
import sys

def is_editable(finder):
    return getattr(finder, "__module__", "").startswith("__editable__")

sys.meta_path[:] = [finder for finder in sys.meta_path if not is_editable(finder)]
"""


def copied(where: Path) -> Path:
    """A copy of what a checkout needs to run the core's tests.

    With the machine code of the CPU's kernels, where they have been compiled, and no other cache.
    """
    for name in ("minilora", "kernels", "tests", "docs"):
        ignored = shutil.ignore_patterns("*.pyc*", "*.tmp.*")
        shutil.copytree(ROOT / name, where / name, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", where)
    (where / "sitecustomize.py").write_text(NOT_INSTALLED)
    return where


def run(checkout: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


LORA_ALONE = """
import sys
for name in ("numba", "llvmlite", "triton", "transformers", "safetensors"):
    sys.modules[name] = None

import minilora.lora
import torch
from torch import nn

torch.manual_seed(0)
layer = minilora.lora.LoRALinear(nn.Linear(16, 16), r=4)
target = nn.Linear(16, 16)
model = minilora.inject(nn.Sequential(nn.Linear(16, 16)), r=4)
for trained in (layer, model):
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(200):
        x = torch.randn(32, 16)
        loss = (trained(x) - target(x)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses[::50]
print(minilora.__file__)
"""


def test_lora_trains_where_nothing_but_pytorch_can_be_imported() -> None:
    assert str(ROOT) in run(ROOT, "-c", LORA_ALONE)


def without(where: Path, *subpackages: str) -> Path:
    checkout = copied(where)
    for name in subpackages:
        shutil.rmtree(checkout / "minilora" / name)
    return checkout


def check_core(checkout: Path, tests: list[str]) -> None:
    code = "import minilora; minilora.inject; print(minilora.__file__)"
    assert str(checkout) in run(checkout, "-c", code)
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", str(checkout))
    assert " passed" in run(checkout, "-m", "pytest", *options, *tests)


def test_the_core_passes_its_tests_without_any_subpackage(tmp_path: Path) -> None:
    checkout = without(tmp_path, *SUBPACKAGES)
    check_core(checkout, [f"tests/core/{name}" for name in CORE_TESTS])


def test_a_name_of_a_missing_subpackage_says_what_is_missing(tmp_path: Path) -> None:
    checkout = without(tmp_path, "optim")
    code = """
import minilora
try:
    minilora.PagedAdamW
except ModuleNotFoundError as error:
    assert "minilora.optim" in str(error)
else:
    raise AssertionError
"""
    run(checkout, "-c", code)


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(SUBPACKAGES))
def test_the_core_passes_all_its_tests_without(name: str, tmp_path: Path) -> None:
    check_core(without(tmp_path, name), ["tests/core"])


def diff_of(heading: str) -> str:
    """The first diff below a heading of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index(heading) :]
    found = re.search(r"```diff\n(.*?)```", section, re.DOTALL)
    assert found is not None, heading
    return found[1]


def apply(diff: str, checkout: Path) -> Path:
    """Applies a diff of one file; hunks are separated by lines " ..."."""
    head, *lines = diff.splitlines()
    path = checkout / head.removeprefix("+++ b/")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(line[1:] + "\n" for line in lines))
        return path

    text = path.read_text()
    for hunk in "\n".join(lines).split("\n ...\n"):
        marked = hunk.split("\n")
        old = "\n".join(line[1:] for line in marked if line[:1] != "+")
        new = "\n".join(line[1:] for line in marked if line[:1] != "-")
        assert text.count(old) == 1, f"{path.name}: {old!r} stands there {text.count(old)} times"
        text = text.replace(old, new)
    path.write_text(text)
    return path


VARIANT = """
import torch
from torch import nn
import minilora
from minilora.variants.rslora import RSLoRA

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64))

model, x = minilora.inject(make(), r=16, adapter=RSLoRA), torch.randn(5, 64)
nn.init.normal_(model[0].adapters["default"].B, std=0.1)
assert model[0].adapters["default"].scale == 32 / 4
y = model(x)
folder = minilora.save_adapter(model, "rslora")
assert torch.equal(minilora.load_adapter(make(), folder, adapter=RSLoRA)(x), y)
assert torch.allclose(minilora.merge(model)(x), y, atol=1e-4)
"""

CODEBOOK = """
import torch
from torch import nn
import minilora
from minilora.kernels.reference import nf4
from minilora.kernels.reference.codebooks import levels

torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(128, 64)), torch.randn(5, 128)
dense = model[0].weight.detach().clone()
minilora.quantize(model, quant_type="e2m1", double_quant=False)
w = model[0].weight
packed, absmax = nf4.quantize(dense, 64, "e2m1")
assert torch.equal(packed, w.packed) and torch.equal(absmax, w.absmax)

# Half of the widest gap between two levels of E2M1, 4/6 and 6/6, times a block's absmax.
error = (w.dequantize() - dense).abs().view(-1, 64)
assert (error <= absmax[:, None] / 6 * 1.001).all()
decoded = (w.dequantize().view(-1, 64) / absmax[:, None]).view(-1, 1)
assert ((decoded - levels("e2m1")).abs().min(1).values < 1e-6).all()
assert torch.allclose(model(x), x @ w.dequantize().T + model[0].bias, atol=1e-5)
minilora.inject(model, r=4)(x).sum().backward()
"""

FLAG = """
import os, subprocess, sys
text = subprocess.run(
    [sys.executable, "-m", "minilora", "finetune", "--help"],
    capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"},
).stdout
text = " ".join(text.split())
assert "--label-smoothing" in text and "spread over all tokens" in text, text
"""

METRIC = """
import json
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import minilora
from minilora.training.callbacks import run_with, write_metrics
from minilora.training.config import FinetuneConfig
from minilora.training.data import Example
from minilora.training.loop import train

sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64))
minilora.inject(model, r=2)
examples = [Example(list(range(8)), list(range(8))) for _ in range(4)]
config = FinetuneConfig("m", "d", "o", steps=2, batch_size=2)
path = Path("metrics.jsonl")
run_with([write_metrics(path, [])], train(model, examples, config, pad=0))
lines = [json.loads(line) for line in path.read_text().splitlines()]
assert [line["sequences"] for line in lines] == [2, 2], lines
"""

ADDITIONS = {
    "a variant of LoRA": ("minilora/variants/rslora.py", VARIANT),
    "a 16-level codebook": ("kernels/reference/codebooks.py", CODEBOOK),
    "a CLI flag": ("minilora/training/config.py", FLAG),
    "a training metric": ("minilora/training/loop.py", METRIC),
}


# It trains, and takes as long as the others together.
IN_SOAK = "a training metric"


@pytest.mark.parametrize(
    "addition",
    [pytest.param(a, marks=[pytest.mark.soak] if a == IN_SOAK else []) for a in ADDITIONS],
)
def test_an_addition_is_a_diff_of_one_file(addition: str, tmp_path: Path) -> None:
    expected, code = ADDITIONS[addition]
    checkout = copied(tmp_path)
    diff = diff_of(f"### ... {addition}?")
    assert diff.count("+++ b/") == 1
    assert apply(diff, checkout) == checkout / expected
    run(checkout, "-c", code)
