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
from bench_scripts import BENCH, load

import minilora

pytest.importorskip("triton", reason="the benchmark times Triton kernels")

SCRIPT = BENCH / "gpu.py"
TILE = {"path": "tile", "BM": 16, "BO": 64, "BI": 64, "warps": 4, "stages": 3}


class FakeClock:
    """Calls every side once, and says that the later it was named the longer it took."""

    def microseconds(self, sides: dict[str, Any]) -> dict[str, float]:
        for call in sides.values():
            call()
        return {name: 10.0 + i for i, name in enumerate(sides)}


class Last(FakeClock):
    """The last that is tried wins."""

    def microseconds(self, sides: dict[str, Any]) -> dict[str, float]:
        return {name: 99.0 - i for i, name in enumerate(sides)}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    checks, cases, _ = (load(f"gpu_{name}") for name in ("checks", "cases", "tune"))
    # Not by its name, which is that of a file in tests/tools as well.
    specification = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    small = {
        "SHAPES": ((96, 128),),
        "ROWS": (1, 17),
        "Clock": FakeClock,
        "clock": FakeClock,
        "limits": lambda clock: (3e12, 8e14),
    }
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(checks, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no card")
    # bitsandbytes multiplies on a card only.
    for each in (module, checks, cases):
        monkeypatch.setattr(each, "bitsandbytes", lambda: None)
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
    right = minilora.nf4_linear
    monkeypatch.setattr(minilora, "nf4_linear", lambda x, w: right(x, w) * 1.1)
    message = "forward M=1: the result is wrong, so it is not timed"
    with pytest.raises(bench.WrongResultError, match=message):
        bench.check_everything()


def test_a_wrong_result_ends_the_script(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> None:
        raise bench.WrongResultError("forward M=1: the result is wrong, so it is not timed")

    monkeypatch.setattr(bench, "check_everything", wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="forward M=1: the result is wrong"):
        bench.main()


def test_tuning_stores_the_fastest_line_for_each_number_of_rows(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu  # noqa: F401 - interprets the kernels

    from minilora.kernels.gpu import choose, tuned

    package = choose.TABLE.read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checks, tune = load("gpu_checks"), load("gpu_tune")
    monkeypatch.setattr(tune, "TILES", [TILE])
    monkeypatch.setattr(checks.choose, "lines", lambda direction, of: [])
    monkeypatch.setattr(bench, "clock", Last)

    # The last that is tried wins: the tile.
    bench.tune([(64, 128)], short=False)
    found = tuned.load("no card")
    assert found is not None
    expected = [{"rows": 17} | TILE, {"path": "dense"}]
    assert found[64, 128] == {"forward": expected, "backward": expected}

    # The first that is tried wins: dense. Another shape's table stays.
    monkeypatch.setattr(bench, "clock", FakeClock)
    bench.tune([(64, 64)], short=False)
    again = tuned.load("no card")
    assert again is not None and again[64, 128] == found[64, 128]
    assert again[64, 64] == {"forward": [choose.DENSE], "backward": [choose.DENSE]}

    # Nothing was written into the package.
    assert choose.TABLE.read_bytes() == package
    assert tuned.file_of("no card").parent.parent == tmp_path


def test_the_tiles_of_a_short_tune_are_those_of_the_table(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks, tune = load("gpu_checks"), load("gpu_tune")
    w, _ = checks.packed_weight(128, 128)
    monkeypatch.setattr(checks.choose, "lines", lambda direction, of: [{"rows": 9} | TILE])
    named = [checks.name_of(line) for line in checks.paths("forward", 1, w)]
    assert named == ["dense", "skinny", "tile 16x64x64, 4 warps, 3 stages"]
    assert len(checks.paths("forward", 1, w, tune.TILES)) > len(named)
    assert not any(line["path"] == "skinny" for line in checks.paths("forward", 2048, w))
    assert not any(line["path"] == "skinny" for line in checks.paths("backward", 1, w))


@pytest.mark.parametrize("text", ["4096", "4096x", "0x64", "axb", "1x2x3", "-1x64"])
def test_a_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="OUTxIN"):
        load("gpu_tune").shape_of(text)
    assert load("gpu_tune").shape_of("11008X4096") == (11008, 4096)
