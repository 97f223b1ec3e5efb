"""The folder of a run: what it contains already, and what a run may replace.

| what OUT contains | the last run | a new run | --resume |
|---|---|---|---|
| checkpoints | is unfinished | only with --overwrite | goes on |
| an adapter, no checkpoints | is finished | only with --overwrite | has nothing to resume |
| neither, but metrics.jsonl | ended before its first checkpoint | starts | as above |

Nothing is removed but these files, config.json, report.md, loss.png, a model in base-4bit/, and
what runs have written to tensorboard/. A config.json that is not a run's, as in the folder of a
model, is never replaced.

The adapter is written before the report, so that no error in the report can lose it, and the
checkpoints are removed last. A run that ended in between is unfinished if it has checkpoints:
--resume repeats the steps after the last one and writes the report. Without checkpoints it is
finished, and has no report.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.files.adapter_folder import WEIGHTS
from minilora.files.atomic import write_text
from minilora.files.json_file import read_json
from minilora.files.peft_config import CONFIG as ADAPTER_CONFIG
from minilora.training.checkpoints import (
    FOLDER,
    discard,
    list_checkpoints,
    remove_checkpoints,
    sweep,
)
from minilora.training.report import PICTURE, REPORT
from minilora.training.run_state import METRICS
from minilora.training.tensorboard import TENSORBOARD, remove_events

CONFIG = "config.json"

# By which a run's config is told from a model's.
_OPTIONS = {"model", "data", "out"}


def check_folder(out: Path) -> None:
    """Raises ValueError if no run can keep its checkpoints and its events in this folder."""
    for folder in (out / FOLDER, out / TENSORBOARD):
        if folder.is_symlink():
            raise ValueError(
                f"{folder} is a symbolic link, and runs remove their files from it: make {out} the "
                "link, or remove this one"
            )
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder: move it, or choose another output folder")


def check_new(out: Path, overwrite: bool) -> None:
    """Raises ValueError if a new run would replace what it may not: see the table above."""
    config = out / CONFIG
    if config.exists() and not _is_of_a_run(config):
        raise ValueError(
            f"{config} is not the config of a run and would be replaced: choose another output "
            "folder, or move the file"
        )
    if overwrite:
        return
    if list_checkpoints(out):
        raise ValueError(
            f"{out} contains the checkpoints of an unfinished run: resume it (--resume, "
            "resume=True), or start over with --overwrite (overwrite=True)"
        )
    kept = [WEIGHTS] if config.exists() else [WEIGHTS, METRICS, REPORT, PICTURE]
    if found := [name for name in kept if (out / name).exists()]:
        raise ValueError(
            f"{out} contains {found[0]} of a finished run: choose another output folder, or "
            "replace it with --overwrite (overwrite=True)"
        )


def _is_of_a_run(path: Path) -> bool:
    try:
        return read_json(path).keys() >= _OPTIONS
    except (OSError, ValueError):
        return False


def begin(out: Path, config: Mapping[str, Any], resumed_from: Path | None) -> None:
    """Makes the folder that of this run; a new one removes what another run has left.

    A kill in between leaves the other run as it was, or one that ended before its first checkpoint.

    Args:
        out: the folder.
        config: the run's settings, written to config.json.
        resumed_from: the checkpoint that the run goes on from; later ones are damaged, and removed.
    """
    if resumed_from is None:
        # First: without it the other run is unfinished, whatever else is left.
        (out / WEIGHTS).unlink(missing_ok=True)
        (out / ADAPTER_CONFIG).unlink(missing_ok=True)
        remove_checkpoints(out)
        (out / REPORT).unlink(missing_ok=True)
        (out / PICTURE).unlink(missing_ok=True)
        remove_events(out)
    else:
        found = list_checkpoints(out)
        for damaged in found[found.index(resumed_from) + 1 :]:
            discard(damaged)
    sweep(out)
    write_text(out / CONFIG, json.dumps(dict(config), indent=2) + "\n")
