"""Names of parameters without what wrappers add."""

import pytest

from minilora.files.names import PEFT_PREFIX, canonical_name

WRAPPED = {
    "layers.0.q_proj": "layers.0.q_proj",
    "module.layers.0.q_proj": "layers.0.q_proj",
    "_orig_mod.layers.0.q_proj": "layers.0.q_proj",
    "module._orig_mod.module.layers.0.q_proj": "layers.0.q_proj",
    "_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.q_proj": "layers.0.q_proj",
    PEFT_PREFIX + "module.layers.0.q_proj": "layers.0.q_proj",
    # Only at the start does "module" belong to a wrapper.
    "layers.module.q_proj": "layers.module.q_proj",
    "submodule.q_proj": "submodule.q_proj",
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_name_is_what_it_is_without_wrappers(name: str) -> None:
    assert canonical_name(name) == WRAPPED[name]
    assert canonical_name(canonical_name(name)) == WRAPPED[name]
