r"""AdamW whose states can leave the device.

AdamW keeps two numbers a parameter. QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3) moves them to host memory when a
long sequence makes the GPU run out, and back a page at a time for the update: "paged optimizers". bitsandbytes builds on CUDA's
unified memory, which pages behind the program's back and only tensors of 1e5 elements or more; torchao's CPU offload always pays
for the copies. Here it is plain PyTorch: pages start when memory runs out, for any tensor, and change no bit of the result.

How a step that runs out of memory loses and repeats nothing: **first everything is allocated, then everything is updated**. Until
the last allocation nothing has changed, so a failure is followed by another try with less memory (states moved out, then pages
halved). After it only operators run that write in place.

On the CPU the bits are those of `torch.optim.AdamW(foreach=False)`; `foreach=True` differs from it in 16-bit dtypes. On a GPU the
operators are those of its default there, `foreach=True`, in its order. `fused=True` rounds differently anywhere. The mathematics
stands in `kernels/reference/adamw.py`.

When it pays: LoRA's own states are small (r = 16 on a 7B model: some 320 MB in float32), and next to the activations hardly
matter. It matters for high ranks, trained embeddings, full fine-tuning of small models, and for the peak of a long sequence.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from minilora.optim.paging import Desk, Lane, Operands, Paging, Update, lane_for

Page = Literal["on_oom", "always", "never"]
State = dict[str, Tensor]

MOMENTS = ("exp_avg", "exp_avg_sq")
# Keys of torch.optim.AdamW's groups, so that a state dict serves both. What would change the update is refused.
FLAGS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}
REFUSED = ("amsgrad", "maximize", "capturable", "differentiable")


class PagedAdamW(torch.optim.Optimizer):
    r"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) whose states move to host memory when the device runs out.

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        p <- p - lr wd p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Parameters, states and `state_dict` are those of `torch.optim.AdamW`, bit for bit (tested on the CPU), wherever the states live,
    so a state dict goes from either to the other. It is a `torch.optim.Optimizer`: groups, schedulers, clipping, hooks and
    closures work.

    Args:
        params: parameters or groups, floating point, dense, of any shape; states have their dtype.
        lr, betas, eps, weight_decay: Python numbers, as for `torch.optim.AdamW`.
        page: "on_oom": states live on the device until a step runs out of memory there, from then on in (pinned) host memory;
            "always": in host memory from the start; "never": on the device, and running out of memory is an error.

    Attributes:
        paging: a `Paging`: since which step, pages, bytes moved, milliseconds.

    Raises:
        ValueError, TypeError: an option out of range or not offered (a tensor as lr, amsgrad, maximize), a complex parameter or
            a sparse gradient, by name. Nothing has changed.
        torch.OutOfMemoryError: from `step`, not even the smallest pages fit. Nothing has changed: free memory and call it again.
        MemoryError: from `step` and `page_out`, the host has no room for the states. Again no parameter has changed.

    Only `torch.OutOfMemoryError` starts the paging. A CPU that runs out raises a plain RuntimeError, and moving states from its
    memory to its memory would help nobody.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> optimizer = minilora.PagedAdamW(layer.parameters(), lr=1e-3, page="always")
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.paging.since, optimizer.paging.pages, optimizer.paging.bytes_in
        (1, 1, 64)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        page: Page = "on_oom",
    ) -> None:
        if page not in get_args(Page):
            raise ValueError(f'page={page!r}: one of "on_oom", "always", "never"')
        self.page = page
        self.paging = Paging()
        self._away: set[Tensor] = set()  # parameters whose states are on the host
        self._lanes: dict[torch.device, Lane] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            **FLAGS,
            "decoupled_weight_decay": True,
        }
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `torch.optim.AdamW`. Refuses options and parameters that it cannot update, and then adds nothing."""
        if isinstance(param_group, dict) and not isinstance(param_group["params"], Tensor | set):
            param_group = {
                **param_group,
                "params": list(param_group["params"]),
            }  # it may be a generator
            for param in param_group["params"]:
                _check_param(param[1] if isinstance(param, tuple) else param)
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    # ---- a step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, or none of them; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = [
            (group, [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        for group, params in trained:
            _check_options(group)
            for p in params:
                _check_grad(p)
        desks, fresh = self._allocate(trained)
        # From here on nothing is allocated.
        if self._to_host:
            self._begin()
        self._install(fresh, self._to_host)
        steps = [self.state[p]["step"] for _, params in trained for p in params]
        if steps:
            torch._foreach_add_(steps, 1.0)
        with self._timed(bool(self._away)):
            for desk in desks:
                desk.run(_adamw, self.paging)
        return loss

    def _allocate(
        self, trained: list[tuple[dict[str, Any], list[Tensor]]]
    ) -> tuple[list[Desk], dict[Tensor, State]]:
        """Everything that a step needs, as (desks, states of parameters that had none). Changes nothing but where states live."""
        while True:
            try:
                params = [p for _, some in trained for p in some if not self.state.get(p)]
                fresh = {p: self._new_state(p, self._to_host) for p in params}
                return self._desks(trained, fresh), fresh
            except torch.OutOfMemoryError as error:
                reason = str(error)
            fresh = {}  # with the handler's traceback gone too, nothing holds on to what was allocated
            self._make_room(reason)

    def _new_state(self, p: Tensor, to_host: bool) -> State:
        moments = {
            key: self._lane(p).host_like(p).zero_() if to_host else torch.zeros_like(p)
            for key in MOMENTS
        }
        return {"step": torch.zeros((), dtype=torch.float32), **moments}

    def _desks(
        self, trained: list[tuple[dict[str, Any], list[Tensor]]], fresh: dict[Tensor, State]
    ) -> list[Desk]:
        todo: dict[torch.device, list[tuple[dict[str, Any], list[Update]]]] = {}
        for group, params in trained:
            alike: dict[tuple[torch.device, torch.dtype], list[Update]] = {}
            for p in params:
                state = self.state.get(p) or fresh[p]
                away = self._to_host if p in fresh else p in self._away
                assert p.grad is not None
                update = Update(
                    p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"].item() + 1, away
                )
                alike.setdefault((p.device, p.dtype), []).append(update)
            for (device, _), updates in alike.items():
                todo.setdefault(device, []).append((group, updates))
        return [Desk(self._lane_of(device), work, self._to_host) for device, work in todo.items()]

    def _make_room(self, reason: str) -> None:
        if self.page == "never":
            raise torch.OutOfMemoryError(
                f'{reason}\nNo parameter has changed. page="on_oom" would move the states to the host.'
            )
        if not self._to_host or self._on_device():
            self.page_out()
            return
        halved = [lane.halve_page() for lane in self._lanes.values()]
        if not any(halved):
            raise torch.OutOfMemoryError(
                f"{reason}\nThe optimizer's states are on the host and its pages as small as they get. No parameter has changed: "
                "free memory on the device (a smaller batch, shorter sequences, zero_grad) and call step() again."
            )

    # ---- where the states live

    @property
    def _to_host(self) -> bool:
        """Where the states belong; while moving out fails half way, some are still on the device."""
        return self.page == "always" or self.paging.since is not None

    def _on_device(self) -> list[Tensor]:
        return [p for p, state in self.state.items() if state and p not in self._away]

    def _install(self, states: dict[Tensor, State], away: bool) -> None:
        self.state.update(states)
        self._away = self._away | states.keys() if away else self._away - states.keys()

    def page_out(self) -> int:
        """Moves all states to host memory, where they stay until `page_in`; returns the bytes that this freed on the device.

        A state is dropped only after it was copied. Where the host runs out, what has moved stays there and a step still works.

        Raises:
            MemoryError: the host has no room.
            ValueError: the optimizer was made with page="never".
        """
        if self.page == "never":
            raise ValueError(
                'page="never": make the optimizer with page="on_oom" to move its states'
            )
        self._begin()
        freed = 0
        with self._timed():
            for p in self._on_device():
                state = self.state[p]
                moved = {
                    key: self._lane(p).host_like(state[key]).copy_(state[key]) for key in MOMENTS
                }
                state.update(moved)
                self._away.add(p)
                freed += sum(moment.nbytes for moment in moved.values())
                self.paging.bytes_out += sum(moment.nbytes for moment in moved.values())
        self.release()
        return freed

    def page_in(self) -> int:
        """Moves all states back to the device, or none; returns the bytes moved. The next step out of memory moves them out again.

        Raises:
            torch.OutOfMemoryError: the device has no room; the states stay on the host.
            ValueError: the optimizer was made with page="always".
        """
        if self.page == "always":
            raise ValueError(
                'page="always": make the optimizer with page="on_oom" to have its states on the device'
            )
        with self._timed():
            try:
                moved = {
                    p: {key: torch.empty_like(p).copy_(self.state[p][key]) for key in MOMENTS}
                    for p in self._away
                }
            except torch.OutOfMemoryError as error:
                raise torch.OutOfMemoryError(
                    f"{error}\nThe optimizer's states stay on the host, and steps go on."
                ) from None
            for p, moments in moved.items():
                self.state[p].update(moments)
        self._away.clear()
        self._lanes.clear()  # the next page is chosen from what is free then
        self.paging.since = None
        count = sum(moment.nbytes for moments in moved.values() for moment in moments.values())
        self.paging.bytes_in += count
        return count

    def release(self) -> None:
        """Gives memory that the devices' allocators cache back."""
        for device in self._devices():
            self._lane_of(device).release()

    def in_use(self) -> str:
        """What the parameters' devices hold, for an error."""
        return "; ".join(self._lane_of(device).in_use() for device in self._devices())

    def _devices(self) -> list[torch.device]:
        return list(dict.fromkeys(p.device for group in self.param_groups for p in group["params"]))

    def _begin(self) -> None:
        if self.paging.since is None:
            self.paging.since = 1 + int(
                max((state["step"].item() for state in self.state.values() if state), default=0)
            )

    @contextmanager
    def _timed(self, counts: bool = True) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if counts:
            self.paging.milliseconds += 1e3 * (time.perf_counter() - start)

    def _lane(self, p: Tensor) -> Lane:
        return self._lane_of(p.device)

    def _lane_of(self, device: torch.device) -> Lane:
        if device not in self._lanes:
            self._lanes[device] = lane_for(device)
        return self._lanes[device]

    # ---- state dicts and copies

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state dict of this class or of `torch.optim.AdamW`, from any device; copies the states to where `page` has them.

        Raises:
            ValueError, TypeError: it belongs to other parameters or to an optimizer that is not offered, by name.
            torch.OutOfMemoryError, MemoryError: no room. In every case the optimizer is as it was.
        """
        loaded: dict[Tensor, State] = {}
        away = self._to_host

        def take(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            nonlocal away
            groups = [
                {**FLAGS, "decoupled_weight_decay": True, **group}
                for group in given["param_groups"]
            ]
            states, away = self._room_for(self._match(groups, given["state"]))
            loaded.update(states)
            return {
                **given,
                "state": {},
                "param_groups": groups,
            }  # PyTorch would copy the states to the device first

        def give(_: torch.optim.Optimizer) -> None:
            self._away = set()
            self._install(loaded, away)
            if away:
                self._begin()

        handles = [
            self.register_load_state_dict_pre_hook(
                take
            ),  # after the user's hooks, which may edit the state dict
            self.register_load_state_dict_post_hook(
                give, prepend=True
            ),  # before the user's, which may read the states
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _match(self, groups: list[dict[str, Any]], states: dict[Any, Any]) -> dict[Tensor, Any]:
        """The saved state of each parameter, checked."""
        sizes, own = (
            [len(group["params"]) for group in some] for some in (groups, self.param_groups)
        )
        if sizes != own:
            raise ValueError(
                f"the state dict has groups of {sizes} parameters, this optimizer of {own}"
            )
        for group in groups:
            if missing := self.defaults.keys() - group.keys():
                raise ValueError(
                    f"a group of the state dict lacks {sorted(missing)}: is it one of AdamW?"
                )
            _check_options(group)
        ids = [i for group in groups for i in group["params"]]
        if unknown := states.keys() - set(ids):
            raise ValueError(
                f"the state dict has states of parameters that its groups do not list: {sorted(unknown)[:5]}"
            )
        params = [p for group in self.param_groups for p in group["params"]]
        matched = {p: (i, states[i]) for i, p in zip(ids, params, strict=True) if states.get(i)}
        for p, (i, state) in matched.items():
            if state.keys() != {"step", *MOMENTS}:
                raise ValueError(
                    f"the state of parameter {i} has {sorted(state)} and not ['step', 'exp_avg', 'exp_avg_sq']"
                )
            for key in MOMENTS:
                if state[key].shape != p.shape:
                    raise ValueError(
                        f"{key} of parameter {i} has shape {tuple(state[key].shape)}, the parameter {tuple(p.shape)}"
                    )
        return {p: state for p, (_, state) in matched.items()}

    def _room_for(self, saved: dict[Tensor, Any]) -> tuple[dict[Tensor, State], bool]:
        """Copies of states, and whether they are on the host: where they belong, or there if the device has no room."""
        if not self._to_host:
            try:
                return {p: self._copy(p, state, False) for p, state in saved.items()}, False
            except torch.OutOfMemoryError:
                if self.page == "never":
                    raise
        return {p: self._copy(p, state, True) for p, state in saved.items()}, True

    def _copy(self, p: Tensor, state: Any, to_host: bool) -> State:
        copy = self._new_state(p, to_host)
        for key, value in copy.items():
            value.copy_(torch.as_tensor(state[key]))
        return copy

    def __getstate__(self) -> dict[str, Any]:
        mine = {
            "page": self.page,
            "paging": self.paging,
            "_away": self._away,
        }  # lanes hold streams, which cannot be copied
        return {**super().__getstate__(), **mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._lanes = {}
        super().__setstate__(state)


def _adamw(group: dict[str, Any], page: Operands) -> None:
    """The update of one page, in place. Two operators run over its whole scratch at once: what is correctly rounded may."""
    lr, (beta1, beta2), eps, weight_decay = (
        group["lr"],
        group["betas"],
        group["eps"],
        group["weight_decay"],
    )
    if weight_decay != 0:
        _scale(page.params, 1 - lr * weight_decay)
    torch._foreach_lerp_(page.exp_avgs, page.grads, 1 - beta1)
    _scale(page.exp_avg_sqs, beta2)
    torch._foreach_addcmul_(page.exp_avg_sqs, page.grads, page.grads, 1 - beta2)
    torch._foreach_copy_(page.scratch, page.exp_avg_sqs)
    page.flat.sqrt_()
    torch._foreach_div_(page.scratch, [(1 - beta2**t) ** 0.5 for t in page.steps])
    page.flat.add_(eps)
    torch._foreach_addcdiv_(
        page.params, page.exp_avgs, page.scratch, [-(lr / (1 - beta1**t)) for t in page.steps]
    )


def _scale(tensors: list[Tensor], factor: float) -> None:
    if (
        tensors[0].is_cpu
    ):  # there foreach rounds the factor to bfloat16 or float16 first: other bits than one by one
        for tensor in tensors:
            tensor.mul_(factor)
    else:
        torch._foreach_mul_(tensors, factor)


def _check_options(options: dict[str, Any]) -> None:
    beta1, beta2 = options["betas"]
    numbers = {"lr": options["lr"], "betas[0]": beta1, "betas[1]": beta2, "eps": options["eps"]}
    for name, value in (numbers | {"weight_decay": options["weight_decay"]}).items():
        if isinstance(value, Tensor):
            raise TypeError(f"{name} is a tensor: a Python number, {name}={value.tolist()}")
        if not value >= 0 or (name.startswith("betas") and not value < 1):
            raise ValueError(
                f"{name}={value}: at least 0"
                + (" and less than 1" if name.startswith("betas") else "")
            )
    for name in REFUSED:
        if options.get(name):
            raise ValueError(f"{name}=True is not offered by PagedAdamW: use torch.optim.AdamW")
    if options.get("decoupled_weight_decay") is False and options["weight_decay"]:
        raise ValueError(
            "decoupled_weight_decay=False: these are the states of Adam with weight decay in the gradient, not AdamW"
        )


def _check_param(p: Any) -> None:
    if isinstance(p, Tensor) and not p.is_floating_point():
        raise TypeError(
            f"a parameter of shape {tuple(p.shape)} is {p.dtype}: PagedAdamW updates real floating point numbers only"
        )
    if isinstance(p, Tensor) and type(p.detach()) is not Tensor:
        raise TypeError(
            f"a parameter of shape {tuple(p.shape)} is a {type(p.detach()).__name__}: give its local, plain tensor"
        )


def _check_grad(p: Tensor) -> None:
    grad = p.grad
    assert grad is not None
    if grad.layout is not torch.strided:
        raise TypeError(
            f"the gradient of a parameter of shape {tuple(p.shape)} is sparse: use nn.Embedding(sparse=False)"
        )
    if grad.dtype != p.dtype:
        raise TypeError(
            f"the gradient of a parameter of shape {tuple(p.shape)} is {grad.dtype}, the parameter {p.dtype}"
        )
