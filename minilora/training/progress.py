"""What a user sees while a run is working: progress bars and the peak memory."""

import sys
from typing import Any

import torch
from torch import nn

from minilora.huggingface.loading import release_checkpoint_memory
from minilora.surgery import quantize_steps


def progress_bar(description: str, total: int | None = None, done: int = 0) -> Any:
    """Returns a tqdm progress bar, which prints nothing if stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(desc=description, total=total, initial=done, disable=None, dynamic_ncols=True)


def quantize_with_progress(model: nn.Module) -> None:
    """Quantizes a model in place, like `minilora.quantize`, with a progress bar."""
    with progress_bar("quantize") as bar:
        for done, total in quantize_steps(model):
            bar.total = total
            bar.update(done - bar.n)
    release_checkpoint_memory(model)


def peak_memory() -> int:
    """Returns the most bytes that this process has held: on the GPU if it used one, else in RAM."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()

    # Not available on Windows.
    import resource

    # Linux reports kilobytes, macOS bytes.
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used
