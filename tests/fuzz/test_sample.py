"""The first cases of every family. `make fuzz` tries more, `make fuzz FULL=1` all of them."""

import fuzzing
import pytest


@pytest.mark.parametrize("name", fuzzing.family_names())
def test_every_case_ends_well(name: str) -> None:
    module = fuzzing.family(name)
    assert 0 < module.CI <= module.SAMPLE <= module.FULL
    cases = [fuzzing.run_case(name, module, seed) for seed in range(module.CI)]
    assert [case for case in cases if case.wrong] == []
