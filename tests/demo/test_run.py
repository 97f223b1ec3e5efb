"""Two steps of the demo with the real model."""

import json
from pathlib import Path

import pytest
from embedded import needs_data, needs_model

from minilora.demo import run
from minilora.demo.sheets import read_sheets


@needs_data
@needs_model
def test_two_steps_of_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [c for i, c in enumerate(read_sheets()) if i % 12 == 0]
    monkeypatch.setattr(run, "read_sheets", lambda: few)
    report = run.run_demo(str(tmp_path), steps=2)

    # The adapter from its file gives the trained model's logits, bit for bit.
    assert report.reload_error == 0.0

    # What the four bits cost; two steps do not yet win it back.
    assert report.base_loss < report.nf4_loss

    # Merging rounds to bfloat16: at most 2^-8 of a weight.
    assert abs(report.merged_loss - report.tuned_loss) < 0.05

    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 16
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert str(report) in (tmp_path / "report.md").read_text()
    assert str(report) in capsys.readouterr().out
