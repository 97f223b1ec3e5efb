"""Measures how much rank an update needs: the numbers of docs/explorables/how-much-rank.md.

    python docs/measure_update.py

fine-tunes SmolLM2-135M without adapters, as notebook 1 does: the matrices q_proj, v_proj and
down_proj of the upper half, 16 steps on the demo's commands. It takes a few minutes on a CPU and
writes `docs/javascripts/update.js`, which holds

* of one matrix, q_proj of layer 20: the singular values of its update, the relative error that
  PyTorch measures when the rank is reduced, and 40 rows and columns of the factors U and V;
* of the model: the hold-out loss when the updates of all 45 matrices are reduced to rank r.
"""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.demo.sheets import read_sheets, split_by_tool
from minilora.huggingface import load_dense
from minilora.training.batches import collate
from minilora.training.data import encode
from minilora.training.loss import evaluate

TO = Path(__file__).resolve().parent / "javascripts" / "update.js"

NAME = "model.layers.20.self_attn.q_proj.weight"
KINDS = ("q_proj", "v_proj", "down_proj")
FIRST_LAYER = 15

STEPS, BATCH, LEARNING_RATE = 16, 8, 1e-4
LONGEST = 36
HELD_OUT = 32

# The stops of the slider; at each of them the loss is measured.
RANKS = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 288, 384, 576]

# Rows and columns of the matrix that the page draws, evenly spaced.
DRAWN = 40

HEAD = """\
// A real update of a weight, measured: python docs/measure_update.py writes this file.

const UPDATE = """


def examples(tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """The demo's commands, training and held out, short ones only."""

    def short(commands: Any) -> list[Any]:
        encoded = [encode(c.record, tokenizer, 512)[0] for c in commands]
        return [e for e in encoded if len(e.ids) <= LONGEST]

    training, unseen = (short(commands) for commands in split_by_tool(read_sheets()))
    return training, unseen[:HELD_OUT]


def train(model: Any, weights: dict[str, Tensor], training: list[Any]) -> None:
    """Adam on every entry of the weights: full fine-tuning of these matrices."""
    model.requires_grad_(False)
    for W in weights.values():
        W.requires_grad_(True)

    optimizer = torch.optim.Adam(weights.values(), lr=LEARNING_RATE)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(STEPS):
        chosen = order[BATCH * step : BATCH * (step + 1)]
        loss = model(**collate([training[i] for i in chosen], pad_id=0)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1:2}  loss {loss:.3f}", flush=True)
    model.requires_grad_(False)


def reduced(U: Tensor, S: Tensor, Vh: Tensor, r: int) -> Tensor:
    """The best approximation of rank r (Eckart and Young)."""
    return U[:, :r] * S[:r] @ Vh[:r]


def int16(x: Tensor) -> dict[str, Any]:
    """A matrix in 16-bit integers and a step: x = step * integers, row by row."""
    step = x.abs().max().item() / 32767
    integers = (x / step).round().to(torch.int16).contiguous()
    packed = base64.b64encode(integers.numpy().astype("<i2").tobytes()).decode()
    return {"rows": x.shape[0], "columns": x.shape[1], "step": step, "int16": packed}


def one_matrix(W: Tensor, dW: Tensor) -> dict[str, Any]:
    W, dW = W.double(), dW.double()
    U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
    errors = [(dW - reduced(U, S, Vh, r)).norm() / dW.norm() for r in RANKS]
    rows, columns = (torch.arange(DRAWN) * n // DRAWN for n in dW.shape)
    return {
        "name": NAME.removesuffix(".weight"),
        "shape": list(dW.shape),
        "size": float(f"{(dW.norm() / W.norm()).item():.6g}"),
        "singularValues": [float(f"{s:.7g}") for s in S.tolist()],
        "ranks": RANKS,
        "measuredErrors": [float(f"{e:.7g}") for e in errors],
        "U": int16(U[rows]),
        "V": int16(Vh.T[columns]),
        "drawn": int16(dW[rows][:, columns]),
    }


def losses(
    weights: dict[str, Tensor], before: dict[str, Tensor], loss: Callable[[], float]
) -> list[float]:
    """The hold-out loss with every update reduced to rank r, for r in RANKS."""
    svd = {
        name: torch.linalg.svd(W - before[name], full_matrices=False) for name, W in weights.items()
    }
    found = []
    for r in RANKS:
        for name, factors in svd.items():
            weights[name].copy_(before[name] + reduced(*factors, r))
        found.append(round(loss(), 4))
        print(f"rank {r:3}  hold-out loss {found[-1]}", flush=True)
    return found


def main() -> None:
    model, tokenizer = load_dense("smollm2", dtype=torch.float32)
    training, unseen = examples(tokenizer)
    weights = {
        name: W
        for name, W in model.named_parameters()
        if any(kind in name for kind in KINDS) and int(name.split(".")[2]) >= FIRST_LAYER
    }
    before = {name: W.detach().clone() for name, W in weights.items()}
    train(model, weights, training)

    update = one_matrix(before[NAME], weights[NAME] - before[NAME])
    update["matrices"] = len(weights)
    update["heldOutTokens"] = sum(e.learned for e in unseen)
    update["losses"] = losses(weights, before, lambda: evaluate(model, unseen, batch_size=16))
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in update.items())
    TO.write_text(f"{HEAD}{{\n{lines},\n}};\n\n{TAIL}")


TAIL = """\
// Node reads this file as a module, a page as a script.
if (typeof module !== "undefined") module.exports = { UPDATE };
"""


if __name__ == "__main__":
    main()
