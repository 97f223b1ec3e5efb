"""A run whose processes were started again, by `torchrun --max-restarts`, goes on by itself.

The command is that of the first start, without --resume, and what the folder holds may be of this
run, or of another one that it was refused to replace. OUT/.minilora.restart tells them apart: it is
written when the run begins, after all that is refused, and names the torchrun that has started it.
The end of the run removes it, and so does the first start of the next one.
"""

import os
import socket
from dataclasses import replace
from pathlib import Path

from minilora.distributed.processes import Processes
from minilora.files.atomic import write_text
from minilora.training.checkpoints import find_damage, list_checkpoints
from minilora.training.config import FinetuneConfig

RESTART = ".minilora.restart"


def remember_start(out: Path) -> None:
    """Notes that the run has begun: from now on what is in its folder is its own."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        write_text(out / RESTART, _torchrun())


def forget_start(out: Path) -> None:
    """Removes the note."""
    (out / RESTART).unlink(missing_ok=True)


def after_restart(config: FinetuneConfig, processes: Processes) -> FinetuneConfig:
    """Returns the config that resumes the newest checkpoint, if the run had begun before.

    Without a checkpoint it starts over; a run that had not begun is started as it was.
    """
    out = Path(config.out)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        if processes.is_first:
            forget_start(out)
        return config

    note = out / RESTART
    if not note.is_file() or note.read_text(errors="replace") != _torchrun():
        return config
    resume = any(find_damage(path) is None for path in reversed(list_checkpoints(out)))
    return replace(config, resume=resume, overwrite=not resume)


def _torchrun() -> str:
    """What the processes of one torchrun have in common, through all their restarts."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{run}\n{socket.gethostname()}\n{os.getppid()}\n"
