"""How the next token is chosen: the most likely one, or a draw from the likely ones.

A draw uses a random generator of its own on the CPU, so that a seed gives the same random numbers
on every device and the caller's random state stays as it is. The answers are the same as far as the
logits are: devices round sums differently, and in 16 bits two tokens that are almost equally likely
may change places.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How each token of an answer is chosen.

    Attributes:
        temperature: Divides the logits: low values make likely tokens likelier; 0 always takes the
            most likely one (greedy).
        top_p: Draw from the most likely tokens only, the smallest set of them with at least this
            total probability (nucleus sampling).
        seed: Seed of the draws.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> Sampling(temperature=0.7, top_p=0.9)
        Sampling(temperature=0.7, top_p=0.9, seed=0)
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 0.01 <= self.temperature <= 100:
            raise ValueError(
                f"temperature={self.temperature}: must be 0 (greedy), or from 0.01 to 100"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be more than 0 and at most 1")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: must be from -2^63 to 2^63 - 1")

    def with_next_seed(self) -> "Sampling":
        """The same choices with other draws. The smallest seed follows the largest."""
        largest = 2**63 - 1
        return replace(self, seed=self.seed + 1 if self.seed < largest else -largest - 1)


GREEDY = Sampling()

_SMALLEST = torch.finfo(torch.float32).tiny


class Draws:
    r"""Adds noise to a batch's logits, so that their argmax is a draw (the Gumbel-max trick).

    With g_i = -log(e_i) and e_i drawn from Exp(1), argmax_i (z_i + g_i) is token i with probability
    softmax(z)_i (Maddison et al. 2014, arXiv:1411.0030). Here z are the logits divided by the
    temperature, and -infinity outside of the nucleus.

    Args:
        sampling: how to choose.
        numbers: the number of each prompt, which is added to the seed: what is drawn for a prompt
            does not depend on the batch that it is in.
    """

    def __init__(self, sampling: Sampling, numbers: Sequence[int]) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator().manual_seed(sampling.seed + n) for n in numbers]

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Returns the logits [batch, vocabulary] of the next token, with noise added."""
        if self.sampling.temperature == 0:
            return logits

        z = nucleus(logits.float() / self.sampling.temperature, self.sampling.top_p)
        e = torch.stack([self._exponential(z.shape[1], g) for g in self.generators])
        return z - e.log().to(z.device)

    @staticmethod
    def _exponential(size: int, generator: torch.Generator) -> Tensor:
        # 0 would be drawn for certain.
        return torch.empty(size).exponential_(generator=generator).clamp_min(_SMALLEST)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Returns logits that are -infinity outside of the smallest set with probability `top_p`.

    Args:
        logits: [batch, vocabulary].
        top_p: the probability; at 1 nothing is left out.

    Example:
        >>> nucleus(torch.tensor([[0.5, 0.3, 0.2]]).log(), top_p=0.6).exp()
        tensor([[0.5000, 0.3000, 0.0000]])
    """
    if top_p == 1:
        return logits
    likely_first, order = logits.sort(dim=-1, descending=True)
    probability = likely_first.softmax(-1)

    # A token is left out if those before it are enough already.
    left_out = probability.cumsum(-1) - probability >= top_p
    return logits.masked_fill(left_out.scatter(-1, order, left_out), -torch.inf)
