"""The structure of minilora, read from its sources: its units and which of them imports which.

A unit is a file of the core, a subpackage, or one of the three folders of kernels. `draw.py` makes
a picture of it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The files of the core in the order in which they are read, each with what it holds.
CORE = {
    "lora": "y = W x + s B A x",
    "nf4": "what a 4-bit weight is",
    "functional": "products and gradients",
    "layers": "NF4Linear, QLoRALinear",
    "targets": "which layers are meant",
    "whole": "trained beside adapters",
    "guards": "what would fail silently",
    "checks": "what is refused first",
    "surgery": "quantize, inject, eject",
    "merging": "W + s B A, what is kept",
    "sharded": "parts of a parameter",
    "ops": "PyTorch's dispatcher",
}

# Subpackages, each with what it holds, on two lines.
SUBPACKAGES = {
    "files": ("adapters as PEFT's files,", "atomic writes"),
    "optim": ("PagedAdamW, retries;", "needs PyTorch alone"),
    "distributed": ("a model in shards,", "several processes"),
    "reports": ("plan, merge report,", "tables and figures"),
    "losses": ("cross-entropy", "in chunks of tokens"),
    "huggingface": ("transformers: loading,", "generation"),
    "training": ("config, data, loop, run checkpoints", ""),
    "demo": ("what make demo runs", ""),
    "cli": ("the commands", ""),
}

KERNELS = {
    "kernels.cpu": ("fast, in Numba", ""),
    "kernels.reference": ("the specification,", "in plain PyTorch"),
    "kernels.gpu": ("fast, in Triton", ""),
}

UNITS = (*CORE, *SUBPACKAGES, *KERNELS)


def sources(unit: str) -> list[Path]:
    if unit in KERNELS:
        return sorted((ROOT / "kernels" / unit.removeprefix("kernels.")).glob("*.py"))
    file = ROOT / "minilora" / f"{unit}.py"
    return [file] if file.exists() else sorted((ROOT / "minilora" / unit).glob("*.py"))


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`, which are never imported."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield from runtime_nodes(child)


def imported(unit: str) -> set[str]:
    """The units that a unit imports; and the kernels that `ops` loads by name at a first call."""
    names: set[str] = set()
    for path in sources(unit):
        text = path.read_text()
        for node in runtime_nodes(ast.parse(text)):
            if isinstance(node, ast.Import):
                names |= {alias.name.removeprefix("minilora.") for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= imported_from(node)
        for backends in re.findall(r"_backends = {(.*)}", text):
            names |= {f"kernels.{folder}" for folder in re.findall(r': "(\w+)"', backends)}
    return {owner for name in names if (owner := owner_of(name)) and owner != unit}


def imported_from(node: ast.ImportFrom) -> set[str]:
    base = node.module or ""
    if node.level > 1:
        # of a kernel: from ..reference import nf4
        return {f"kernels.{base or alias.name}" for alias in node.names}
    if node.level or not base.startswith("minilora"):
        return set()
    inside = base.removeprefix("minilora").removeprefix(".")
    return {f"{inside}.{alias.name}".removeprefix(".") for alias in node.names}


def owner_of(name: str) -> str:
    """The unit that holds `name`; "" if none does, as for the names of minilora/__init__.py."""
    parts = name.split(".")
    unit = ".".join(parts[:2]) if parts[0] == "kernels" else parts[0]
    return unit if unit in UNITS else ""


def arrows() -> dict[str, set[str]]:
    """What each unit imports, without what it reaches through another one."""
    return reduced({unit: imported(unit) for unit in UNITS})


def outer_arrows() -> dict[str, set[str]]:
    """The arrows between subpackages, with the core as one unit, "core"; kernels left out."""
    direct: dict[str, set[str]] = {"core": set()}
    for unit in SUBPACKAGES:
        named = imported(unit) - set(KERNELS)
        direct[unit] = {"core" if other in CORE else other for other in named}
    return reduced(direct)


def reduced(direct: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that say something new: none beside a way through other units."""

    def reach(unit: str) -> set[str]:
        return direct[unit].union(*(reach(other) for other in direct[unit]))

    return {
        unit: {other for other in to if not any(other in reach(third) for third in to)}
        for unit, to in direct.items()
    }
