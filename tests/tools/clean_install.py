"""Installs wheel and sdist into clean environments, and runs the README's snippet in each.

    python tests/tools/clean_install.py DIST [PYTHON ...]

DIST is the folder with both. Without a PYTHON: the one that runs this, and the oldest and the
newest other one on this machine. The environment has the package and its dependencies, the snippet
runs in an empty folder, and its loss has to fall. Needs the standard library alone.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# The last loss of the snippet is below this fraction of the first.
FALL = 0.1


VERSIONS = """
import importlib.metadata, platform
print(platform.python_version(), importlib.metadata.version("minilora"))
"""


class Row(NamedTuple):
    """One run of the snippet, a line of the table."""

    python: str
    package: str
    install_s: float
    run_s: float
    first_loss: float
    last_loss: float


def snippet() -> tuple[str, str]:
    """The README's first Python block, and what it prints there."""
    blocks = [(m[1], m[2]) for m in BLOCK.finditer((ROOT / "README.md").read_text())]
    at = [language for language, _ in blocks].index("python")
    assert blocks[at + 1][0] == "text", "the README does not show what its snippet prints"
    return blocks[at][1], blocks[at + 1][1]


def losses(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"loss +(\d+\.\d+)", printed)]


def falls(series: list[float]) -> bool:
    """Whether a loss falls from each value to the next, and far from the first to the last."""
    steadily = all(before > after for before, after in pairwise(series))
    return len(series) > 2 and steadily and series[-1] < FALL * series[0]


def oldest_supported() -> tuple[int, int]:
    found = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert found
    return 3, int(found[1])


def candidates() -> Iterator[Path]:
    """Files that may be a Python of this machine: on the PATH, and those of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    folders = [Path(name) for name in os.get_exec_path()]
    for folder in [*folders, *sorted(pyenv.glob("versions/*/bin"))]:
        yield from sorted(folder.glob("python3.[0-9][0-9]"))


def version_of(python: Path) -> tuple[int, int] | None:
    """Its version; None if it does not run or cannot make an environment."""
    code = "import sys, ensurepip, venv; print(*sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    major, minor = done.stdout.split()
    return int(major), int(minor)


def interpreters() -> list[Path]:
    """This Python, and the oldest and the newest other one that minilora supports."""
    here = sys.version_info[:2]
    others: dict[tuple[int, int], Path] = {}
    for python in candidates():
        version = version_of(python)
        if version and version >= oldest_supported() and version != here:
            others.setdefault(version, python)
    ends = dict.fromkeys([min(others), max(others)]) if others else {}
    return [Path(sys.executable), *(others[version] for version in ends)]


def run(command: list[str | Path], where: Path) -> tuple[str, float]:
    """What a command prints, and its seconds. It sees nothing of the environment of this one."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=where, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        words = " ".join(map(str, command))
        raise SystemExit(f"{words}\n{done.stdout}{done.stderr}\nexit status {done.returncode}")
    return done.stdout, time.perf_counter() - start


def checked(python: Path, dist: Path) -> Iterator[Row]:
    """Installs and runs both packages in one environment, the sdist after the wheel.

    The sdist finds the dependencies there: PyTorch, which is most of the time, is installed once.
    """
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    version = sdist.name.removesuffix(".tar.gz").rpartition("-")[2]
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        run([python, "-m", "venv", where / "env"], where)
        inside = where / "env" / "bin" / "python"
        pip: list[str | Path] = [inside, "-m", "pip", "-q", "--disable-pip-version-check"]
        for kind, package, options in (("wheel", wheel, []), ("sdist", sdist, ["--no-deps"])):
            install = [*pip, "install", "--no-compile", *options, package.resolve()]
            _, install_s = run(install, where)
            run([*pip, "check"], where)
            printed, _ = run([inside, "-I", "-c", VERSIONS], where)
            number, installed = printed.split()
            if installed != version:
                raise SystemExit(f"{package.name} says that it is version {installed}")

            empty = where / kind
            empty.mkdir()
            (where / "snippet.py").write_text(snippet()[0])
            printed, run_s = run([inside, "-I", where / "snippet.py"], empty)
            series = losses(printed)
            if not falls(series):
                raise SystemExit(f"Python {number}, {package.name}: no falling loss\n{printed}")
            yield Row(number, kind, install_s, run_s, series[0], series[-1])
            run([*pip, "uninstall", "-y", "minilora"], where)


def main(dist: Path, *pythons: Path) -> None:
    print("| python | package | install, s | snippet, s | first loss | last loss |")
    print("|---|---|---|---|---|---|")
    for python in pythons or interpreters():
        for row in checked(python, dist):
            print(
                f"| {row.python} | {row.package} | {row.install_s:.0f} | {row.run_s:.0f} "
                f"| {row.first_loss:.4f} | {row.last_loss:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(Path, sys.argv[2:]))
