"""Prints as JSON what a GPU's figures need beside them: card, driver, versions, date."""

import json
import subprocess
import time
from typing import Any

from side_by_side import versions

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes")


def describe() -> dict[str, Any]:
    """Card, driver, versions and date; `card` is None where PyTorch sees no GPU."""
    import torch

    found = no_card()
    if not torch.cuda.is_available():
        return found | {"card": None}

    of_card = torch.cuda.get_device_properties(0)
    return found | {
        "card": of_card.name,
        "capability": [of_card.major, of_card.minor],
        "processors": of_card.multi_processor_count,
        "memory": of_card.total_memory,
        "L2 cache": of_card.L2_cache_size,
        "CUDA": torch.version.cuda,
        "driver": driver(),
    }


def no_card() -> dict[str, Any]:
    """Versions and date alone."""
    date = time.strftime("%Y-%m-%d")
    return {"card": "no card", "driver": None, "versions": versions(PACKAGES), "date": date}


def driver() -> str | None:
    """The driver's version, as nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


if __name__ == "__main__":
    print(json.dumps(describe()))
