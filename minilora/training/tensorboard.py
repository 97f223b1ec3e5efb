"""TensorBoard, where it is installed: the metrics of every step, to be watched in a browser.

    tensorboard --logdir OUT/tensorboard

The file is written step by step, without TensorBoard's own thread, so that an error of the disk is
raised where it happens and a step that is finished can be seen.
"""

import importlib.util
import io
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from minilora.files.disk_errors import naming
from minilora.files.text import shown
from minilora.training.callbacks import AfterStep, write_all
from minilora.training.loop import Step

TENSORBOARD = "tensorboard"

# TensorBoard reads every file with "tfevents" in its name; the ending says which are ours.
_EVENTS = "events.out.tfevents."
_OURS = ".minilora"

_CURVES = ("loss", "eval_loss", "lr", "grad_norm")


class EventFormat(NamedTuple):
    """The classes of TensorBoard with which events are written."""

    Event: Any
    SessionLog: Any
    Summary: Any
    RecordWriter: Any


def find_tensorboard() -> EventFormat | None:
    """Imports what writes events; returns None if TensorBoard is not installed.

    One that is installed but cannot be imported gives a warning, and None too: no run has to fail
    for its curves.
    """
    if importlib.util.find_spec("tensorboard") is None:
        return None
    try:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    except Exception as error:
        # Anything: its protobuf and numpy may be of other versions than it expects.
        warnings.warn(
            "TensorBoard is installed but cannot be imported, so the run writes no events for it "
            f"({type(error).__name__}: {shown(error, 300)})",
            stacklevel=2,
        )
        return None
    return EventFormat(Event, SessionLog, Summary, RecordWriter)


@contextmanager
def write_events(out: Path, done: int, tensorboard: EventFormat | None) -> Iterator[AfterStep]:
    """A callback that writes the metrics to OUT/tensorboard; does nothing without TensorBoard.

    Args:
        out: the output folder.
        done: number of steps before a resume. What was written of later steps is not shown.
        tensorboard: see `find_tensorboard`.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    if tensorboard is None:
        yield lambda step: None
        return

    Event, SessionLog, Summary, RecordWriter = tensorboard
    folder = out / TENSORBOARD
    with naming(folder):
        folder.mkdir(exist_ok=True)
        # In the order in which they were started: TensorBoard reads them by name.
        name = f"{_EVENTS}{time.time():.6f}.{socket.gethostname()}.{os.getpid()}{_OURS}"
        file = (folder / name).open("xb", buffering=0)
    with file:

        def write(**contents: Any) -> None:
            # Not to the file itself: RecordWriter takes no notice of a write that was cut short.
            record = io.BytesIO()
            event = Event(wall_time=time.time(), **contents)
            RecordWriter(record).write(event.SerializeToString())
            with naming(folder / name):
                write_all(file, record.getvalue())

        write(file_version="brain.Event:2")
        # TensorBoard drops the steps from here on that another file has.
        write(step=done + 1, session_log=SessionLog(status=SessionLog.START))

        def after_step(step: Step) -> None:
            values = {curve: getattr(step, curve) for curve in _CURVES}
            shown = [
                Summary.Value(tag=curve, simple_value=value)
                for curve, value in values.items()
                if value is not None
            ]
            write(step=step.step, summary=Summary(value=shown))

        yield after_step


def remove_events(out: Path) -> None:
    """Removes what runs have written to OUT/tensorboard, and the folder if nothing else is in it.

    Event files of other programs stay. Nothing is removed through a symbolic link.
    """
    folder = out / TENSORBOARD
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.glob(f"{_EVENTS}*{_OURS}")):
        path.unlink()
    with suppress(OSError):
        folder.rmdir()
