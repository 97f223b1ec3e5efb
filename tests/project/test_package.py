"""What importing costs, what wheel and sdist hold, one version, and the oldest Python."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import clean_install
import pytest
import sizes

import minilora

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


def test_the_version_is_said_once(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert wheel.name.split("-")[1] == minilora.__version__
    assert sdist.name == f"minilora-{minilora.__version__}.tar.gz"
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert not re.search(r"^version = [\"']", project, re.M)


def test_the_version_is_read_without_importing_torch() -> None:
    """A build environment has setuptools and nothing else."""
    pytest.importorskip("setuptools", "77", reason="setuptools reads pyproject.toml")
    said = python(
        "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']; "
        "import setuptools; setuptools.setup()"
    )
    assert said.split()[-1] == minilora.__version__


def test_the_citation_is_of_this_version_and_names_both_papers() -> None:
    yaml = pytest.importorskip("yaml", reason="CITATION.cff is YAML")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    # What the format requires, in it and in each of its references.
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert all({"type", "title", "authors"} <= work.keys() for work in citation["references"])
    assert (citation["cff-version"], citation["license"]) == ("1.2.0", "Apache-2.0")
    assert citation["version"] == minilora.__version__
    papers = {i["value"] for work in citation["references"] for i in work["identifiers"]}
    assert papers == {"arXiv:2106.09685", "arXiv:2305.14314"}


def python_files() -> list[Path]:
    others = [p for folder in ("docs", "tests") for p in sorted((ROOT / folder).rglob("*.py"))]
    return [*sizes.library_files(), *others]


def test_no_source_has_syntax_that_the_oldest_python_lacks() -> None:
    """ruff and mypy check names for that version; `make package` runs it where there is one."""
    oldest = clean_install.oldest_supported()
    assert len(python_files()) > 150
    for path in python_files():
        ast.parse(path.read_text(), str(path), feature_version=oldest)
    project = (ROOT / "pyproject.toml").read_text()
    assert f'python_version = "{oldest[0]}.{oldest[1]}"' in project
    with pytest.raises(SyntaxError):
        ast.parse("try: ...\nexcept* ValueError: ...", feature_version=oldest)


def test_the_oldest_and_the_newest_python_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = sys.version_info[:2]
    says = {"3.08": (3, 8), "3.10": (3, 10), "3.50": (3, 50), "3.60": (3, 60), "3.99": None}
    for name in says:
        (tmp_path / f"python{name}").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "none"))
    monkeypatch.setattr(
        clean_install, "version_of", lambda path: says[path.name.removeprefix("python")]
    )
    found = [p.name for p in clean_install.interpreters()]
    oldest = ["python3.50"] if here == (3, 10) else ["python3.10"]
    assert found == [Path(sys.executable).name, *oldest, "python3.60"]
    assert clean_install.version_of(tmp_path / "python3.99") is None


def test_a_python_that_does_not_run_is_left_out(tmp_path: Path) -> None:
    broken = tmp_path / "python3.12"
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    assert clean_install.version_of(broken) is None
    assert clean_install.version_of(Path(sys.executable)) == sys.version_info[:2]


def test_a_command_that_fails_ends_the_clean_install_with_what_it_said(tmp_path: Path) -> None:
    code = "import os, sys; print('PYTHONPATH' in os.environ); sys.exit(3)"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setenv("PYTHONPATH", str(ROOT))
        clean_install.run([sys.executable, "-c", code], tmp_path)
    assert "False\n" in str(stopped.value) and "exit status 3" in str(stopped.value)
