"""Every random generator that training may draw from is saved and restored."""

import json
import random

import numpy as np
import torch

from minilora.training.random_state import random_states, set_random_states


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        *torch.randn(3).tolist(),
    ]


def test_every_random_state_comes_back() -> None:
    # One of a pair of Gaussians is now kept for the next call.
    draw()
    states = json.loads(json.dumps(random_states(torch.device("cpu"))))
    drawn = draw()
    assert draw() != drawn
    set_random_states(states, torch.device("cpu"))
    assert draw() == drawn
