"""The dtype policy of docs/how-to/dtypes.md: every cell of its table, and what else it says.

Each layer is compared with the same product in float64. The tolerance is that of rounding x, W, A,
B, and every sum, once to the dtype that the page names; a result that is more exact than that
dtype can be fails too.
"""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import gaussian, randomize
from safetensors.torch import load_file
from torch import Tensor, nn

import minilora
from minilora.nf4 import NF4Weight

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "dtypes.md"
COLUMNS = (None, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)


def table() -> list[tuple[str, str, tuple[str, ...]]]:
    """The rows of the page's table: what the layer is, its input, and a cell for each column."""
    rows = re.findall(r"^\| (dense|NF4)([^|]*)\| `([^|]*)` \|(.*)\|$", PAGE.read_text(), re.M)
    return [
        (kind + what.rstrip(), x, tuple(cell.strip() for cell in cells.split("|")))
        for kind, what, x, cells in rows
    ]


def cases() -> list[Any]:
    """Every cell of the table, for each dtype that the row stands for."""
    found = []
    for layer, x, cells in table():
        named = re.search(r"`(float32|bfloat16|float16)`$", layer)
        quantized = layer.startswith("NF4")
        compute = named[1] if named and quantized else None
        bases = DTYPES if quantized else [getattr(torch, named[1])] if named else []
        for base, (autocast, cell) in itertools.product(bases, zip(COLUMNS, cells, strict=True)):
            name = f"{layer}-of-{base}-{x}-{autocast}".replace("`", "").replace("torch.", "")
            values = quantized, base, compute, x, autocast, cell
            found.append(pytest.param(*values, id=re.sub(r"\W+", "-", name)))
    return found


def adapted(quantized: bool, base: torch.dtype, compute: str | None, x: Tensor) -> nn.Sequential:
    """A layer with an adapter, of in_features like x."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[-1], 24).to(base))
    if quantized:
        minilora.quantize(model, compute_dtype=getattr(torch, compute) if compute else None)
    return randomize(minilora.inject(model, r=4), size=0.3)  # type: ignore[return-value]


def in_float64(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output in float64, and the sum of the sizes of all terms that it adds."""
    W = layer.weight
    W = W.dequantize(torch.float64) if isinstance(W, NF4Weight) else W.detach().double()
    lora, x, bias = layer.adapters["default"], x.detach().double(), layer.bias.detach().double()
    A, B = lora.A.detach().double(), lora.scale * lora.B.detach().double()
    size = x.abs() @ (W.abs() + B.abs() @ A.abs()).T + bias.abs()
    return x @ (W + B @ A).T + bias, size


def test_the_table_has_all_rows() -> None:
    assert len(table()) == 10 and len(cases()) >= 60
    assert all(len(cells) == len(COLUMNS) for _, _, cells in table())


@pytest.mark.parametrize(("quantized", "base", "compute", "x", "autocast", "cell"), cases())
def test_a_cell_of_the_table(
    quantized: bool,
    base: torch.dtype,
    compute: str | None,
    x: str,
    autocast: torch.dtype | None,
    cell: str,
) -> None:
    data = gaussian(7, 96, dtype=getattr(torch, x)).requires_grad_()
    model = adapted(quantized, base, compute, data)
    lora = model[0].adapters["default"]
    assert lora.A.dtype == lora.B.dtype == torch.float32

    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        if cell == "refused":
            with pytest.raises(RuntimeError, match="must have the same dtype"):
                model(data)
            return
        y = model(data)
    y.float().square().sum().backward()

    named = re.fullmatch(r"`(\w+)`(?:, returns `(\w+)`)?", cell)
    assert named is not None
    computed, returned = (getattr(torch, name or named[1]) for name in named.groups())
    assert y.dtype == returned
    assert data.grad is not None and data.grad.dtype == data.dtype
    assert lora.A.grad.dtype == lora.B.grad.dtype == torch.float32

    exact, size = in_float64(model[0], data)
    error = (y.double() - exact).abs()
    unit, last = (torch.finfo(dtype).eps / 2 for dtype in (computed, returned))
    # x, W, A, B, z and the sums: at most eight roundings stand in the way of a result, and then
    # the one to the dtype that is returned.
    assert (error < 8 * unit * size + last * exact.abs()).all()
    assert (error / size).max() > unit / 20


@pytest.mark.parametrize("autocast", COLUMNS, ids=["plain", "bfloat16", "float16"])
@pytest.mark.parametrize("base", DTYPES, ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_a_model_trains_saves_and_merges(
    quantized: bool,
    base: torch.dtype,
    autocast: torch.dtype | None,
    tiny_llama: Callable[..., Any],
    tmp_path: Path,
) -> None:
    pytest.importorskip("minilora.files", reason="it is what saves an adapter")
    ids = torch.arange(24).reshape(2, 12)
    model = tiny_llama().to(base)
    if quantized:
        minilora.quantize(model)
    minilora.inject(model, r=4)
    optimizer = torch.optim.AdamW(minilora.adapter_parameters(model), lr=1e-2)
    enabled = autocast is not None
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=enabled):
            loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in minilora.adapter_parameters(model))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    states = [s for state in optimizer.state.values() for s in state.values()]
    assert all(s.dtype == torch.float32 for s in states)

    minilora.save_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    minilora.merge(model)
    assert {p.dtype for p in model.parameters()} == {base}


@pytest.mark.parametrize("to", HALVES, ids=str)
def test_casting_the_model_casts_adapters_and_no_quantized_weight(to: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    minilora.inject(minilora.quantize(model), r=4)
    before = model[0].weight.dequantize(torch.float32)
    model.to(to)
    assert {p.dtype for p in minilora.adapter_parameters(model)} == {to}
    assert torch.equal(model[0].weight.dequantize(torch.float32), before)


def test_a_quantized_layer_decodes_to_the_dtype_that_it_was_quantized_from() -> None:
    for base in DTYPES:
        model = minilora.quantize(nn.Sequential(nn.Linear(64, 32).to(base)))
        assert model[0].weight.dequantize().dtype == base
