"""What importing costs, and what wheel and sdist hold."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = ["numba", "triton", "transformers", "matplotlib", "typer", "tqdm"]


def test_import_works_without_the_heavy_and_the_optional() -> None:
    dense = (
        "m = minilora.inject(torch.nn.Sequential(torch.nn.Linear(8, 8)), r=2); "
        "m(torch.ones(1, 8)).sum().backward()"
    )
    gone = f"import sys; sys.modules.update(dict.fromkeys({HEAVY}))"
    assert python(f"{gone}; import torch, minilora; {dense}; print(minilora.audit(m))") == "[]\n"


def test_import_pulls_in_nothing_heavy_beyond_torch() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); "
        "import minilora; print(*set(sys.modules) - before)"
    )
    new = {name.partition(".")[0] for name in python(code).split()}
    assert "minilora" in new
    assert not new & set(HEAVY)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist, built from a copy of the tree, which stays as it is."""
    pytest.importorskip(
        "build", reason="the package 'build' makes wheel and sdist: pip install -e .[dev]"
    )
    tree, out = tmp_path_factory.mktemp("tree") / "minilora", tmp_path_factory.mktemp("dist")
    leave = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "site"
    )
    shutil.copytree(ROOT, tree, symlinks=True, ignore=leave)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def sources() -> set[str]:
    """Every source file by its name in the tree; minilora/kernels is a link and is not walked."""
    found = {p for folder in ("minilora", "kernels") for p in (ROOT / folder).rglob("*.py")}
    data = {"minilora/py.typed", "kernels/gpu/choices.json"}
    return {
        n
        for n in (str(p.relative_to(ROOT)) for p in found)
        if not n.startswith("minilora/kernels/")
    } | data


def test_the_wheel_holds_every_source_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert {n for n in names if ".dist-info/" not in n} == {
        re.sub("^kernels/", "minilora/kernels/", n) for n in sources()
    }
    assert {
        "minilora/kernels/reference/nf4.py",
        "minilora/kernels/cpu/nf4.py",
        "minilora/py.typed",
    } <= names
    assert not [n for n in names if "tests" in n or "__pycache__" in n]
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_the_sdist_holds_every_source_once(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {n.partition("/")[2] for n in file.getnames()}
    assert sources() | {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [n for n in names if n.startswith("minilora/kernels/") or "__pycache__" in n]


def test_an_unpacked_wheel_works(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch, minilora; "
        f"assert minilora.__file__.startswith({str(tmp_path)!r}); "
        "print(minilora.quantize_nf4(torch.ones(3, 5)).dequantize().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.stdout == "15.0\n", done.stderr
