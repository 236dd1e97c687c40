"""The matrix of a second moment: whether it is one, its Cholesky factor, and how well that is conditioned."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_lightning import solvers
from kedit_lightning.errors import StatisticsError

ASYMMETRY = 1e-3
"""How far mirror images may lie apart, in units of the largest diagonal entry: float32 sums over many keys round."""


def symmetric(c: Tensor, name: str) -> Tensor:
    """The matrix itself, once it is known to be finite and symmetric.

    Args:
        c: C, shape ``(k, k)``.
        name: Whose keys' second moment it is, for messages.

    Raises:
        StatisticsError: It is not.
    """
    if c.ndim != 2 or c.shape[0] != c.shape[1]:
        msg = f"the second moment of {name}: expected a square matrix, got shape {tuple(c.shape)}"
        raise StatisticsError(msg)
    scale = float(c.diagonal().abs().max())
    for i in range(0, len(c), solvers.BLOCK):
        rows, columns = c[i : i + solvers.BLOCK], c[:, i : i + solvers.BLOCK].T
        if not rows.isfinite().all():
            msg = f"the second moment of {name} has entries that are not finite; compute it again"
            raise StatisticsError(msg)
        if (apart := float((rows - columns).abs().max())) > ASYMMETRY * scale:
            msg = (
                f"the second moment of {name}: expected a symmetric matrix, got entries that differ from "
                f"their mirror images by {apart:.1e} beside a diagonal up to {scale:.1e}; compute it again"
            )
            raise StatisticsError(msg)
    return c


def factorise(mean: Tensor, ridge: float = 0.0) -> Tensor:
    """Lower Cholesky factor of ``C + ridge · tr(C)/k · I`` in float64.

    Args:
        mean: C, symmetric, shape ``(k, k)``.
        ridge: What is added to the diagonal, in units of its mean.

    Returns:
        L with ``L Lᵀ = C + …``, shape ``(k, k)``.

    Raises:
        SingularError: The matrix is not positive definite.
    """
    return solvers.cholesky(solvers.ridged(mean, ridge))


def condition(factor: Tensor, iterations: int = 20) -> float:
    """Estimate of the condition number of ``L Lᵀ`` by power iterations; it is a lower bound.

    Args:
        factor: L, lower triangular, shape ``(k, k)``.
        iterations: Steps for the largest and for the smallest eigenvalue; a step costs O(k²).
    """
    start = torch.randn(len(factor), 1, dtype=factor.dtype, generator=torch.Generator().manual_seed(0))
    high = low = start.to(factor.device)
    largest = smallest = 0.0
    for _ in range(iterations):
        high, low = factor @ (factor.T @ (high / high.norm())), solvers.cholesky_solve(low / low.norm(), factor)
        largest, smallest = float(high.norm()), 1 / float(low.norm())
    return largest / smallest
