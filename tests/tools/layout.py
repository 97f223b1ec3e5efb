"""The layout of the library: its units, and which of them may import which.

tests/project/test_layout.py holds the sources to it; the picture of the structure is compared
with it as well.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import sizes

ROOT = sizes.ROOT

# The files directly in minilora/, in the order in which they are read.
CORE = (
    "lora",
    "nf4",
    "functional",
    "layers",
    "targets",
    "whole",
    "guards",
    "checks",
    "surgery",
    "merging",
    "sharded",
    "ops",
)

# The same files in the order in which they import each other: each only from those before it.
# `lora` and `sharded` need nothing but PyTorch; `ops` stands between `nf4` and the kernels.
IMPORT_ORDER = ("lora", "sharded", "ops", *CORE[1:-2])

REFERENCE, CPU, GPU = "kernels.reference", "kernels.cpu", "kernels.gpu"
KERNELS = {REFERENCE, CPU, GPU}
PACKAGES = {"minilora", "minilora.kernels", *(f"minilora.{unit}" for unit in KERNELS)}

# Subpackage -> what it may import of minilora, beside itself.
SUBPACKAGES: dict[str, set[str]] = {
    "files": {*CORE, REFERENCE},
    "optim": set(),
    "distributed": {*CORE, "files"},
    "losses": {*CORE, REFERENCE, CPU},
    "reports": {*CORE, REFERENCE, "huggingface", "distributed"},
    # The kernels of what `efficient_training` replaces, which have no part in the core.
    "huggingface": {*CORE, "files", "losses", "distributed", REFERENCE, CPU},
    "training": {*CORE, "files", "optim", "reports", "huggingface", "losses", "distributed"},
    "demo": {*CORE, "files", "optim", "reports", "huggingface", "training", "distributed"},
}

# `cli` may import everything, and so may what stands at the front door.
FRONT = ("__init__", "__main__", "cli")


def unit_of(path: Path) -> str:
    """What a file belongs to: "surgery" of the core, the subpackage "files", "kernels.cpu"."""
    if path.is_relative_to(ROOT / "kernels"):
        return f"kernels.{path.relative_to(ROOT / 'kernels').parts[0]}"
    parts = path.relative_to(ROOT / "minilora").with_suffix("").parts
    return parts[0]


FILES = {path: unit_of(path) for path in sizes.library_files()}


def allowed(unit: str) -> set[str]:
    """What a unit may import of minilora, beside itself."""
    if unit in FRONT:
        return {*CORE, *SUBPACKAGES, *KERNELS, *FRONT, "minilora"}
    if unit in (CPU, GPU):
        return {REFERENCE}
    if unit in IMPORT_ORDER:
        below = IMPORT_ORDER[: IMPORT_ORDER.index(unit)]
        return set() if unit == "lora" else {*below, REFERENCE}
    return SUBPACKAGES.get(unit, set())


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`, which are never imported."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield from runtime_nodes(child)


def imports(path: Path, tree: ast.AST) -> Iterator[str]:
    """Full names of what a tree imports; those of kernels begin with minilora.kernels."""
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from imported_from(path, node)


def imported_from(path: Path, node: ast.ImportFrom) -> list[str]:
    base = node.module or ""
    if node.level:
        folders = path.relative_to(ROOT).parts[: -node.level]
        package = folders if folders[:1] == ("minilora",) else ("minilora", *folders)
        base = ".".join((*package, base)).rstrip(".")
    if base in PACKAGES:
        return [f"{base}.{alias.name}" for alias in node.names]
    return [base]


def unit_named(name: str) -> str:
    """The unit that a full name belongs to; "minilora" for the façade and what it exports."""
    parts = name.split(".")[1:]
    if parts[:1] == ["kernels"]:
        return ".".join(parts[:2])
    known = parts[:1] and (parts[0] in CORE or parts[0] in SUBPACKAGES or parts[0] in FRONT)
    return parts[0] if known else "minilora"


def forbidden(path: Path, unit: str, source: str) -> list[str]:
    """What a file of this unit imports of minilora and may not."""
    named = [n for n in imports(path, ast.parse(source)) if n.split(".")[0] == "minilora"]
    return [name for name in named if unit_named(name) not in {unit, *allowed(unit)}]
