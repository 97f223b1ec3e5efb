"""torchrun looks ahead: it reads the options of the program that it starts."""

import pytest
import typer
from torch.distributed.run import get_args_parser

from minilora.cli import app

COMMAND = ["--nproc-per-node", "2", "-m", "minilora", "finetune"]


def options() -> list[str]:
    finetune = typer.main.get_command(app).commands["finetune"]  # type: ignore[attr-defined]
    return [name for option in finetune.params for name in (*option.opts, *option.secondary_opts)]


def test_every_setting_has_a_name_that_torchrun_leaves_alone() -> None:
    names = options()
    assert {"--r", "--rank", "--lr", "--no-quantize", "--shard", "--timeout"} <= set(names)
    for name in names:
        if name != "--r":
            parsed = get_args_parser().parse_args([*COMMAND, name, "4"])
            assert parsed.training_script_args == ["finetune", name, "4"], name
            assert parsed.nproc_per_node == "2" and parsed.module, name


def test_the_short_name_of_the_rank_is_ambiguous_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        get_args_parser().parse_args([*COMMAND, "--r", "4"])
    assert "ambiguous option: --r" in capsys.readouterr().err
