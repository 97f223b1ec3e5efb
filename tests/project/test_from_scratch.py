"""docs/examples/qlora_from_scratch.py does what it says, with nothing but PyTorch.

The whole file runs once, in a process of its own, and the numbers that it prints are checked. The
notebook that walks through it contains the same code.
"""

import ast
import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
import textwrap
from typing import Any

import nbformat
import pytest
import sizes
import torch
from torch import Tensor, nn

from minilora.kernels.reference import codebooks

FILE = sizes.ROOT / "docs" / "examples" / "qlora_from_scratch.py"
NOTEBOOK = sizes.ROOT / "notebooks" / "8-qlora-from-scratch.ipynb"
SOURCE = FILE.read_text()

LINES, CODE_LINES = 220, 150

# Half the distance from 1 to the next float32.
ROUNDOFF = 2.0**-24

# Runs a file in an interpreter that has none of the other libraries that are installed here.
ONLY_TORCH = """
import runpy, sys
for name in ("minilora numpy safetensors numba triton transformers peft bitsandbytes".split()):
    sys.modules[name] = None
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def load() -> Any:
    spec = importlib.util.spec_from_file_location("qlora_from_scratch", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scratch = load()


@pytest.fixture(scope="module")
def printed() -> str:
    """What the file prints."""
    command = [sys.executable, "-c", ONLY_TORCH, str(FILE)]
    # Threads of two processes that compete for the same cores slow each other down tenfold.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout


# The file


def test_it_is_short_enough_to_read() -> None:
    assert sizes.lines(FILE) <= LINES
    assert sizes.code_lines(FILE) <= CODE_LINES
    assert sizes.wide_lines([FILE]) == []


def test_it_imports_nothing_but_pytorch_and_the_standard_library() -> None:
    tree = ast.walk(ast.parse(SOURCE))
    found = {
        name.split(".")[0]
        for node in tree
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        )
        if name
    }
    assert "torch" in found and found <= {"torch", *sys.stdlib_module_names}


def test_importing_it_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    load()
    assert capfd.readouterr() == ("", "")


# NF4


def test_the_levels_are_those_of_nf4() -> None:
    # The published ones were computed from 0.9677083 instead of 1 - (1/30 + 1/32) / 2. The largest
    # quantile moves by the difference over the density there, and every level with it.
    z = torch.special.ndtri(torch.tensor(0.9677083, dtype=torch.float64))
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    moved = (1 - (1 / 30 + 1 / 32) / 2 - 0.9677083) / density / z
    published = torch.tensor(codebooks.NF4)
    assert (scratch.NF4 - published).abs().max() <= moved + 2 * ROUNDOFF
    assert scratch.NF4[0] == -1 and scratch.NF4[7] == 0 and scratch.NF4[15] == 1


def test_the_published_levels_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="pip install -e .[dev]")
    published = torch.tensor(codebooks.NF4)
    assert torch.equal(functional.get_4bit_type("nf4", device="cpu"), published)


def test_every_byte_of_codes_survives_a_round_trip() -> None:
    # Each block starts with one of the 256 bytes and goes on with codes of the level 1, so that
    # its absmax is 1.
    packed = torch.full([256, scratch.BLOCK // 2], 255, dtype=torch.uint8)
    packed[:, 0] = torch.arange(256)
    W = scratch.dequantize(packed.flatten(), torch.ones(256))
    assert W[0x3C, 0] == scratch.NF4[3] and W[0x3C, 1] == scratch.NF4[12]

    again, absmax = scratch.quantize(W)
    assert torch.equal(again, packed.flatten()) and torch.equal(absmax, torch.ones(256))


def test_a_weight_is_stored_as_the_nearest_level() -> None:
    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    restored = scratch.dequantize(*scratch.quantize(W)).view_as(W).double()
    best = nearest(W.double())
    # Where two levels are equally near, either may be stored.
    assert ((restored - W).abs() - (best - W).abs()).abs().max() < 4 * ROUNDOFF * W.abs().max()


def nearest(W: Tensor) -> Tensor:
    """NF4 in float64, by thresholds and with the published levels."""
    levels = torch.tensor(codebooks.NF4, dtype=torch.float64)
    blocks = W.view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    code = torch.bucketize(blocks / absmax, (levels[1:] + levels[:-1]) / 2)
    return (levels[code] * absmax).view_as(W)


def test_the_error_of_double_quantization_is_at_most_half_a_step() -> None:
    generator = torch.Generator().manual_seed(2)
    absmax = 2 + torch.rand(4 * 256, generator=generator)
    code, absmax2, mean = scratch.double_quantize(absmax)
    assert code.dtype == torch.int8 and code.shape == (4, 256) and absmax2.shape == (4, 1)

    error = (scratch.double_dequantize(code, absmax2, mean) - absmax).view(4, 256).abs()
    half_a_step = absmax2 / 127 / 2
    # Four roundings of numbers up to 3: the difference from the mean, its code, the way back.
    assert (error <= half_a_step + 4 * 3 * ROUNDOFF).all()
    assert error.max() > half_a_step.min() / 2, "stored in more than 8 bits"


def test_a_layer_stores_4_bits_per_weight_and_nothing_else() -> None:
    layer = scratch.NF4Linear(torch.randn(1024, 1024))
    stored = layer.state_dict()
    assert set(stored) == {"packed", "code", "absmax2", "mean"} and not list(layer.parameters())
    assert stored["packed"].dtype == torch.uint8 and stored["packed"].numel() == 1024 * 1024 // 2
    others = [name for name, value in vars(layer).items() if isinstance(value, Tensor)]
    assert not others
    assert sum(t.nbytes for t in stored.values()) * 8 / 1024**2 == bits_per_weight(double=True)


def bits_per_weight(double: bool) -> float:
    mean = 32 / 1024**2
    return 4 + (8 / 64 + 32 / (64 * 256) + mean if double else 32 / 64)


# LoRA


def adapted(O: int, I: int) -> Any:
    """A 4-bit layer with an adapter whose B is not zero any more."""
    layer = scratch.LoRA(scratch.NF4Linear(torch.randn(O, I)), r=4, alpha=8)
    nn.init.normal_(layer.B)
    return layer


def test_a_new_adapter_changes_nothing() -> None:
    base = scratch.NF4Linear(torch.randn(128, 256))
    x = torch.randn(5, 256)
    assert torch.equal(scratch.LoRA(base, r=4, alpha=8)(x), base(x))


def test_a_layer_computes_the_equation_and_its_gradients() -> None:
    torch.manual_seed(3)
    layer = adapted(128, 256).double()
    x, dy = torch.randn(5, 256).double(), torch.randn(5, 128).double()
    W, A, B, s = layer.base.weight, layer.A, layer.B, 8 / 4

    y = layer(x)
    torch.testing.assert_close(y, x @ W.T + s * (x @ A.T) @ B.T)
    y.backward(dy)
    torch.testing.assert_close(A.grad, s * (dy @ B).T @ x)
    torch.testing.assert_close(B.grad, s * dy.T @ (x @ A.T))


def test_a_merged_layer_computes_the_same() -> None:
    torch.manual_seed(4)
    O, I, r = 128, 256, 4
    layer = adapted(O, I)
    merged = layer.merge()
    assert type(merged) is nn.Linear

    # A sum of n products has a relative error of at most n roundings, of the sum of magnitudes
    # (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). Both sides have one of
    # I + r + 3: the product with W or the merged weight, the adapter's, the scale and the sum.
    x = torch.randn(5, I)
    with torch.no_grad():
        magnitude = x.abs() @ layer.base.weight.abs().T
        magnitude += layer.scale * (x.abs() @ layer.A.abs().T) @ layer.B.abs().T
        difference = (merged(x) - layer(x)).abs()
    assert (difference <= 2 * (I + r + 3) * ROUNDOFF * magnitude).all()


def test_a_merged_model_computes_the_same_in_float64() -> None:
    torch.manual_seed(5)
    model = scratch.convert(scratch.GPT(), lambda layer: adapted(*layer.weight.shape)).double()
    ids = torch.randint(128, [3, scratch.CONTEXT])
    logits, merged = model(ids), scratch.convert(model, scratch.LoRA.merge)(ids)
    # Some 2,000 roundings on the way, of numbers no larger than the logits by a factor of 100.
    assert (merged - logits).abs().max() < 2e5 * 2**-53 * logits.abs().max()


def test_a_conversion_copies_the_model_and_changes_the_layers_of_its_blocks_only() -> None:
    model = scratch.GPT()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    converted = scratch.convert(model, lambda layer: scratch.NF4Linear(layer.weight.detach()))

    kinds = [type(layer) for layer in converted.modules()]
    assert kinds.count(scratch.NF4Linear) == 12 and kinds.count(nn.Linear) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# What it prints


def test_it_prints_the_levels(printed: str) -> None:
    text = re.search(r"16 levels of NF4\ntensor\(\[(.*?)\]\)", printed, re.DOTALL)
    assert text
    levels = [float(level) for level in text[1].split(",")]
    # Printed with four digits.
    assert levels == pytest.approx(codebooks.NF4, rel=0, abs=0.5e-4 + 1e-6)


def test_it_prints_the_bits_and_the_error_of_4_bit_weights(printed: str) -> None:
    row = r"^(.+?) +(\d\.\d{3}) bits per weight, relative error (\d\.\d{4})$"
    found = {name: (bits, float(error)) for name, bits, error in re.findall(row, printed, re.M)}
    even, plain, double = found["16 even levels"], found["NF4"], found["NF4, 8-bit absmax"]

    assert even[0] == plain[0] == f"{bits_per_weight(double=False):.3f}" == "4.500"
    assert double[0] == f"{bits_per_weight(double=True):.3f}" == "4.127"

    torch.manual_seed(0)
    W = torch.randn(1024, 1024).double()
    expected = ((nearest(W) - W).norm() / W.norm()).item()
    # Printed with four digits.
    assert abs(plain[1] - expected) <= 0.5e-4 + 1e-6
    assert abs(double[1] - plain[1]) <= 1e-4 < 0.005 < even[1] - plain[1]


def test_it_prints_losses_that_fall_to_nearly_the_lowest_possible(printed: str) -> None:
    pretraining, fine_tuning = (
        [float(loss) for loss in re.findall(r"step +\d+  loss +([\d.]+)", part)]
        for part in printed.split("Fine-tuning")
    )
    lowest = 5 * math.log(8)
    assert f"log 32768 = {lowest:.2f}\n" in printed
    for losses in (pretraining, fine_tuning):
        assert len(losses) >= 5 and losses[0] > 5 * lowest > 1.2 * lowest > losses[-1]

    own = reports(printed)
    assert own["pretrained"][0] < 1.1 * lowest and own["pretrained"][1] > 3 * lowest
    # 4 bits cost little.
    assert abs(own["quantized"][0] - own["pretrained"][0]) < 0.02 * lowest
    assert own["fine-tuned"][1] < 1.1 * lowest and own["fine-tuned"][0] > 3 * lowest
    # No held-out loss is better than knowing the grammar, but for the luck of 256 sentences.
    assert min(itertools.chain(*[losses[:2] for losses in own.values()])) > 0.98 * lowest


def test_it_prints_sentences_in_the_right_order(printed: str) -> None:
    a, n, v = ("|".join(w) for w in (scratch.ADJECTIVES, scratch.NOUNS, scratch.VERBS))
    plain = rf"the ({a}) ({n}) ({v}) the ({a}) ({n})\."
    yoda = rf"the ({a}) ({n}) the ({a}) ({n}) ({v})\."

    found = reports(printed)
    for title, order in (("pretrained", plain), ("quantized", plain), ("fine-tuned", yoda)):
        sentences = found[title][2]
        assert len(sentences) == 2
        assert all(re.fullmatch(order, sentence) for sentence in sentences), (title, sentences)


def test_without_its_adapter_the_model_is_what_it_was(printed: str) -> None:
    found = reports(printed)
    assert found["adapter removed"] == found["quantized"]


def reports(printed: str) -> dict[str, tuple[float, float, list[str]]]:
    """Title -> loss on plain text, loss on Yoda's, sentences."""
    row = r"^([\w -]+): loss ([\d.]+) on plain text, ([\d.]+) on Yoda's\n((?:  the .*\n)+)"
    return {
        title: (float(plain), float(yoda), textwrap.dedent(sentences).splitlines())
        for title, plain, yoda, sentences in re.findall(row, printed, re.MULTILINE)
    }


def test_it_prints_how_much_is_trained(printed: str) -> None:
    # Two blocks: q, k, v, o are 128 x 128, up and down 128 x 512.
    count = 2 * 4 * (4 * (128 + 128) + 2 * (128 + 512))
    total = sum(p.numel() for p in scratch.GPT().parameters())
    assert f"Fine-tuning {count:,} parameters, {count / total:.1%} of" in printed


def test_it_prints_that_the_merged_model_computes_the_same(printed: str) -> None:
    text = re.search(r"merged: logits differ by at most (\S+)", printed)
    # 512 roundings, the longest sum, of numbers as large as the largest logits, about 30.
    assert text and 0 < float(text[1]) < 512 * ROUNDOFF * 30


# The notebook


def text_of(node: ast.stmt, source: str) -> str:
    """The lines of a statement, with its decorators and with the comments in it."""
    decorators = getattr(node, "decorator_list", [])
    start = min(n.lineno for n in (node, *decorators))
    return textwrap.dedent("\n".join(source.splitlines()[start - 1 : node.end_lineno]))


def parts() -> tuple[list[str], list[str], set[str]]:
    """The file's code outside main(), inside it, and the names that the former defines."""
    _, *body, main, run = ast.parse(SOURCE).body
    assert isinstance(main, ast.FunctionDef) and main.name == "main" and isinstance(run, ast.If)
    names = {name for node in body for name in defined(node)}
    outside, inside = ([text_of(node, SOURCE) for node in nodes] for nodes in (body, main.body))
    return outside, inside, names


def defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    return {
        n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }


def differences(cells: list[str]) -> list[str]:
    """Statements of the file that the cells lack or change, in the order of the file."""
    written = [(node, text_of(node, cell)) for cell in cells for node in ast.parse(cell).body]
    definitions, story, names = parts()

    wrong = []
    for expected in (definitions, story):
        left = iter(text for _, text in written)
        wrong += [text for text in expected if text not in left]
    redefined = [t for node, t in written if defined(node) & names and t not in definitions]
    return wrong + redefined


def cells_of_the_notebook() -> list[str]:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def test_the_notebook_contains_the_code_of_the_file() -> None:
    assert differences(cells_of_the_notebook()) == []


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("self.scale = alpha / r", "self.scale = alpha"),
        ("# B is zero:", "# B is nothing:"),
        ("steps=200", "steps=100"),
        ("def merge(self):", "def merged(self):"),
    ],
)
def test_a_notebook_that_differs_is_seen(was: str, now: str) -> None:
    cells = cells_of_the_notebook()
    changed = [cell.replace(was, now) for cell in cells]
    assert changed != cells and len(differences(changed)) >= 1
    assert differences([*cells, "def quantize(W):\n    return W"]) == [
        "def quantize(W):\n    return W"
    ]
    assert differences(cells[::-1])
