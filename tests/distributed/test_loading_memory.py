"""How much memory each of four processes needs while it loads a model in shards."""

import pytest
from bench_scripts import load


@pytest.mark.soak
def test_four_processes_need_half_the_memory_each_while_they_load() -> None:
    pytest.importorskip("transformers", reason="the model is a transformers Llama")
    one, four = load("distributed").loading_results()
    assert four["bytes"] <= 0.3 * one["bytes"]
    assert four["peak"] <= 0.5 * one["peak"]
