"""Restoring a checkpoint into a model and an optimizer: everything is checked, then changed."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.files.adapters import load_adapter
from minilora.files.tensors import read_tensors
from minilora.files.text import shown_value
from minilora.surgery import adapter_parameters
from minilora.training.checkpoints import BEST, OPTIMIZER
from minilora.training.loop import Step
from minilora.training.random_state import set_random_states
from minilora.training.run_state import RUN, RunState

_MOMENTS = ("exp_avg", "exp_avg_sq")
_NAMES = {*_MOMENTS, "step"}

States = dict[int, dict[str, Tensor]]


def restore_checkpoint(
    path: Path, run: RunState, model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[Tensor]:
    """Restores the adapters, the optimizer's states and all random states.

    Model and optimizer may be on another device than they were.

    Args:
        path: the checkpoint.
        run: what `read_run` found in it.
        model: the model, with fresh adapters.
        optimizer: an AdamW over the adapters' parameters.

    Returns:
        The parameters of the best adapter so far; none if the hold-out was not evaluated.

    Raises:
        ValueError: the checkpoint does not fit. Nothing has changed.
    """
    if len(run.lr) != len(optimizer.param_groups):
        raise ValueError(
            f"{path / RUN} has learning rates for {len(run.lr)} groups of parameters, and the "
            f"optimizer has {len(optimizer.param_groups)}: {_way_out(path)}"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        states = _read_states(path / OPTIMIZER)
        _check_states(states, parameters, steps=len(run.history))
    except ValueError as error:
        raise ValueError(
            f"{path / OPTIMIZER} does not fit this run: {error}. {_way_out(path)}"
        ) from None

    try:
        best = _read_best(path / BEST, run.history, adapter_parameters(model))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path / BEST} does not fit this run: {error}. {_way_out(path)}"
        ) from None

    load_adapter(model, path, allow_zero=True)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})

    # Whatever else is in a parameter group comes from the config.
    for group, lr in zip(optimizer.param_groups, run.lr, strict=True):
        group["lr"] = lr
    set_random_states(run.random, adapter_parameters(model)[0].device)
    return best


def _way_out(path: Path) -> str:
    return f"restore it, or remove {path} to resume from the checkpoint before it"


def _read_states(path: Path) -> States:
    tensors, _ = read_tensors(path)
    states: States = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        if not (index.isascii() and index.isdecimal() and len(index) < 10 and name in _NAMES):
            raise ValueError(f"{shown_value(key)} is no state of AdamW's")
        # Copied: the tensors are mapped from a file that will be removed.
        states.setdefault(int(index), {})[name] = tensor.clone()
    return dict(sorted(states.items()))


def _read_best(path: Path, history: list[Step], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters of the best adapter so far; none if nothing was evaluated."""
    if all(step.eval_loss is None for step in history):
        return []
    tensors, _ = read_tensors(path)
    if tensors.keys() != {str(index) for index in range(len(parameters))}:
        raise ValueError(f"it does not hold the {len(parameters)} parameters of the adapters")
    for index, parameter in enumerate(parameters):
        _check_values(str(index), tensors[str(index)], parameter)
    return [tensors[str(index)].clone() for index in range(len(parameters))]


def _check_states(states: States, parameters: list[Tensor], steps: int) -> None:
    if unknown := states.keys() - set(range(len(parameters))):
        raise ValueError(f"the run has no parameter {min(unknown)}")
    for index in range(len(parameters)):
        # After a step every parameter has one: the first step checks that it got a gradient.
        state = states.get(index, {})
        if missing := _NAMES - state.keys():
            raise ValueError(f"parameter {index} has no {', '.join(sorted(missing))}")
        for name in _MOMENTS:
            _check_values(f"{index}.{name}", state[name], parameters[index])
        _check_count(index, state["step"], steps)
        if bool((state["exp_avg_sq"] < 0).any()):
            raise ValueError(f"{index}.exp_avg_sq is negative")


def _check_values(key: str, values: Tensor, parameter: Tensor) -> None:
    if values.shape != parameter.shape:
        raise ValueError(f"{key} is {list(values.shape)}, not {list(parameter.shape)}")
    if values.dtype != torch.float32:
        raise ValueError(f"{key} holds {values.dtype}")
    if not bool(values.isfinite().all()):
        raise ValueError(f"{key} is not finite")


def _check_count(index: int, step: Tensor, steps: int) -> None:
    # A parameter that got no gradient in some step has taken fewer.
    if step.shape or step.dtype != torch.float32:
        raise ValueError(f"{index}.step is {list(step.shape)} of {step.dtype}")
    if not 0 <= step.item() <= steps or step.item() % 1:
        raise ValueError(f"{index}.step is not a number of steps up to {steps}")
