"""What `PagedAdamW` refuses: options, parameters and gradients, each by name, before any change."""

from typing import Any

import torch
from torch import Tensor

from minilora.optim.pages import Group

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


def checked_group(group: Group, defaults: dict[str, Any]) -> Group:
    """Returns a new parameter group with its parameters as a list, or raises."""
    # What is neither is left for PyTorch to refuse.
    if isinstance(group, dict) and not isinstance(group["params"], Tensor | set):
        # The parameters may come from a generator.
        params = list(group["params"])
        group = {**group, "params": params}
        for param in params:
            check_param(param[1] if isinstance(param, tuple) else param)

    check_options({**defaults, **group})
    return group


def trained_groups(groups: list[Group]) -> list[TrainedGroup]:
    """Returns what a step updates, with options and gradients checked."""
    trained = []
    for group in groups:
        params = [p for p in group["params"] if p.grad is not None]
        check_options(group)
        for p in params:
            check_grad(p)
        trained.append((group, params))
    return trained


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


def check_param(p: Any) -> None:
    """Checks one parameter. What is not a tensor is left for PyTorch to refuse."""
    if not isinstance(p, Tensor):
        return

    if not p.is_floating_point():
        raise TypeError(
            f"a parameter of shape {tuple(p.shape)} is {p.dtype}: "
            "PagedAdamW updates real floating-point parameters only"
        )
    if type(p.detach()) is not Tensor:
        raise TypeError(
            f"a parameter of shape {tuple(p.shape)} is a {type(p.detach()).__name__}: "
            "pass its local tensor, a plain torch.Tensor"
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
