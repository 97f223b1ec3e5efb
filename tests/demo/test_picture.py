"""The demo's picture."""

import pytest

from minilora.demo.picture import WINDOW, running_mean


def test_the_running_mean_is_over_the_last_ten_values() -> None:
    values = [float(i) for i in range(30)]
    assert running_mean(values)[:3] == [0.0, 0.5, 1.0]
    assert running_mean(values)[-1] == pytest.approx(sum(values[-WINDOW:]) / WINDOW)
