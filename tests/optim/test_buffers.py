"""StepBuffers: once they exist, the update allocates nothing."""

import pytest
import torch
from allocator import FailingAllocator
from paged_cases import LAYOUTS, MODES, SHAPES, Case, LazyTransfer, small_pages

from minilora.optim.buffers import StepBuffers, UpdatePage
from minilora.optim.paging import Paging
from minilora.optim.transfer import BlockingTransfer, Transfer


@pytest.mark.parametrize("transfer", [BlockingTransfer, LazyTransfer])
@pytest.mark.parametrize("page", MODES)
def test_the_update_itself_allocates_nothing(
    page: str, transfer: type[Transfer], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    run = StepBuffers.run

    def counted(self: StepBuffers, update: UpdatePage, paging: Paging) -> None:
        with FailingAllocator() as memory:
            run(self, update, paging)
        counts.append(memory.count)

    monkeypatch.setattr(StepBuffers, "run", counted)

    params = [
        (shape, dtype, layout, None)
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
        for layout in LAYOUTS
    ]
    case = Case(0, params, [(30, {}), (0, {"weight_decay": 0.0})], page, transfer)
    with small_pages(transfer):
        parameters = case.parameters()
        optimizer = case.optimizer(parameters)
        for _ in range(2):
            case.give_gradients({"scale": 1.0, "missing": ()}, parameters)
            optimizer.step()
    assert counts == [0, 0]
