"""What the tests of PagedAdamW share: small pages, a slow transfer, parameters of many layouts."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from helpers import same_bits
from torch import Tensor, nn

from minilora import PagedAdamW
from minilora.optim import transfer
from minilora.optim.transfer import BlockingTransfer, Copies, Transfer

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
MODES = ("on_oom", "always", "never")


class LazyTransfer(Transfer):
    """A side stream at its slowest: copies happen when something waits for them.

    At most two pages may be on the device.
    """

    scratch_bytes = 2**10

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.queue: deque[tuple[int, list[tuple[Tensor, Tensor]]]] = deque()
        self.events = 0
        self.pages_on_device = 0

    def _empty_on_host(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(like, dtype=dtype)

    def free_bytes(self) -> int:
        # The smallest page.
        return 0

    def release(self) -> None: ...

    def in_use(self) -> str:
        return "all"

    def wait_for_compute(self) -> None:
        assert not self.queue

    def copy_in(self, copies: Copies) -> int:
        self.pages_on_device += 1
        assert self.pages_on_device <= 2
        return self._enqueue(copies)

    def _enqueue(self, copies: Copies) -> int:
        self.events += 1
        self.queue.append((self.events, list(copies)))
        return self.events

    def wait(self, event: int) -> None:
        while self.queue and self.queue[0][0] <= event:
            _, copies = self.queue.popleft()
            for target, source in copies:
                target.copy_(source)

    def copy_out(self, copies: Copies) -> None:
        self.pages_on_device -= 1
        self._enqueue(copies)

    def synchronize(self) -> None:
        self.wait(self.events)
        assert self.pages_on_device == 0


@contextmanager
def small_pages(
    kind: type[Transfer] = BlockingTransfer, largest: int = 2**11, smallest: int = 2**10
) -> Iterator[None]:
    """Pages of some hundred elements, so that small tensors are larger than a page."""
    with (
        mock.patch.dict(transfer.TRANSFERS, {"cpu": kind}),
        mock.patch.multiple(transfer, LARGEST_PAGE=largest, SMALLEST_PAGE=smallest),
        mock.patch.object(BlockingTransfer, "scratch_bytes", 2**10),
    ):
        yield


def everything(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every parameter and every state, in order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [
        optimizer.state[p][key]
        for p in params
        if optimizer.state.get(p)
        for key in ("step", "exp_avg", "exp_avg_sq")
    ]
    return params + states


def copies(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What `everything` gives, as it is now."""
    return [tensor.clone() for tensor in everything(optimizer)]


def assert_same(found: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    assert_same_tensors(everything(found), everything(expected))


def assert_same_tensors(found: list[Tensor], expected: list[Tensor]) -> None:
    assert same_bits(tuple(found), tuple(expected))


def dense(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float32).to(dtype)


def transposed(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return dense(shape[::-1], dtype).permute(tuple(reversed(range(len(shape)))))


def with_gaps(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return dense([*shape, 2], dtype)[..., 1]


def at_an_offset(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Part of a larger tensor, as the parameters of a flattened model are."""
    return dense([math.prod(shape) + 5], dtype)[5:].view(tuple(shape))


Layout = Callable[[Sequence[int], torch.dtype], Tensor]
LAYOUTS: tuple[Layout, ...] = (dense, transposed, with_gaps, at_an_offset)

# Scalars, nothing, less than a chunk, odd sizes, larger than a page.
SHAPES = ((), (0,), (1,), (3,), (7, 5), (64,), (130,), (13, 31), (3, 0, 2), (2, 3, 100), (2500,))

# Shape, dtype, layout of the parameter, layout of its gradients (None: the parameter's).
Param = tuple[tuple[int, ...], torch.dtype, Layout, Layout | None]


@dataclass
class Case:
    """Parameters in groups, and what happens in each step.

    `groups` lists (number of parameters, options); the last group takes the remaining parameters.
    """

    seed: int
    params: list[Param]
    groups: list[tuple[int, dict[str, Any]]]
    page: str
    transfer: type[Transfer]
    steps: list[dict[str, Any]] = field(default_factory=list)

    def parameters(self) -> list[nn.Parameter]:
        torch.manual_seed(self.seed)
        return [nn.Parameter(layout(shape, dtype)) for shape, dtype, layout, _ in self.params]

    def grouped(self, params: list[nn.Parameter]) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        rest = params
        for size, options in self.groups[:-1]:
            groups.append({"params": rest[:size], **options})
            rest = rest[size:]
        return [*groups, {"params": rest, **self.groups[-1][1]}]

    def optimizer(self, params: list[nn.Parameter]) -> PagedAdamW:
        return PagedAdamW(self.grouped(params), page=self.page)  # type: ignore[arg-type]

    def oracle(self, params: list[nn.Parameter]) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.grouped(params), foreach=False, fused=False)

    def give_gradients(self, step: dict[str, Any], *models: list[nn.Parameter]) -> None:
        """The same random gradients to each of the models."""
        for i, (shape, dtype, layout, grad_layout) in enumerate(self.params):
            grad = (grad_layout or layout)(shape, dtype) * step["scale"]
            for params in models:
                # `clone` keeps the strides of a tensor without gaps.
                params[i].grad = None if i in step["missing"] else grad.clone()


def three_parameters(
    page: str, steps: int = 0
) -> tuple[PagedAdamW, torch.optim.AdamW, Callable[[], None]]:
    """An optimizer and its oracle, both after some steps, and what gives them new gradients."""
    params: list[Param] = [
        ((7, 5), torch.float32, dense, None),
        ((2500,), torch.bfloat16, dense, None),
        ((), torch.float32, dense, None),
    ]
    case = Case(0, params, [(1, {"weight_decay": 0.3}), (2, {})], page, BlockingTransfer)
    mine = case.parameters()
    theirs = case.parameters()
    optimizer = case.optimizer(mine)
    oracle = case.oracle(theirs)

    def give_gradients() -> None:
        case.give_gradients({"scale": 1.0, "missing": ()}, mine, theirs)

    for _ in range(steps):
        give_gradients()
        optimizer.step()
        oracle.step()
    return optimizer, oracle, give_gradients


# Bytes of the states of `three_parameters`.
THREE_STATES_BYTES = 2 * (4 * 35 + 2 * 2500 + 4)
