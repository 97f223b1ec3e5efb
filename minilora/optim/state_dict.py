r"""Loading a state dict of `PagedAdamW` or of `torch.optim.AdamW`.

`torch.optim.Optimizer.load_state_dict` copies all states to the parameters' device first, which is
where they may not fit. So the states are checked, copied to where they belong and taken out of the
state dict before PyTorch sees it, and installed afterwards. A state dict that does not match is
refused before anything has changed.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from minilora.optim.checks import TORCH_OPTIONS, check_options, describe
from minilora.optim.pages import Group
from minilora.optim.placement import MOMENTS, Placement, State, States
from minilora.optim.shards import is_sharded, local, local_part, same_sharding


@contextmanager
def copied_states(optimizer: torch.optim.Optimizer, placement: Placement) -> Iterator[None]:
    """Within this block `optimizer.load_state_dict` puts states where `placement` wants them."""
    loading = _Loading(placement)

    # Ours run after the user's pre-hooks, which may edit the state dict, and before the user's
    # post-hooks, which may read the states.
    before = optimizer.register_load_state_dict_pre_hook(loading.copy_states)
    after = optimizer.register_load_state_dict_post_hook(loading.install_states, prepend=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


class _Loading:
    """The two hooks of one call of `load_state_dict`, and the copies that pass between them."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.copies: States = {}
        self.on_host = placement.prefers_host

    def copy_states(
        self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        # Groups written by older versions of PyTorch lack some of the options.
        groups = [{**TORCH_OPTIONS, **group} for group in state_dict["param_groups"]]
        check_groups(groups, optimizer)
        saved = match_states(groups, state_dict["state"], optimizer, self.placement)

        self.copies, self.on_host = copy_where_they_fit(saved, self.placement)
        return {**state_dict, "state": {}, "param_groups": groups}

    def install_states(self, optimizer: torch.optim.Optimizer) -> None:
        self.placement.forget_transfers()
        self.placement.on_host = set()
        self.placement.install(self.copies, optimizer.state, self.on_host)
        if self.on_host:
            self.placement.mark_start(optimizer.state)


def check_groups(groups: list[Group], optimizer: torch.optim.Optimizer) -> None:
    """Checks that saved parameter groups have the sizes of the optimizer's, and valid options."""
    saved_sizes = [len(group["params"]) for group in groups]
    own_sizes = [len(group["params"]) for group in optimizer.param_groups]
    if saved_sizes != own_sizes:
        raise ValueError(
            f"the state dict has groups of {saved_sizes} parameters, this optimizer of {own_sizes}"
        )

    for group in groups:
        missing = optimizer.defaults.keys() - group.keys()
        if missing:
            raise ValueError(
                f"a group of the state dict lacks {sorted(missing)}: was it saved by AdamW?"
            )
        check_options(group)


def match_states(
    groups: list[Group],
    states: dict[Any, Any],
    optimizer: torch.optim.Optimizer,
    placement: Placement,
) -> dict[Tensor, Any]:
    """Returns the saved state of each parameter, with its keys, shapes and dtypes checked."""
    ids = [i for group in groups for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]

    unknown = states.keys() - set(ids)
    if unknown:
        raise ValueError(
            "the state dict has states of parameters that are in none of its groups: "
            f"{sorted(unknown)[:5]}"
        )

    matched: dict[Tensor, Any] = {}
    for i, p in zip(ids, params, strict=True):
        if states.get(i):
            _check_state(i, states[i], p, placement.dtype_of(p))
            matched[p] = states[i]
    return matched


def _check_state(i: int, state: Any, p: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(state, dict) or state.keys() != {"step", *MOMENTS}:
        found = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"the state of parameter {i} has {found}, "
            "but AdamW's has ['step', 'exp_avg', 'exp_avg_sq']"
        )

    for key in MOMENTS:
        value = state[key]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{key} of parameter {i} is {kind}: it must be a tensor of floats")
        if value.shape != p.shape:
            raise ValueError(
                f"{key} of parameter {i} has shape {tuple(value.shape)}, "
                f"but the parameter has shape {tuple(p.shape)}"
            )
        if is_sharded(value) and not same_sharding(value, p):
            raise ValueError(
                f"{key} of parameter {i} is {describe(value)}, but the parameter is {describe(p)}: "
                "save it with full_tensor(), which any sharding can load"
            )
        if torch.promote_types(value.dtype, dtype) != dtype:
            raise ValueError(
                f"{key} of parameter {i} is {value.dtype} and would be rounded to {dtype}, the "
                f"dtype of this optimizer's states. {_way_out(value.dtype, p)}"
            )

    step = state["step"]
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item()
    if not isinstance(step, int | float) or not 0 <= step < math.inf:
        raise ValueError(f"step of parameter {i} is {step}: it must be one number, at least 0")


def _way_out(dtype: torch.dtype, p: Tensor) -> str:
    if dtype == torch.float32 and p.itemsize == 2:
        return "Create it with state_dtype=torch.float32, which keeps them"
    return "Cast the states yourself if that is meant, or convert the model back"


def copy_where_they_fit(saved: dict[Tensor, Any], placement: Placement) -> tuple[States, bool]:
    """Returns copies of the states, and whether they are on the host.

    They are where `placement` prefers them, or on the host if the device has too little memory.
    """
    if not placement.prefers_host:
        try:
            return _copies(saved, placement, on_host=False), False
        except torch.OutOfMemoryError:
            if placement.mode == "never":
                raise

    return _copies(saved, placement, on_host=True), True


def _copies(saved: dict[Tensor, Any], placement: Placement, on_host: bool) -> States:
    return {p: _copy(p, state, placement, on_host) for p, state in saved.items()}


def _copy(p: Tensor, state: dict[str, Any], placement: Placement, on_host: bool) -> State:
    copy = placement.new_state(p, on_host)
    copy["step"].copy_(torch.as_tensor(state["step"]))
    for key in MOMENTS:
        local(copy[key]).copy_(local_part(state[key], p))
    return copy
