"""The reference of AdamW against PyTorch's own."""

import torch
from helpers import gaussian

from minilora.optim import reference as adamw


def test_ten_steps_equal_pytorchs_adamw_within_rounding() -> None:
    p = gaussian(11, 7, dtype=torch.float64)
    theirs = p.clone().requires_grad_()
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    optimizer = torch.optim.AdamW([theirs], foreach=False, fused=False, **options)  # type: ignore[arg-type]
    m, v, eps = torch.zeros_like(p), torch.zeros_like(p), 2**-52
    for t in range(1, 11):
        grad = gaussian(11, 7, dtype=torch.float64, seed=t)
        theirs.grad = grad.clone()
        optimizer.step()
        p, m, v = adamw.step(p, grad, m, v, t, **options)  # type: ignore[arg-type]
        state = optimizer.state[theirs]

        # Some 4 roundings per step in each, of numbers no larger than 5 (the gradients), 25 (their
        # squares) and 5 (p).
        assert (m - state["exp_avg"]).abs().max() <= 8 * t * eps * 5
        assert (v - state["exp_avg_sq"]).abs().max() <= 8 * t * eps * 25
        assert (p - theirs).abs().max() <= 8 * t * eps * 5
