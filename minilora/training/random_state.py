"""The states of all random number generators that training may draw from, as JSON holds them."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_states(device: torch.device) -> dict[str, Any]:
    """Returns the states of PyTorch's (CPU and `device`), Python's and NumPy's generators."""
    drawn = np.random.get_state(legacy=False)
    assert isinstance(drawn, dict)
    drawn["state"]["key"] = drawn["state"]["key"].tolist()

    states = {
        "torch": _to_hex(torch.get_rng_state()),
        "python": random.getstate(),
        "numpy": drawn,
    }
    if device.type == "cuda":
        states["cuda"] = _to_hex(torch.cuda.get_rng_state(device))
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Restores what `random_states` returned, also after a round trip through JSON.

    The GPU's generator is left alone if the states come from a run on a CPU.
    """
    torch.set_rng_state(_from_hex(states["torch"]))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(states["numpy"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_from_hex(states["cuda"]), device)


def _to_hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _from_hex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
