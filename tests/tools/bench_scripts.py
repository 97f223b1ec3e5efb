"""Imports a script of tests/bench, which stand beside each other and are no package."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "tests" / "bench"


def load(name: str) -> ModuleType:
    """Returns the script of this name as a module."""
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCH))
