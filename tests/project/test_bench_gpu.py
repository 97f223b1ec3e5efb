"""The GPU benchmark's own code, without a GPU: it says so.

With a clock that does not measure, it checks, prints and tunes.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the benchmark times Triton kernels")

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu.py"


class FakeClock:
    """Calls every side once, and says that the later it was named the longer it took."""

    def microseconds(self, sides: dict[str, Any]) -> dict[str, float]:
        for call in sides.values():
            call()
        return {name: 10.0 + i for i, name in enumerate(sides)}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    specification = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    small = {
        "DEVICE": "cpu",
        "SHAPES": ((96, 128),),
        "ROWS": (1, 17),
        "Clock": FakeClock,
        "limits": lambda clock: (3e12, 8e14),
    }
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no card")
    # bitsandbytes multiplies on a card only.
    monkeypatch.setattr(module, "bitsandbytes", lambda: None)
    return module


def test_without_a_gpu_it_says_so_and_succeeds() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "no GPU here: nothing was measured\n")


def test_it_checks_and_prints_one_table(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.check_everything()
    bench.report(tmp_path / "bench.json")
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| 96 x 128 |")
    ]
    assert len(lines) == 2 + 3 * 2 and all(line.count("|") == 9 for line in lines)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["card"] == "no card" and len(written["rows"]) == len(lines)
    assert written["rows"][2]["microseconds"] == {
        "minilora": 10.0,
        "cuBLAS": 11.0,
        "dequantize + cuBLAS": 12.0,
    }


def test_a_wrong_result_is_not_timed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.minilora.nf4_linear
    monkeypatch.setattr(bench.minilora, "nf4_linear", lambda x, w: right(x, w) * 1.1)
    with pytest.raises(SystemExit, match="forward M=1: the result is wrong, so it is not timed"):
        bench.check_everything()


def test_tuning_writes_the_fastest_line_for_each_number_of_rows(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu  # noqa: F401 - interprets the kernels

    from minilora.kernels.gpu import choose

    table = tmp_path / "choices.json"
    table.write_text(choose.TABLE.read_text())
    monkeypatch.setattr(choose, "TABLE", table)
    tile = {"path": "tile", "BM": 16, "BO": 64, "BI": 64, "warps": 4, "stages": 3}
    monkeypatch.setattr(bench, "TILES", [tile])
    monkeypatch.setattr(bench, "TUNED", (64, 128))

    class Last(FakeClock):
        """The last that is tried wins: the tile."""

        def microseconds(self, sides: dict[str, Any]) -> dict[str, float]:
            return {name: 99.0 - i for i, name in enumerate(sides)}

    monkeypatch.setattr(bench, "Clock", Last)
    bench.tune()
    written = json.loads(table.read_text())
    assert written["forward"] == [{"rows": 17} | tile, {"path": "dense"}] == written["backward"]
    assert written["measured on"].startswith("no card")

    # The first that is tried wins: dense.
    monkeypatch.setattr(bench, "Clock", FakeClock)
    bench.tune()
    assert json.loads(table.read_text())["forward"] == [{"path": "dense"}]
