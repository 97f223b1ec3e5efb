"""Histories of PagedAdamW beside torch.optim.AdamW: the same bits, or a refusal that changes none.

Steps with and without a closure, groups added, states paged out and in, state dicts loaded, running
out of memory at any allocation; parameters whose dtype, shape or states are changed in between.
"""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from allocator import FailingAllocator
from fuzzing import REFUSED, SAME, Wrong, attempt
from helpers import same_bits
from paged_cases import MODES, OUT_OF_MEMORY, LazyTransfer, copies, everything, small_pages
from torch import Tensor, nn

from minilora import PagedAdamW
from minilora.optim.reference import step as reference_step
from minilora.optim.transfer import BlockingTransfer

CI, SAMPLE, FULL = 120, 800, 3000
SECONDS, MEGABYTES = 2, 200

# What PyTorch imports at the first step of an optimizer is no case's fault.
_first = nn.Parameter(torch.ones(1))
_first.grad = torch.ones(1)
with FailingAllocator():
    torch.optim.AdamW([_first], foreach=False).step()
    PagedAdamW([_first]).step()

SHAPES = ((), (3,), (7, 5), (130,), (13, 31), (900,))
Params = list[nn.Parameter]


class History:
    """An optimizer, its twin of PyTorch (None where there is none), and the parameters of both."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        torch.manual_seed(seed)
        self.wide = self.draw.random() < 0.25
        dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float64]
        if self.wide:
            dtypes = [torch.bfloat16, torch.float16, torch.float32]
        shapes = [self.draw.choice(SHAPES) for _ in range(self.draw.randint(1, 5))]
        self.mine = [nn.Parameter(torch.randn(s).to(self.draw.choice(dtypes))) for s in shapes]
        self.theirs = copy.deepcopy(self.mine)
        self.options = {
            "lr": self.draw.choice([1e-3, 0.1]),
            "betas": self.draw.choice([(0.9, 0.999), (0.5, 0.9)]),
            "weight_decay": self.draw.choice([0.0, 0.3]),
        }
        self.page = self.draw.choice(MODES)
        self.optimizer = self.make()
        self.oracle = torch.optim.AdamW(self.theirs, **self.options, foreach=False)
        self.moments: dict[int, tuple[Tensor, Tensor, int]] = {}

    def make(self) -> PagedAdamW:
        dtype = torch.float32 if self.wide else None
        options: dict[str, Any] = {**self.options, "page": self.page, "state_dtype": dtype}
        return PagedAdamW(self.mine, **options)

    def give_gradients(self) -> None:
        for i, (p, q) in enumerate(zip(self.mine, self.theirs, strict=True)):
            grad = (torch.randn(p.shape) * self.draw.choice([1.0, 1e-4])).to(p.dtype)
            missing = i and self.draw.random() < 0.2
            p.grad, q.grad = (None, None) if missing else (grad.clone(), grad.clone())

    def compare(self) -> None:
        if not self.wide:
            pairs = zip(everything(self.optimizer), everything(self.oracle), strict=True)
            if not all(same_bits(a, b) for a, b in pairs):
                raise Wrong("silent", "other bits than torch.optim.AdamW's")

    # What a history is made of.

    def step(self) -> None:
        self.give_gradients()
        if self.wide:
            self.wide_step()
            return
        with_closure = self.draw.random() < 0.3
        closure = (lambda: 3.0) if with_closure else None
        self.oracle.step(closure)
        if self.optimizer.step(closure) != (3.0 if with_closure else None):
            raise Wrong("silent", "the closure's loss is lost")

    def wide_step(self) -> None:
        """Against float64: moments within float32's rounding, parameters rounded once."""
        wide = {
            p: one_step(p, self.optimizer.state.get(p), group)
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        }
        self.optimizer.step()
        for p, (expected, bounds) in wide.items():
            state = self.optimizer.state[p]
            found = p.detach(), state["exp_avg"], state["exp_avg_sq"]
            near = [
                bool(((f.double() - e).abs() <= b).all())
                for f, e, b in zip(found, expected, bounds, strict=True)
            ]
            if not all(near) or {t.dtype for t in found[1:]} != {torch.float32}:
                raise Wrong("silent", f"{p.dtype} parameters are not the oracle's: {near}")

    def out_of_memory(self) -> None:
        """A step, repeated until it works."""
        self.give_gradients()
        fails = {self.draw.randrange(30) for _ in range(self.draw.randint(1, 4))}
        memory = FailingAllocator(lambda k: k in fails)
        self.oracle.step()
        while True:
            before = copies(self.optimizer)
            try:
                with memory:
                    self.optimizer.step()
                return
            except OUT_OF_MEMORY:
                self.unchanged(before)

    def unchanged(self, before: list[Tensor]) -> None:
        if not same_bits(tuple(everything(self.optimizer)), tuple(before)):
            raise Wrong("changed", "a step that raised has changed something")

    def page_out(self) -> None:
        if self.page != "never":
            self.optimizer.page_out()

    def page_in(self) -> None:
        if self.page != "always":
            self.optimizer.page_in()

    def reload(self) -> None:
        saved = copy.deepcopy(self.optimizer.state_dict())
        self.page = self.draw.choice(MODES)
        groups = self.optimizer.param_groups
        self.optimizer = self.make()
        for group in groups[1:]:
            self.optimizer.add_param_group({"params": group["params"], "lr": group["lr"]})
        self.optimizer.load_state_dict(saved)

    def through_torch(self) -> None:
        if not self.wide:
            self.oracle.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
            self.optimizer.load_state_dict(copy.deepcopy(self.oracle.state_dict()))

    def add_group(self) -> None:
        p = nn.Parameter(torch.randn(self.draw.choice(SHAPES)))
        q = copy.deepcopy(p)
        self.mine, self.theirs = [*self.mine, p], [*self.theirs, q]
        # `make` gives the first group what it had.
        self.optimizer.add_param_group({"params": [p], "lr": 0.01})
        self.oracle.add_param_group({"params": [q], "lr": 0.01})
        self.make = lambda first=self.mine[:-1], make=self.make: self.first_group(first, make)  # type: ignore[method-assign,misc]

    def first_group(self, first: Params, make: Callable[[], PagedAdamW]) -> PagedAdamW:
        mine, self.mine = self.mine, first
        try:
            return make()
        finally:
            self.mine = mine

    # What has to be refused. Each returns what the error has to name.

    def other_dtype(self, p: nn.Parameter) -> list[str]:
        p.data = p.data.to(torch.float64 if p.dtype != torch.float64 else torch.float32)
        return ["exp_avg of parameter"]

    def other_shape(self, p: nn.Parameter) -> list[str]:
        p.data = torch.randn(5, 2).to(p.dtype)
        return ["exp_avg of parameter"]

    def state_shape(self, p: nn.Parameter) -> list[str]:
        self.optimizer.state[p]["exp_avg_sq"] = torch.zeros(2, 9, dtype=torch.float32)
        return ["exp_avg_sq of parameter"]

    def state_dtype(self, p: nn.Parameter) -> list[str]:
        state = self.optimizer.state[p]
        state["exp_avg"] = state["exp_avg"].to(torch.complex64)
        return ["exp_avg of parameter"]

    def state_none(self, p: nn.Parameter) -> list[str]:
        self.optimizer.state[p]["exp_avg"] = None
        return ["exp_avg of parameter"]

    def state_missing(self, p: nn.Parameter) -> list[str]:
        del self.optimizer.state[p][self.draw.choice(["step", "exp_avg", "exp_avg_sq"])]
        return ["the state of parameter"]

    def state_extra(self, p: nn.Parameter) -> list[str]:
        self.optimizer.state[p]["max_exp_avg_sq"] = torch.zeros(())
        return ["the state of parameter"]

    def state_list(self, p: nn.Parameter) -> list[str]:
        self.optimizer.state[p] = [1, 2]
        return ["the state of parameter"]

    def step_number(self, p: nn.Parameter) -> list[str]:
        self.optimizer.state[p]["step"] = self.draw.choice([None, "3", torch.zeros(2)])
        return ["step of parameter"]

    def tensor_lr(self, p: nn.Parameter) -> list[str]:
        self.optimizer.param_groups[-1]["lr"] = torch.tensor(0.1)
        return ["lr is a tensor"]

    def nan_beta(self, p: nn.Parameter) -> list[str]:
        self.optimizer.param_groups[-1]["betas"] = (0.9, float("nan"))
        return ["betas[1]=nan"]

    def sparse_gradient(self, p: nn.Parameter) -> list[str]:
        p.data = torch.ones(4, 2).to(p.dtype)
        self.optimizer.state.pop(p, None)
        p.grad = torch.ones(4, 2).to(p.dtype).to_sparse()
        return ["is sparse"]

    def to_half(self, p: nn.Parameter) -> list[str]:
        """float16 with an eps of zero; wide states take it."""
        p.data = p.data.half()
        p.grad = None
        self.optimizer.state.pop(p, None)
        return ["eps=1e-08 is zero in torch.float16"]


def one_step(p: Tensor, state: Any, group: dict[str, Any]) -> tuple[tuple[Tensor, ...], ...]:
    """(p, m, v) after a step in float64, and by how much float32 may differ from each."""
    assert p.grad is not None
    lr, (b1, b2), eps = group["lr"], group["betas"], group["eps"]
    old, grad = p.detach().double(), p.grad.double()
    m, v = (state[k].double() if state else 0 * old for k in ("exp_avg", "exp_avg_sq"))
    t = int(state["step"]) + 1 if state else 1
    new = reference_step(old, grad, m, v, t, lr, (b1, b2), eps, group["weight_decay"])

    # Eight roundings of float32 (2^-24) of each term; p is rounded once more, to its dtype.
    u, info = 8 * 2.0**-24, torch.finfo(p.dtype)
    m_bound = u * (m.abs() + grad.abs()) + 1e-40
    v_bound = u * new[2] + 1e-40
    root = (new[2] / (1 - b2**t)).sqrt() + eps
    update = lr / (1 - b1**t) * (m_bound + 2 * u * new[1].abs()) / root
    p_bound = u * old.abs() + update + 1.01 * info.eps / 2 * (new[0].abs() + info.smallest_normal)
    return new, (p_bound, m_bound, v_bound)


STEPS = ("step", "step", "step", "out_of_memory", "page_out", "page_in", "reload")
STEPS += ("through_torch", "add_group")
REFUSALS = ("other_dtype", "other_shape", "state_shape", "state_dtype", "state_none")
REFUSALS += ("state_missing", "state_extra", "state_list", "step_number", "tensor_lr", "nan_beta")
REFUSALS += ("sparse_gradient", "to_half")


def run(seed: int, folder: Path) -> str:
    kind = (BlockingTransfer, LazyTransfer)[seed % 2]
    with small_pages(kind):
        history = History(seed)
        for _ in range(history.draw.randint(2, 8)):
            what = history.draw.choice(STEPS)
            if history.wide and what == "out_of_memory":
                what = "step"
            getattr(history, what)()
            history.compare()
        history.step()
        history.compare()
        return spoiled(history) if history.draw.random() < 0.6 else SAME


def spoiled(history: History) -> str:
    """Damages the optimizer or its parameters; the step that follows must change nothing."""
    optimizer = history.optimizer
    having_states = [p for p in history.mine if optimizer.state.get(p)]
    p = history.draw.choice(having_states)
    what = history.draw.choice(REFUSALS)
    if history.wide and what == "to_half":
        what = "other_dtype"
    names = getattr(history, what)(p)
    for q in history.mine:
        if q.grad is None or q.grad.shape != q.shape or q.grad.dtype != q.dtype:
            q.grad = torch.ones_like(q)

    state = [optimizer.state.get(q) for q in history.mine]
    held = [dict(each) if isinstance(each, dict) else each for each in state]
    tensors = [q.detach().clone() for q in history.mine]
    values = [[t.clone() for t in _tensors(each)] for each in state]
    host = set(optimizer._placement.on_host)

    _, error = attempt(optimizer.step, names)
    if error is None:
        raise Wrong("silent", f"{what} was not refused")
    same = all(map(same_bits, [q.detach() for q in history.mine], tensors))
    now = [optimizer.state.get(q) for q in history.mine]
    same = same and all(a is b for a, b in zip(now, state, strict=True))
    for each, was, bits in zip(state, held, values, strict=True):
        same = same and (not isinstance(each, dict) or each.keys() == was.keys())
        same = same and all(map(same_bits, _tensors(each), bits))
    if not same or host != optimizer._placement.on_host:
        raise Wrong("changed", f"the step that refused {what} has changed something")
    return REFUSED


def _tensors(state: Any) -> list[Tensor]:
    values = state.values() if isinstance(state, dict) else ()
    return [value for value in values if isinstance(value, Tensor)]
