"""What PagedAdamW refuses: options, parameters and gradients, by name, before anything changes."""

import copy
from typing import Any

import pytest
import torch
from small_models import assert_equal, paged_adamw, small_model
from torch import nn

from minilora import PagedAdamW


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"lr": torch.tensor(0.1)}, TypeError, "lr is a tensor: pass a Python number"),
        ({"betas": (torch.tensor(0.9), 0.99)}, TypeError, r"betas\[0\] is a tensor"),
        ({"lr": -1.0}, ValueError, "lr=-1.0: must be at least 0"),
        ({"lr": float("nan")}, ValueError, "lr=nan: must be at least 0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]=1.0: must be at least 0 and less than 1"),
        ({"eps": -1e-8}, ValueError, "eps=-1e-08"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1"),
        ({"page": "auto"}, ValueError, "page='auto': must be one of"),
    ],
)
def test_options_out_of_range_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        PagedAdamW(small_model().parameters(), **options)

    optimizer = paged_adamw(small_model())
    if "page" not in options:
        with pytest.raises(error, match=says):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
        assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("flag", ["amsgrad", "maximize", "capturable", "differentiable"])
def test_what_is_not_supported_is_refused_by_name(flag: str) -> None:
    with pytest.raises(ValueError, match=f"{flag}=True is not supported by PagedAdamW"):
        PagedAdamW([{"params": small_model().parameters(), flag: True}])


def test_complex_parameters_and_sparse_gradients_are_refused_before_anything_changes() -> None:
    with pytest.raises(TypeError, match=r"a parameter of shape \(2,\) is torch.complex64"):
        PagedAdamW([torch.ones(2, dtype=torch.complex64, requires_grad=True)])

    embedding = nn.Embedding(4, 2, sparse=True)
    linear = nn.Linear(2, 2)
    optimizer = PagedAdamW([*linear.parameters(), *embedding.parameters()])
    linear(embedding(torch.tensor([1]))).sum().backward()
    before = copy.deepcopy(linear.state_dict())

    says = r"gradient of a parameter of shape \(4, 2\) is sparse: use nn.Embedding\(sparse=False\)"
    with pytest.raises(TypeError, match=says):
        optimizer.step()
    assert_equal(dict(linear.state_dict()), dict(before))

    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    with pytest.raises(TypeError, match="lr is a tensor"):
        optimizer.step()
    assert not optimizer.state
