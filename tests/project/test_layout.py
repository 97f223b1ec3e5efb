"""Which file may import which, how large the core and a page may be, and what is public."""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import nbformat
import pytest
import sizes
from layout import (
    CORE,
    CPU,
    FILES,
    FRONT,
    GPU,
    IMPORT_ORDER,
    KERNELS,
    SUBPACKAGES,
    forbidden,
    imports,
)

import minilora

ROOT = sizes.ROOT

CORE_LINES, CORE_CODE_LINES = 2960, 1710

# Of one fast backend; the CPU's has ways of its own for few rows of x, for many, and for thin
# products, the GPU's a table of choices per generation and what was tuned.
TWIN_CODE_LINES = {"cpu": 1880, "gpu": 1200}

LONGEST_FILE = 400
TOKENS_PER_LINE = 18

EVERYWHERE = {"torch", "numpy", "safetensors", "minilora"}
OPTIONAL_HERE = {CPU: {"numba", "llvmlite"}, GPU: {"triton"}, "cli": {"typer"}}

# Their classes are subclasses of transformers'; `minilora.NF4Config` imports them on first use.
NEED_TRANSFORMERS = {"quantization_config.py", "quantizer.py"}


def test_the_core_is_exactly_these_files() -> None:
    found = {path.stem for path in (ROOT / "minilora").glob("*.py")}
    assert found - set(FRONT) == set(CORE)
    assert set(IMPORT_ORDER) == set(CORE)


def test_every_folder_is_a_known_subpackage() -> None:
    folders = {path.parent.name for path in (ROOT / "minilora").glob("*/__init__.py")}
    assert folders == set(SUBPACKAGES)


def test_imports_go_one_way() -> None:
    wrong = {
        str(path.relative_to(ROOT)): names
        for path, unit in FILES.items()
        if (names := forbidden(path, unit, path.read_text()))
    }
    assert not wrong


@pytest.mark.parametrize(
    ("unit", "source", "found"),
    [
        ("surgery", "from minilora.files import save_adapter", ["minilora.files"]),
        ("surgery", "import minilora", ["minilora"]),
        ("surgery", "def f():\n    from minilora.merging import merge", ["minilora.merging"]),
        ("surgery", "from minilora.layers import NF4Linear", []),
        ("lora", "from minilora import ops", ["minilora.ops"]),
        ("functional", "from minilora import ops, inject", ["minilora.inject"]),
        ("layers", "if TYPE_CHECKING:\n    from minilora.merging import merge", []),
        ("optim", "from minilora.nf4 import NF4Weight", ["minilora.nf4"]),
        ("optim", "from minilora.optim.paging import Page", []),
        ("files", "from minilora.training import finetune", ["minilora.training"]),
        ("reports", "from minilora.merging import dense_weight, survival", []),
        ("training", "from minilora.demo.run import run", ["minilora.demo.run"]),
        ("cli", "import minilora.demo.run", []),
    ],
)
def test_a_wrong_import_is_seen(unit: str, source: str, found: list[str]) -> None:
    assert forbidden(ROOT / "minilora" / "x.py", unit, source) == found


def test_a_wrong_import_between_kernels_is_seen() -> None:
    path = ROOT / "kernels" / "cpu" / "x.py"
    assert forbidden(path, CPU, "from ..gpu import nf4") == ["minilora.kernels.gpu.nf4"]
    assert forbidden(path, CPU, "from ..reference import nf4\nfrom .runtime import jit") == []


def test_kernels_import_nothing_by_the_name_of_minilora() -> None:
    for path, unit in FILES.items():
        if unit in KERNELS:
            nodes = list(ast.walk(ast.parse(path.read_text())))
            named = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
            named |= {
                n.module or "" for n in nodes if isinstance(n, ast.ImportFrom) and not n.level
            }
            assert not {n for n in named if n.split(".")[0] in ("minilora", "kernels")}, path


def test_lora_needs_nothing_but_pytorch_and_the_standard_library() -> None:
    path = ROOT / "minilora" / "lora.py"
    found = {name.split(".")[0] for name in imports(path, ast.parse(path.read_text()))}
    assert found <= {"torch", *sys.stdlib_module_names}


def test_heavy_and_optional_libraries_are_imported_where_they_are_needed() -> None:
    for path, unit in FILES.items():
        known = EVERYWHERE | sys.stdlib_module_names | OPTIONAL_HERE.get(unit, set())
        if unit == "huggingface" and path.name in NEED_TRANSFORMERS:
            known |= {"transformers"}
        assert imported_at_the_top(path, path.read_text()) <= known, path


def imported_at_the_top(path: Path, source: str) -> set[str]:
    """The libraries that importing this file imports: those outside its functions."""
    body = [n for n in ast.parse(source).body if isinstance(n, ast.Import | ast.ImportFrom)]
    return {name.split(".")[0] for node in body for name in imports(path, node)}


def test_a_heavy_import_is_seen_at_the_top_only() -> None:
    path = ROOT / "minilora" / "x.py"
    assert imported_at_the_top(path, "import transformers") == {"transformers"}
    assert imported_at_the_top(path, "def f():\n    import transformers") == set()


def test_kernels_is_a_namespace_folder_and_minilora_kernels_a_link_to_it() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "minilora" / "kernels"
    assert link.is_symlink() and str(link.readlink()) == "../kernels"
    assert link.resolve() == ROOT / "kernels"


# Sizes


def test_the_core_is_small_enough_to_read() -> None:
    files = sizes.core_files()
    assert {p.stem for p in files if p.parent.name == "minilora"} == set(CORE)
    assert len(files) >= len(CORE) + 4, "kernels/reference counts too"
    assert sum(map(sizes.lines, files)) <= CORE_LINES
    assert sum(map(sizes.code_lines, files)) <= CORE_CODE_LINES


@pytest.mark.parametrize("twin", [CPU, GPU])
def test_the_fast_kernels_are_small_enough_to_read(twin: str) -> None:
    files = [p for p, unit in FILES.items() if unit == twin and p.stem not in sizes.STEP]
    counts = {p.name: sizes.code_lines(p) for p in files}
    assert len(counts) >= 4
    limit = TWIN_CODE_LINES[twin.rpartition(".")[2]]
    assert sum(counts.values()) < limit, counts


def test_no_file_is_long() -> None:
    assert {str(p.relative_to(ROOT)) for p in FILES if sizes.lines(p) > LONGEST_FILE} == set()


def test_no_line_is_wide() -> None:
    assert sizes.wide_lines(FILES) == []


@pytest.mark.parametrize("folder", ["minilora", "kernels/cpu", "kernels/reference"])
def test_no_page_is_dense(folder: str) -> None:
    files = [path for path in FILES if path.is_relative_to(ROOT / folder)]
    assert len(files) >= 4
    assert sizes.tokens_per_line(files) <= TOKENS_PER_LINE


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that `sizes` takes for one of the repository."""
    monkeypatch.setattr(sizes, "ROOT", tmp_path)
    return tmp_path / "x.py"


MADE_UP = '''"""Two
lines."""

import os  # code

# a comment


def f():
    """One."""
    return """
text"""
'''


def test_code_lines_leave_out_what_is_no_code(page: Path) -> None:
    page.write_text(MADE_UP)
    assert sizes.lines(page) == 12
    assert sizes.code_lines(page) == 4, "import, def, and the two lines of return"


def test_wide_lines_are_those_over_100_columns(page: Path) -> None:
    page.write_text(f"{'a' * 100}\n{'b' * 101}\n# {'ä' * 99}\n")
    assert sizes.wide_lines([page]) == ["x.py:2", "x.py:3"]


def test_tokens_per_line_is_a_percentile_over_lines_of_code(page: Path) -> None:
    # Nine lines of three tokens, one of nine; comments, docstrings and blank lines do not count.
    page.write_text('"""A docstring."""\n\n' + "a = 1\n" * 9 + "b = [1, 2, 3]\n# a, b, c, d, e\n")
    assert sizes.tokens_per_line([page]) == 3
    assert sizes.tokens_per_line([page], share=1.0) == 9


# Words and names

PRIVATE = re.compile(
    r"\b(desks?|lanes?|pieces?|keepers?|rooms?|gone round|mend(s|ed|ing)?)\b", re.IGNORECASE
)

# True uses: the lanes of a SIMD register, of a warp, and of a PCIe link.
TRUE_USES = {
    "kernels/cpu/avx512.py": {"lane", "lanes"},
    "kernels/cpu/vectors.py": {"lane", "lanes"},
    "kernels/gpu/permute.py": {"lane"},
    "kernels/gpu/skinny.py": {"lane"},
    "notebooks/6-when-memory-runs-out.ipynb": {"lane", "lanes"},
}


def private_words(name: str, text: str) -> list[str]:
    """`file:line: word` of every private word in a text, true uses left out."""
    return [
        f"{name}:{number}: {word[0]}"
        for number, line in enumerate(text.splitlines(), start=1)
        for word in PRIVATE.finditer(line)
        if word[0].lower() not in TRUE_USES.get(name, set())
    ]


def texts() -> Iterator[tuple[str, str]]:
    """Library, documentation and notebooks: name and text, a notebook's without its outputs."""
    docs = ROOT / "docs"
    pages = [*ROOT.glob("*.md"), *ROOT.glob("kernels/*.md")]
    for suffix in ("md", "py", "css", "js", "svg"):
        pages += docs.rglob(f"*.{suffix}")
    for path in [*FILES, *pages]:
        yield path.relative_to(ROOT).as_posix(), path.read_text()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        yield path.relative_to(ROOT).as_posix(), "\n".join(cell.source for cell in cells)


def test_no_private_words() -> None:
    assert [found for name, text in texts() for found in private_words(name, text)] == []


def test_true_uses_are_used() -> None:
    read = dict(texts())
    unused = [
        f"{name}: {word}"
        for name, words in TRUE_USES.items()
        for word in words
        if name in read and not re.search(rf"\b{word}\b", read[name], re.IGNORECASE)
    ]
    assert not unused


def test_a_private_word_is_seen() -> None:
    assert private_words("x.md", "A Room.\nNo classroom, no amends.") == ["x.md:1: Room"]
    assert private_words("x.md", "the layer was gone round") == ["x.md:1: gone round"]
    assert private_words("kernels/gpu/skinny.py", "lane 4 of a piece") == [
        "kernels/gpu/skinny.py:1: piece"
    ]


BANNER = re.compile(r"^\s*# ?[-=#]{3,}", re.MULTILINE)


def test_no_file_has_banners() -> None:
    assert BANNER.search("# ---- sizes\n") and not BANNER.search("# a - b\n")
    assert [str(path.relative_to(ROOT)) for path in FILES if BANNER.search(path.read_text())] == []


def test_the_names_of_adapter_matrices_stay_with_the_adapter_and_its_files() -> None:
    owners = (ROOT / "minilora" / "lora.py", ROOT / "minilora" / "files")
    others = [p for p in FILES if not any(p.is_relative_to(owner) for owner in owners)]
    assert [str(p.relative_to(ROOT)) for p in others if re.search("lora_[AB]", p.read_text())] == []


def test_the_scaling_is_computed_in_the_adapter_alone() -> None:
    owner = ROOT / "minilora" / "lora.py"
    found = {p for p in FILES if p != owner and computes_scaling(p.read_text())}
    assert {str(p.relative_to(ROOT)) for p in found} == set()


def computes_scaling(source: str) -> bool:
    """Whether code, and not a docstring or a comment, divides an alpha by an r."""
    quotients = [
        (ast.unparse(node.left).split(".")[-1], ast.unparse(node.right).split(".")[-1])
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
    ]
    return any(
        left.endswith("alpha") and right in ("r", "rank", "lora_r") for left, right in quotients
    )


def test_a_scaling_computed_elsewhere_is_seen() -> None:
    assert computes_scaling("s = self.alpha / layer.r")
    assert computes_scaling("s = lora_alpha / r")
    assert not computes_scaling('"""s = alpha / r."""\nt = alpha / 2')


# What is public

SURFACE = {
    "FinetuneConfig": (
        "(model: str, data: str, out: str, r: int = 16, alpha: float | None = None, "
        "targets: str | Sequence[str] = 'all-linear', dropout: float = 0.0, lr: float = 0.0002, "
        "steps: int | None = None, epochs: float = 1.0, batch_size: int = 8, grad_accum: int = 1, "
        "max_length: int = 512, packing: bool = False, "
        "group_by_length: bool = False, weight_decay: float = 0.0, clip: float = 1.0, "
        "quantize: bool | None = None, learn_prompt: bool = False, eval_fraction: float = 0.05, "
        "eval_data: str | None = None, eval_every: int = 0, samples: int = 3, "
        "seed: int = 0, device: str | None = None, checkpointing: bool | None = None, "
        "log_every: int | None = None, save_every: int = 100, keep: int = 2, "
        "resume: bool = False, overwrite: bool = False, trust_remote_code: bool = False, "
        "shard: bool = False, timeout: float = 20.0) -> None"
    ),
    "LoRA": (
        "(in_features: int, out_features: int, r: int = 8, *, alpha: float | None = None, "
        "dropout: float = 0.0, bias: bool = False, seed: int = 0, layer_name: str = '', "
        "device: device | str = 'cpu') -> None"
    ),
    "NF4Config": (
        "(targets: Targets = 'all-linear', *, exclude: Targets = (), quant_type: str = 'nf4', "
        "block_size: int = 64, double_quant: bool = True, "
        "compute_dtype: dtype | str | None = None, strict: bool = False) -> None"
    ),
    "LoRALinear": "(base: Module, r: int = 8, **options: Any) -> None",
    "NF4Linear": (
        "(weight: NF4Weight, bias: Parameter | None = None, "
        "compute_dtype: dtype | None = None) -> None"
    ),
    "NF4Weight": (
        "(packed: Tensor, absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None, "
        "shape: Size, dtype: dtype, block_size: int = 64, quant_type: str = 'nf4') -> None"
    ),
    "PagedAdamW": (
        "(params: Any, lr: float = 0.001, betas: tuple[float, float] = (0.9, 0.999), "
        "eps: float = 1e-08, weight_decay: float = 0.01, *, "
        "page: Literal['on_oom', 'always', 'never'] = 'on_oom', "
        "state_dtype: dtype | None = None) -> None"
    ),
    "QLoRALinear": "(base: Module, r: int = 8, **options: Any) -> None",
    "adapter_parameters": "(model: Module, name: str | None = None) -> list[Parameter]",
    "audit": "(model: Module) -> list[str]",
    "dequantize_nf4": "(w: NF4Weight, dtype: dtype | None = None) -> Tensor",
    "disabled": "(model: Module) -> Iterator[None]",
    "eject": "(model: ~Model, name: str | None = None) -> ~Model",
    "finetune": "(config: FinetuneConfig) -> Result",
    "inject": (
        "(model: ~Model, r: int = 8, *, alpha: float | None = None, "
        "targets: Targets = 'all-linear', exclude: Targets = (), dropout: float = 0.0, "
        "rank_pattern: Mapping[Pattern, int] | None = None, "
        "alpha_pattern: Mapping[Pattern, float] | None = None, "
        "layers_to_transform: int | Sequence[int] | None = None, lora_bias: bool = False, "
        "train_also: Sequence[str] = (), name: str = 'default', seed: int = 0, "
        "adapter: type[LoRA] = LoRA, strict: bool = False) -> ~Model"
    ),
    "linear_cross_entropy": (
        "(hidden: Tensor, weight: Tensor | NF4Weight | Module, labels: Tensor, *, "
        "bias: Tensor | None = None, ignore_index: int = -100, reduction: str = 'mean', "
        "scale: float = 1.0, softcap: float | None = None, chunk: int | None = None) -> Tensor"
    ),
    "load": (
        "(path_or_id: str | Path, *, quantization_config: Any = None, dtype: dtype | None = None, "
        "compute_dtype: dtype | None = None, device: device | str | None = None, "
        "trust_remote_code: bool = False) -> tuple[Module, Any]"
    ),
    "load_adapter": (
        "(model: ~Model, path: str | Path, name: str | None = None, *, "
        "allow_zero: bool = False, adapter: type[LoRA] = LoRA, other_base: bool = False) -> ~Model"
    ),
    "lora_linear": (
        "(x: Tensor, base: Tensor | NF4Weight, A: Tensor, B: Tensor, scale: float, "
        "bias: Tensor | None = None, dropout: float = 0.0, *, training: bool = False) -> Tensor"
    ),
    "merge": (
        "(model: ~Model, *, into: Literal['dense', 'nf4'] = 'dense', "
        "min_survival: float = 0.5) -> ~Model"
    ),
    "merge_report": "(model: Module) -> MergeReport",
    "nf4_linear": (
        "(x: Tensor, w: NF4Weight, bias: Tensor | None = None, *, training: bool = False) -> Tensor"
    ),
    "plan": (
        "(model: Module | Any, r: int = 8, *, alpha: float | None = None, "
        "targets: Targets = 'all-linear', exclude: Targets = (), "
        "rank_pattern: Mapping[Pattern, int] | None = None, "
        "alpha_pattern: Mapping[Pattern, float] | None = None, "
        "layers_to_transform: int | Sequence[int] | None = None, lora_bias: bool = False, "
        "train_also: Sequence[str] = (), quantize: bool | Targets = True, block_size: int = 64, "
        "double_quant: bool = True, strict: bool = False, "
        "trust_remote_code: bool = False, batch_size: int | None = None, "
        "length: int | None = None, checkpointing: bool | None = None, dropout: float = 0.0, "
        "grad_accum: int = 1, paged_optimizer: bool = False, efficient: bool = True) -> Plan"
    ),
    "quantize": (
        "(model: ~Model, targets: Targets = 'all-linear', *, "
        "exclude: Targets = (), quant_type: str = 'nf4', block_size: int = 64, "
        "double_quant: bool = True, compute_dtype: dtype | None = None, "
        "strict: bool = False) -> ~Model"
    ),
    "quantize_nf4": (
        "(weight: Tensor, block_size: int = 64, double_quant: bool = True, "
        "quant_type: str = 'nf4') -> NF4Weight"
    ),
    "retry_on_oom": "(step: Callable[[], ~T], optimizer: PagedAdamW) -> ~T",
    "save_adapter": "(model: Module, path: str | Path, name: str | None = None) -> Path",
    "save_quantized": (
        "(model: Module, path: str | Path, *, max_shard_size: int | str = '5GB') -> Path"
    ),
    "use": "(model: ~Model, *names: str) -> ~Model",
}


ALIASES = {
    "Targets": "str | Sequence[str] | Pattern[str] | Callable[[str, Module], bool]",
    "Mapping[Pattern, ": "Mapping[str | Pattern[str], ",
}


def signature(name: str) -> str:
    """Without the modules' names, which Python and torch move about."""
    text = str(inspect.signature(getattr(minilora, name)))
    text = re.sub(r"\b(?:[A-Za-z_]\w*\.)+", "", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    for alias, means in ALIASES.items():
        text = text.replace(means, alias)
    return text


@pytest.mark.parametrize("name", sorted({*SURFACE, *minilora.__all__}))
def test_the_public_surface_is_what_it_was(name: str) -> None:
    assert name in minilora.__all__ and name in SURFACE
    assert signature(name) == SURFACE[name]


def test_all_is_sorted_documented_and_complete() -> None:
    assert list(minilora.__all__) == sorted(minilora.__all__)
    assert all(getattr(minilora, name).__doc__ for name in minilora.__all__)
    public = {
        name
        for name, value in vars(minilora).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    # TYPE_CHECKING and what the façade itself imports are no names of the library.
    assert public - {"TYPE_CHECKING", "Any"} == set(minilora.__all__)


def test_lazy_names_resolve() -> None:
    for name, subpackage in minilora._SUBPACKAGE.items():
        assert name in minilora.__all__
        module = importlib.import_module(f"minilora.{subpackage}")
        assert getattr(minilora, name) is getattr(module, name)


def test_an_editor_sees_the_lazy_names_where_they_are_imported_from() -> None:
    source = (ROOT / "minilora" / "__init__.py").read_text()
    blocks = [n for n in ast.parse(source).body if isinstance(n, ast.If)]
    shown = {
        alias.name: (node.module or "").removeprefix("minilora.")
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown == minilora._SUBPACKAGE


def test_no_public_function_shares_its_name_with_a_module() -> None:
    assert clashes(minilora.__all__, {*CORE, *SUBPACKAGES, *FRONT}) == []
    assert clashes(["merge", "plan"], {"plan"}) == ["plan"]


def clashes(public: Iterable[str], modules: set[str]) -> list[str]:
    return [name for name in public if name in modules]
