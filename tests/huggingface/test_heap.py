"""Freed memory: kept inside `freed_memory_is_kept`, returned after it, and by default."""

import json
import platform
import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason="minilora.huggingface imports it")

from minilora.huggingface import heap

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is set")

# The page faults of a second step that has 200 tensors of 1 MB at once, and what the process holds
# between the steps and at the end, in pages.
MEASURED = """
import contextlib, json, resource, sys
import torch
from minilora.huggingface.heap import freed_memory_is_kept

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(1 << 18) for _ in range(200)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

# Larger blocks than these have come and gone in a process that trains.
del_me = torch.ones(30 << 18)
del del_me
start = held()
with freed_memory_is_kept() if "kept" in sys.argv else contextlib.nullcontext():
    step()
    between = held() - start
    faults = step()
print(json.dumps([faults, between, held() - start]))
"""


def measure(*args: str) -> tuple[int, int, int]:
    command = [sys.executable, "-c", MEASURED, *args]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    faults, between, after = json.loads(done.stdout)
    return faults, between, after


@glibc
def test_the_next_step_has_no_page_faults() -> None:
    pages = 200 * (1 << 20) // 4096
    # Without the block both steps get their pages from the operating system: the test can fail.
    faults, between, _ = measure()
    assert faults > 0.5 * pages and between < 0.5 * pages

    faults, between, after = measure("kept")
    assert faults < 0.01 * pages
    assert between > 0.9 * pages and after < 0.1 * pages


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: pytest.fail("a C library is opened"))
    with heap.freed_memory_is_kept():
        heap.return_freed_memory()


def test_a_c_library_without_these_functions_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    with heap.freed_memory_is_kept():
        heap.return_freed_memory()
