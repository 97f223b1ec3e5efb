"""What `PagedAdamW` refuses: options, parameters and gradients, each by name, before any change."""

from typing import Any

import torch
from torch import Tensor

from minilora.optim.pages import Group
from minilora.optim.placement import MOMENTS, Placement, States
from minilora.optim.shards import describe_sharding, local, same_sharding

# A parameter group, and those of its parameters that have a gradient.
TrainedGroup = tuple[Group, list[Tensor]]

# The other options of torch.optim.AdamW's parameter groups, so that one state dict serves both.
TORCH_OPTIONS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}

# Those of them that would change the update.
NOT_SUPPORTED = ("amsgrad", "maximize", "capturable", "differentiable")


def checked_group(group: Group, defaults: dict[str, Any], placement: Placement) -> Group:
    """Returns a new parameter group with its parameters as a list, or raises."""
    # What is neither is left for PyTorch to refuse.
    if isinstance(group, dict) and not isinstance(group["params"], Tensor | set):
        # The parameters may come from a generator.
        params = list(group["params"])
        group = {**group, "params": params}
        options = {**defaults, **group}
        check_options(options)
        for param in params:
            check_param(param[1] if isinstance(param, tuple) else param, options, placement)
        return group

    check_options({**defaults, **group})
    return group


def trained_groups(groups: list[Group], state: States, placement: Placement) -> list[TrainedGroup]:
    """Returns what a step updates, with options, parameters, gradients and states checked."""
    trained = []
    for number, group in enumerate(groups):
        params = [p for p in group["params"] if p.grad is not None]
        check_options(group)
        for i, p in enumerate(group["params"]):
            if p.grad is not None:
                check_param(p, group, placement)
                check_grad(p)
                check_state(p, state.get(p), placement, f"parameter {i} of group {number}")
        trained.append((group, params))
    return trained


def check_state(p: Tensor, state: Any, placement: Placement, name: str) -> None:
    """Checks that the states of a parameter fit it. One without states gets zeros."""
    if state is None or state == {}:
        return
    if not isinstance(state, dict) or state.keys() != {"step", *MOMENTS}:
        found = sorted(state) if isinstance(state, dict) else state
        raise ValueError(
            f"the state of {name} (shape {tuple(p.shape)}) is {found}, but AdamW's has "
            "['step', 'exp_avg', 'exp_avg_sq']: delete it, and the parameter starts anew"
        )

    device = torch.device("cpu") if p in placement.on_host else p.device
    expected = f"{placement.dtype_of(p)} {tuple(p.shape)} on {device}{describe_sharding(p)}"
    for key in MOMENTS:
        if (found := describe(state[key])) != expected:
            raise ValueError(
                f"{key} of {name} is {found}, but the parameter, {describe(p)}, needs {expected}. "
                "Change a model before the optimizer is created; or create a new optimizer and "
                "load the state dict of this one (state_dtype=torch.float32 keeps float32 states)"
            )

    exp_avg, exp_avg_sq = local(state["exp_avg"]), local(state["exp_avg_sq"])
    if not is_dense(exp_avg) or exp_avg.stride() != exp_avg_sq.stride():
        raise ValueError(
            f"the states of {name} (shape {tuple(p.shape)}) have strides {exp_avg.stride()} and "
            f"{exp_avg_sq.stride()}: copy new values into the tensors that were there, with copy_"
        )
    if not isinstance(state["step"], Tensor) or state["step"].shape != ():
        raise TypeError(f"step of {name} is {state['step']!r}: it must be a tensor of one number")


def describe(value: Any) -> str:
    """What an error says of a tensor: torch.float32 (4, 8) on cpu."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} {tuple(value.shape)} on {value.device}{describe_sharding(value)}"


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order."""
    expected = 1
    for size, stride in sorted(zip(t.shape, t.stride(), strict=True), key=lambda x: x[::-1]):
        if size != 1 and stride != expected:
            return t.numel() == 0
        expected *= size
    return True


def check_options(options: dict[str, Any]) -> None:
    """Checks the options of a parameter group."""
    beta1, beta2 = options["betas"]
    _check_number("lr", options["lr"])
    _check_number("betas[0]", beta1, below_one=True)
    _check_number("betas[1]", beta2, below_one=True)
    _check_number("eps", options["eps"])
    _check_number("weight_decay", options["weight_decay"])

    for name in NOT_SUPPORTED:
        if options.get(name):
            raise ValueError(
                f"{name}=True is not supported by PagedAdamW: use torch.optim.AdamW instead"
            )

    if options.get("decoupled_weight_decay") is False and options["weight_decay"]:
        raise ValueError(
            "decoupled_weight_decay=False: this is Adam with weight decay added to the gradient, "
            "not AdamW"
        )


def _check_number(name: str, value: Any, below_one: bool = False) -> None:
    if isinstance(value, Tensor):
        raise TypeError(f"{name} is a tensor: pass a Python number, {name}={value.tolist()}")

    # Written so that NaN is refused too.
    if not value >= 0 or (below_one and not value < 1):
        allowed = "at least 0 and less than 1" if below_one else "at least 0"
        raise ValueError(f"{name}={value}: must be {allowed}")


def check_param(p: Any, options: Group, placement: Placement) -> None:
    """Checks one parameter. What is not a tensor is left for PyTorch to refuse."""
    if not isinstance(p, Tensor):
        return

    name = f"a parameter of shape {tuple(p.shape)}"
    if not p.is_floating_point():
        raise TypeError(
            f"{name} is {p.dtype}: PagedAdamW updates real floating-point parameters only"
        )
    kind = type(local(p).detach())
    if kind is not Tensor:
        raise TypeError(
            f"{name} is a {kind.__name__}: PagedAdamW updates plain tensors, and DTensors of them"
        )

    # Half of the smallest number rounds to zero: 0 / 0, wherever a gradient is zero.
    eps, dtype = options["eps"], placement.dtype_of(p)
    numbers = torch.finfo(dtype)
    if 0 < eps <= numbers.smallest_normal * numbers.eps / 2:
        raise ValueError(
            f"eps={eps} is zero in {dtype}, the dtype of {name}: state_dtype=torch.float32 keeps "
            "states and arithmetic in float32; or choose a larger eps"
        )


def check_grad(p: Tensor) -> None:
    """Checks the gradient of one parameter."""
    grad = p.grad
    assert grad is not None
    if grad.layout is not torch.strided:
        raise TypeError(
            f"the gradient of a parameter of shape {tuple(p.shape)} is sparse: "
            "use nn.Embedding(sparse=False)"
        )
    if grad.dtype != p.dtype:
        raise TypeError(
            f"the gradient of a parameter of shape {tuple(p.shape)} is {grad.dtype}, "
            f"but the parameter is {p.dtype}"
        )
    if grad.shape != p.shape or grad.device != p.device or not same_sharding(grad, p):
        raise ValueError(
            f"the gradient of a parameter, {describe(p)}, is {describe(grad)}: call zero_grad "
            "after a change of the model, and redistribute a gradient that is sharded otherwise"
        )
