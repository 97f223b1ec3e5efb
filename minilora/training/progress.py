"""What a user sees while a run is working: progress bars and the peak memory."""

import sys
from typing import Any

import torch
from torch import nn

from minilora.huggingface.loading import release_checkpoint_memory
from minilora.surgery import quantize_steps

resource: Any
try:
    import resource
except ImportError:
    # Windows.
    resource = None


def progress_bar(description: str, total: int | None = None, done: int = 0) -> Any:
    """Returns a tqdm progress bar, which prints nothing if stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(desc=description, total=total, initial=done, disable=None, dynamic_ncols=True)


def quantize_with_progress(model: nn.Module, **options: Any) -> None:
    """Quantizes a model in place, like `minilora.quantize`, with a progress bar."""
    with progress_bar("quantize") as bar:
        for done, total in quantize_steps(model, **options):
            bar.total = total
            bar.update(done - bar.n)
    release_checkpoint_memory(model)


def peak_memory() -> int:
    """Returns the most bytes that this process has held: on the GPU if it used one, else in RAM.

    0: the system does not say (Windows).
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()

    if resource is None:
        return 0

    # Linux reports kilobytes, macOS bytes.
    used: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used
