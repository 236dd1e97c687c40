"""A weight of the model that is trained in its place, and the ball it stays in."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TunedWeight(nn.Module):
    """W, a weight of the base model that is trained in its place, in float32 and math orientation.

    Args:
        name: The weight's name among the model's parameters.
        origin: W₀, the weight as it stands, shape ``(out, in)``; of a bias ``(out, 1)``.
        norm_constraint: ε: each entry of W stays within ε of W₀'s; None: wherever it goes.
    """

    origin: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, name: str, origin: Tensor, norm_constraint: float | None = None) -> None:
        super().__init__()
        self.name = name
        self.value = nn.Parameter(origin.clone())
        radius = math.inf if norm_constraint is None else norm_constraint
        self.register_buffer("origin", origin.clone(), persistent=False)
        self.register_buffer("low", -_highest(-origin, radius), persistent=False)
        self.register_buffer("high", _highest(origin, radius), persistent=False)
        self._gradients: Tensor | float = 0.0
        self._seen = 0

    @torch.no_grad()
    def clamp_(self) -> None:
        """Put every entry that has left the ball on its surface (L∞)."""
        self.value.clamp_(self.low, self.high)

    @property
    def delta(self) -> Tensor:
        """Δ, rounded such that W₀ + Δ in float32 is in the ball; shape ``(out, in)``."""
        with torch.no_grad():
            delta = self.value - self.origin
            written = self.origin + delta
            inwards = torch.where(written > self.high, -math.inf, math.inf)
            return torch.where((written > self.high) | (written < self.low), delta.nextafter(inwards), delta)

    def observe(self) -> None:
        """Add the present gradient to those that the score is taken of."""
        assert self.value.grad is not None
        self._gradients, self._seen = self._gradients + self.value.grad.detach(), self._seen + 1

    @property
    def score(self) -> Tensor:
        """``|mean gradient ⊙ Δ|``: how much each entry matters to the edits (EAC); shape ``(out, in)``."""
        return (self._gradients / max(self._seen, 1) * self.delta).abs()


def _highest(origin: Tensor, radius: float) -> Tensor:
    """The highest float32 numbers that are not above ``origin + radius``."""
    if radius == math.inf:
        return origin.new_tensor(math.inf)
    exact = origin.double() + radius
    rounded = exact.float()
    return torch.where(rounded > exact, rounded.nextafter(rounded.new_tensor(-math.inf)), rounded)
