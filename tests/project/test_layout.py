"""Who may import whom, how long a file may be, and what is public."""

import ast
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import minilora

ROOT = Path(__file__).resolve().parents[2]

# Imports point down: to a smaller number. A file that is not here has no place yet, and the test says so.
ROOMS = {
    "kernels.reference": 0,
    "kernels.cpu": 1,
    "kernels.gpu": 1,
    "files": 1,
    "ops": 2,
    "weight": 3,
    "functional": 4,
    "modules": 5,
    "targets": 6,
    "surgery": 7,
    "merging": 8,
    "checkpoint": 8,
    "plan": 8,
    "paging": 7,
    "show": 7,
    "optim": 8,
    "retry": 9,
    "data": 9,
    "hf": 9,
    "history": 9,
    "resume": 10,
    "recipe": 11,
    "demo": 12,
    "cli": 13,
}
CORE = [
    room
    for room, rank in ROOMS.items()
    if rank <= 8 and room not in ("show", "plan", "paging", "optim", "kernels.cpu", "kernels.gpu")
]
CORE_LINES = 1250  # of code, at most
TWINS = ("kernels.cpu", "kernels.gpu")  # they say again, fast, what kernels/reference says
OWN = {"kernels.cpu": {"numba", "llvmlite"}, "kernels.gpu": {"triton"}, "cli": {"typer"}}
EVERYWHERE = {"torch", "numpy", "safetensors", "minilora"}


def python_files() -> dict[Path, str]:
    """Every source file and its room; minilora/kernels is the same folder as kernels and is not walked twice."""
    package = {
        p: ".".join(p.relative_to(ROOT / "minilora").with_suffix("").parts)
        for p in (ROOT / "minilora").glob("*.py")
    }
    subpackages = [
        p
        for p in (ROOT / "minilora").iterdir()
        if p.is_dir() and p.name not in ("kernels", "__pycache__")
    ]
    package |= {p: folder.name for folder in subpackages for p in folder.rglob("*.py")}
    kernels = {
        p: f"kernels.{p.relative_to(ROOT / 'kernels').parts[0]}"
        for p in (ROOT / "kernels").rglob("*.py")
    }
    return package | kernels


FILES = python_files()


def imports(path: Path, tree: ast.AST) -> Iterator[str]:
    """Full names of what the nodes of a tree import; `from . import x` of a kernel is minilora.kernels.<room>.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = ("minilora", *path.relative_to(ROOT).parts[: -node.level])
                base = ".".join((*parts, base)).rstrip(".")
            if (
                base.removeprefix("minilora.kernels") in ("", ".cpu", ".gpu", ".reference")
                or base == "minilora"
            ):
                yield from (f"{base}.{alias.name}" for alias in node.names)
            else:
                yield base


def room_of(name: str) -> str:
    parts = name.split(".")[1:]
    return ".".join(parts[:2]) if parts[:1] == ["kernels"] else ".".join(parts[:1])


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


# ---- arrows


def test_every_file_has_a_room() -> None:
    assert {room for room in FILES.values() if room != "__init__"} <= ROOMS.keys()
    assert ROOMS.keys() - set(FILES.values()) <= {
        "data",
        "hf",
        "resume",
        "recipe",
        "demo",
        "cli",
    }, "a room of the core is gone"


def test_imports_point_down() -> None:
    back = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, room in FILES.items()
        if room != "__init__"
        for name in imports(path, parse(path))
        if name.split(".")[0] == "minilora"
        if not (
            room.startswith("kernels.") and room_of(name) == room
        )  # the files of one kernel folder
        if ROOMS.get(room_of(name), 99) >= ROOMS[room]
    ]
    assert not back


def test_kernels_import_nothing_from_minilora_and_nothing_by_its_name() -> None:
    for path, room in FILES.items():
        if room.startswith("kernels."):
            absolute = [
                n
                for node in ast.walk(parse(path))
                if not getattr(node, "level", 0)
                for n in named(node)
            ]
            assert not [n for n in absolute if n.split(".")[0] in ("minilora", "kernels")], path


def named(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def test_files_imports_nothing_of_minilora() -> None:
    path = ROOT / "minilora" / "files.py"
    assert not [n for n in imports(path, parse(path)) if n.startswith("minilora")]


def test_what_is_heavy_or_optional_is_imported_where_it_is_needed() -> None:
    for path, room in FILES.items():
        allowed = EVERYWHERE | sys.stdlib_module_names | OWN.get(room, set())
        module_level = [
            node for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        found = {n.split(".")[0] for node in module_level for n in imports(path, node)}
        assert found <= allowed, path


def test_kernels_is_a_namespace_folder_and_minilora_kernels_a_link_to_it() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "minilora" / "kernels"
    assert (
        link.is_symlink()
        and str(link.readlink()) == "../kernels"
        and link.resolve() == ROOT / "kernels"
    )


# ---- sizes


def code_lines(path: Path) -> int:
    """Lines that hold code: not blank, not a comment alone, not of a docstring."""
    source = path.read_text()
    strings = [
        n
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
    ]
    docs = {
        i
        for n in strings
        if isinstance(n.value.value, str)
        for i in range(n.lineno, n.end_lineno + 1)
    }
    empty = {
        getattr(tokenize, kind)
        for kind in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")
    }
    tokens = [
        t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in empty
    ]
    return len({i for t in tokens for i in range(t.start[0], t.end[0] + 1)} - docs)


def test_the_core_is_small_enough_to_read() -> None:
    sizes = {
        str(path.relative_to(ROOT)): code_lines(path)
        for path, room in FILES.items()
        if room in CORE
    }
    assert len(sizes) >= 12
    assert sum(sizes.values()) < CORE_LINES, sizes


def test_each_fast_twin_is_small_enough_to_read() -> None:
    for twin in TWINS:
        sizes = {
            str(path.relative_to(ROOT)): code_lines(path)
            for path, room in FILES.items()
            if room == twin
        }
        assert len(sizes) >= 4 and sum(sizes.values()) < 700, sizes


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_code_lines_leaves_out_what_is_no_code(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        '"""Two\nlines."""\n\nimport os  # code\n\n# a comment\n\n\ndef f():\n    """One."""\n    return """\ntext"""\n'
    )
    assert code_lines(file) == 4  # import, def, and the two of return


# ---- what is public

SURFACE = {
    "FinetuneConfig": (
        "(model: str, data: str, out: str, r: int = 16, alpha: float | None = None, "
        "targets: str | Sequence[str] = 'all-linear', dropout: float = 0.0, lr: float = 0.0002, steps: int | None = None, "
        "epochs: float = 1.0, batch_size: int = 8, grad_accum: int = 1, max_length: int = 512, weight_decay: float = 0.0, "
        "clip: float = 1.0, quantize: bool = True, learn_prompt: bool = False, eval_fraction: float = 0.05, seed: int = 0, "
        "device: str | None = None, checkpointing: bool | None = None, save_every: int = 100, keep: int = 2, "
        "resume: bool = False) -> None"
    ),
    "LoRALinear": (
        "(base: Linear | NF4Linear, r: int = 8, *, alpha: float | None = None, dropout: float = 0.0, name: str = '', "
        "seed: int = 0) -> None"
    ),
    "NF4Linear": "(weight: NF4Weight, bias: Parameter | None = None, compute_dtype: dtype | None = None) -> None",
    "NF4Weight": (
        "(packed: Tensor, absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None, shape: Size, dtype: dtype, "
        "block_size: int = 64, quant_type: str = 'nf4') -> None"
    ),
    "PagedAdamW": (
        "(params: Any, lr: float = 0.001, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, "
        "weight_decay: float = 0.01, *, page: Literal['on_oom', 'always', 'never'] = 'on_oom') -> None"
    ),
    "adapter_parameters": "(model: Module) -> list[Parameter]",
    "audit": "(model: Module) -> list[str]",
    "dequantize_nf4": "(w: NF4Weight, dtype: dtype | None = None) -> Tensor",
    "disabled": "(model: Module) -> Iterator[None]",
    "eject": "(model: ~Model) -> ~Model",
    "finetune": "(config: FinetuneConfig) -> Result",
    "inject": (
        "(model: ~Model, r: int = 8, *, alpha: float | None = None, targets: Targets = 'all-linear', "
        "exclude: Sequence[str] = ('lm_head',), dropout: float = 0.0, train_also: Sequence[str] = (), "
        "name: str = 'default', seed: int = 0) -> ~Model"
    ),
    "load_adapter": "(model: ~Model, path: str | Path, *, allow_zero: bool = False) -> ~Model",
    "lora_linear": (
        "(x: Tensor, base: Tensor | NF4Weight, A: Tensor, B: Tensor, scale: float, bias: Tensor | None = None, "
        "dropout: float = 0.0) -> Tensor"
    ),
    "merge": "(model: ~Model, *, into: Literal['dense', 'nf4'] = 'dense', min_survival: float = 0.5) -> ~Model",
    "merge_report": "(model: Module) -> MergeReport",
    "nf4_linear": "(x: Tensor, w: NF4Weight, bias: Tensor | None = None) -> Tensor",
    "plan": (
        "(model: Module | Any, r: int = 8, *, alpha: float | None = None, targets: Targets = 'all-linear', "
        "exclude: Sequence[str] = ('lm_head',), train_also: Sequence[str] = (), "
        "quantize: bool | Targets = True, block_size: int = 64, double_quant: bool = True) -> Plan"
    ),
    "quantize": (
        "(model: ~Model, targets: Targets = 'all-linear', *, exclude: Sequence[str] = ('lm_head',), "
        "quant_type: str = 'nf4', block_size: int = 64, double_quant: bool = True, "
        "compute_dtype: dtype | None = None) -> ~Model"
    ),
    "quantize_nf4": "(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight",
    "retry_on_oom": "(step: Callable[[], ~T], optimizer: PagedAdamW) -> ~T",
    "save_adapter": "(model: Module, path: str | Path) -> Path",
}


def signature(name: str) -> str:
    """Without the modules' names, which Python and torch move about."""
    text = re.sub(r"\b(?:[A-Za-z_]\w*\.)+", "", str(inspect.signature(getattr(minilora, name))))
    return text.replace(
        "str | Sequence[str] | Pattern[str] | Callable[[str, Module], bool]", "Targets"
    )


def test_the_public_surface_is_what_it_was() -> None:
    assert list(minilora.__all__) == sorted(minilora.__all__)
    assert {name: signature(name) for name in minilora.__all__} == SURFACE


def test_all_is_all() -> None:
    public = {
        n
        for n, value in vars(minilora).items()
        if not n.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(minilora.__all__)
    assert all(getattr(minilora, name).__doc__ for name in minilora.__all__)
