"""A small network, optimizers for it in two parameter groups, and a training of a few steps."""

from typing import Any

import torch
from helpers import same_bits
from torch import Tensor, nn

from minilora import PagedAdamW

Optimizer = PagedAdamW | torch.optim.AdamW


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": list(model.get_submodule("0").parameters()), "weight_decay": 0.3},
        {"params": list(model.get_submodule("2").parameters()), "lr": 1e-2},
    ]


def paged_adamw(model: nn.Module, page: str = "on_oom") -> PagedAdamW:
    return PagedAdamW(groups(model), lr=3e-3, page=page)  # type: ignore[arg-type]


def torch_adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(model), lr=3e-3)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 5, generator=generator)
    return model(x).square().sum()  # type: ignore[no-any-return]


def train(model: nn.Module, optimizer: Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()


def assert_equal(found: Any, expected: Any) -> None:
    """Nested dicts and lists are equal, tensors in them bit for bit and on the same device."""
    assert type(found) is type(expected)
    if isinstance(found, Tensor):
        assert found.device == expected.device
        assert same_bits(found, expected)
    elif isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_equal(found[key], expected[key])
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected)
        for f, e in zip(found, expected, strict=True):
            assert_equal(f, e)
    else:
        assert found == expected


def assert_same_models(found: nn.Module, expected: nn.Module) -> None:
    assert_equal(dict(found.state_dict()), dict(expected.state_dict()))
