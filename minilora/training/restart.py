"""A run whose processes were started again, by `torchrun --max-restarts`, goes on by itself.

The command is that of the first start, without --resume, and the folder may hold what the run has
written or what it refused to replace. torchrun's store outlives the processes and tells the two
apart: the run notes there that it has begun, which it does after all that it refuses.
"""

from dataclasses import replace
from pathlib import Path

from minilora.distributed.processes import Processes
from minilora.files.text import shown
from minilora.training.checkpoints import find_damage, list_checkpoints
from minilora.training.config import FinetuneConfig

_BEGUN, _FINISHED = "begun", "finished"


def remember_start(out: Path, processes: Processes) -> None:
    """Notes that the run has begun: what is in its folder is its own."""
    processes.remember(_key(out), _BEGUN)


def remember_end(out: Path, processes: Processes) -> None:
    """Notes that the run is finished."""
    processes.remember(_key(out), _FINISHED)


def after_restart(config: FinetuneConfig, processes: Processes) -> FinetuneConfig:
    """Returns the config that resumes the newest checkpoint, if the run had begun before.

    Without a checkpoint it starts over; a run that had not begun is started as it was.

    Raises:
        ValueError: the run was finished, and a process failed after its end.
    """
    state = processes.remembered(_key(Path(config.out)))
    if state is None:
        return config
    if state == _FINISHED:
        raise ValueError(
            f"the run in {shown(config.out)} is finished; a process failed after its end, and "
            "there is nothing left to do"
        )
    saved = list_checkpoints(Path(config.out))
    resume = any(find_damage(path) is None for path in reversed(saved))
    return replace(config, resume=resume, overwrite=not resume)


def _key(out: Path) -> str:
    return f"minilora/run/{out.resolve()}"
