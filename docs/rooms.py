"""The rooms of minilora and what they import: their ranks from tests/project/test_layout.py, the arrows from the sources themselves."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CAPTIONS = {
    "kernels.reference": "the mathematics",
    "kernels.cpu": "again, in Numba",
    "kernels.gpu": "again, in Triton",
    "files": "whole, or not there",
    "ops": "the dispatcher",
    "weight": "what NF4 is",
    "functional": "the autograd",
    "modules": "the two layers",
    "targets": "which layers",
    "surgery": "edits a model",
    "merging": "W + s B A",
    "checkpoint": "PEFT's files",
    "plan": "the dry run",
    "paging": "pages of states",
    "optim": "PagedAdamW",
    "retry": "a step once more",
    "show": "tables, pictures",
    "history": "steps, a result",
    "data": "text to batches",
    "hf": "transformers",
    "resume": "checkpoints",
    "recipe": "the training loop",
    "demo": "make demo",
    "cli": "the commands",
}
COLUMNS = (
    "retry optim paging",
    "cli demo history merging show kernels.cpu",
    "",
    "hf checkpoint kernels.gpu",
    "resume data files",
)


def ranks() -> dict[str, int]:
    tree = ast.parse((ROOT / "tests" / "test_layout.py").read_text())
    return next(
        ast.literal_eval(s.value)
        for s in tree.body
        if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "ROOMS"
    )


def sources(room: str) -> list[Path]:
    folder, _, name = room.rpartition(".")
    return (
        sorted((ROOT / "kernels" / name).glob("*.py"))
        if folder
        else [ROOT / "minilora" / f"{room}.py"]
    )


def imported(room: str) -> set[str]:
    """The rooms that a room imports; and the kernels, which ops loads by name at their first call."""
    found = set()
    for path in sources(room):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.startswith("minilora")
            ):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                found |= {name.removeprefix("minilora.") for name in names}
            elif (
                isinstance(node, ast.ImportFrom) and node.level
            ):  # of a kernel: from ..reference import nf4
                found |= {
                    f"kernels.{(node.module or alias.name).partition('.')[0]}"
                    for alias in node.names
                }
        found |= {f"kernels.{name}" for name in re.findall(r'_kernel\("(\w+)"', text)}
    return found & ranks().keys() - {room}


def arrows() -> dict[str, set[str]]:
    """What each room imports, without what it reaches through another one."""
    direct = {room: imported(room) for room in ranks()}

    def reach(room: str) -> set[str]:
        return (
            direct[room].union(*(reach(other) for other in direct[room])) if direct[room] else set()
        )

    return {
        room: {b for b in to if not any(b in reach(c) for c in to)} for room, to in direct.items()
    }
