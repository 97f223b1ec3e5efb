"""The states of all random number generators that training may draw from, as JSON holds them."""

import random
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Both are Mersenne Twisters: so many words, and the place of the next one.
_WORDS = 624


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


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds the generators of one of several processes for a step (0, 1, ...).

    What it draws is a function of the arguments, so no checkpoint has to hold its states.
    """
    number = zlib.crc32(f"{seed} {step} {rank}".encode())
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def check_random_states(states: Any) -> None:
    """Raises ValueError, which names the generator, unless the states can be restored.

    They are tried on generators that nobody uses.
    """
    if not isinstance(states, Mapping) or not {"torch", "python", "numpy"} <= states.keys():
        raise ValueError("the states of torch, python and numpy are not all there")
    for name, check in (
        ("torch", _try_torch),
        ("python", _try_python),
        ("numpy", _try_numpy),
        ("cuda", _check_cuda),
    ):
        try:
            if name in states:
                check(states[name])
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, IndexError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise ValueError(f"the state of {name} is not one ({first[:200]!r})") from None


def _try_torch(state: Any) -> None:
    torch.Generator().set_state(_from_hex(state))


def _try_python(state: Any) -> None:
    version, numbers, gauss = state
    _check_words(numbers[:-1], numbers[-1])
    _check_gauss(gauss)
    random.Random().setstate((version, tuple(numbers), gauss))


def _try_numpy(state: Any) -> None:
    # NumPy would read behind the words if the place were behind them.
    _check_words(state["state"]["key"], state["state"]["pos"])
    _check_gauss(state["gauss"])
    if state["has_gauss"] not in (0, 1):
        raise ValueError("has_gauss is neither 0 nor 1")
    np.random.RandomState().set_state(state)


def _check_words(words: Any, place: Any) -> None:
    if type(place) is not int or not 0 <= place <= _WORDS:
        raise ValueError(f"the place of the next word is not between 0 and {_WORDS}")
    if len(words) != _WORDS or not all(type(w) is int and 0 <= w < 1 << 32 for w in words):
        raise ValueError(f"it does not have {_WORDS} words of 32 bits")


def _check_gauss(gauss: Any) -> None:
    if gauss is not None and type(gauss) not in (int, float):
        raise ValueError("its Gaussian is not a number")


def _check_cuda(state: Any) -> None:
    # Seed and offset.
    if len(_from_hex(state)) != 16:
        raise ValueError("it does not have 16 bytes")


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
