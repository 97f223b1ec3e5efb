"""The record of what paging has done."""

import torch
from torch import nn

from minilora import PagedAdamW
from minilora.optim.paging import Paging


def test_the_record_counts_what_moved() -> None:
    # 310 parameters, 2480 bytes of states.
    layer = nn.Linear(30, 10)
    optimizer = PagedAdamW(layer.parameters())
    assert repr(optimizer.paging).startswith("Paging(states on the device; 0 pages")

    def step() -> Paging:
        layer(torch.ones(1, 30)).sum().backward()
        optimizer.step()
        return optimizer.paging

    step()
    assert optimizer.paging == Paging()

    assert optimizer.page_out() == 2480
    paging = step()
    assert paging.since == 2
    assert paging.pages == 1
    assert paging.bytes_in == 2480
    assert paging.bytes_out == 2 * 2480
    assert paging.milliseconds > 0
    assert repr(paging).startswith(
        "Paging(states on the host since step 2; 1 pages of up to 67.1 MB; 0.0 MB in"
    )

    assert optimizer.page_in() == 2480
    spent = paging.milliseconds
    step()
    assert paging.since is None
    assert paging.pages == 1
    assert paging.bytes_in == 2 * 2480
    assert paging.milliseconds == spent
