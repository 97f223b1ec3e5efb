r"""Tolerances that are derived and not tuned: a float64 value, and the variance of its rounding.

Rounding to a dtype with unit roundoff u moves a number x by at most u |x|. Such errors are as often
up as down and independent, so their variances add up, where worst cases would exceed every result
after a few layers (Higham & Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019).
For a product a b of K terms, one operand of which may be rounded first (a 4-bit weight that is
dequantized), summed in float32 (unit roundoff v), with the result rounded:

    Var(a b) = Var(a) b^2 + a^2 Var(b) + Var(a) Var(b) + (u^2 + K v^2) a^2 b^2 + (u (a b))^2

where squares are of elements and products of matrices. An error is within 8 standard deviations:
for a Gaussian that fails once in 10^15.
"""

import dataclasses

import torch
from torch import Tensor

DEVIATIONS = 8


@dataclasses.dataclass
class Rounded:
    """A float64 value, and the variance of the error with which `dtype` computes it."""

    value: Tensor
    variance: Tensor
    dtype: torch.dtype

    @classmethod
    def exact(cls, t: Tensor) -> "Rounded":
        """An input: it has no error."""
        value = t.detach().double()
        return cls(value, torch.zeros_like(value), t.dtype)

    @property
    def T(self) -> "Rounded":  # noqa: N802 - as of a tensor
        return Rounded(self.value.T, self.variance.T, self.dtype)

    def _rounded(self, value: Tensor, variance: Tensor) -> "Rounded":
        u = torch.finfo(self.dtype).eps / 2
        return Rounded(value, variance + (u * value).square(), self.dtype)

    def __matmul__(self, other: "Rounded") -> "Rounded":
        u, v = torch.finfo(self.dtype).eps / 2, 2**-24
        terms = self.value.shape[-1]
        a2, b2 = self.value.square(), other.value.square()

        variance = self.variance @ b2 + a2 @ other.variance + self.variance @ other.variance
        variance = variance + (u * u + terms * v * v) * (a2 @ b2)
        return self._rounded(self.value @ other.value, variance)

    def __add__(self, other: "Rounded") -> "Rounded":
        return self._rounded(self.value + other.value, self.variance + other.variance)

    def __mul__(self, scale: float) -> "Rounded":
        return self._rounded(scale * self.value, scale * scale * self.variance)

    def relu(self) -> "Rounded":
        """max(0, value). It does not enlarge an error."""
        return Rounded(self.value.clamp(min=0), self.variance, self.dtype)

    def relu_backward(self, gradient: "Rounded") -> "Rounded":
        """The gradient through `relu`: it may be there or not where the sign is not certain."""
        positive = self.value > 0
        uncertain = self.value.square() <= DEVIATIONS**2 * self.variance

        value = torch.where(positive, gradient.value, 0.0)
        variance = torch.where(positive | uncertain, gradient.variance, 0.0)
        either = torch.where(uncertain, gradient.value.square(), 0.0)
        return Rounded(value, variance + either, self.dtype)

    def deviations(self, computed: Tensor) -> Tensor:
        """The errors of a computed tensor, in standard deviations."""
        error = computed.detach().to(self.value.device).double() - self.value
        return (error.abs() / self.variance.sqrt()).nan_to_num(0.0)

    def admits(self, computed: Tensor) -> bool:
        """Whether every element of a computed tensor is within the tolerance."""
        return bool((self.deviations(computed) <= DEVIATIONS).all())
