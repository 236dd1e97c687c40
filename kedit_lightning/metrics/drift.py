"""How far edited weight matrices have moved from their unedited selves."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

MEASURES = ("l1", "l1_change", "frobenius", "spectral")
"""What `weight_drift` tells of a matrix."""

EXACT = 512
"""Up to this smaller side, spectral norms are taken from all singular values."""

BLOCK, ITERATIONS = 8, 100
"""Vectors that are iterated together, and how often at most."""


def weight_drift(before: Tensor, after: Tensor) -> dict[str, float]:
    """Relative drift of one matrix.

    Args:
        before: The unedited matrix W₀, shape ``(out, in)``.
        after: The edited matrix W, same shape.

    Returns:
        ``l1``: (‖W‖₁ − ‖W₀‖₁) / ‖W₀‖₁ with the entrywise norm ‖W‖₁ = Σ |wᵢⱼ|, the drift of EAC's Fig. 2, which is
        negative where a matrix shrinks; ``l1_change``: ‖W − W₀‖₁ / ‖W₀‖₁; ``frobenius``: ‖W − W₀‖_F / ‖W₀‖_F;
        ``spectral``: ‖W − W₀‖₂ / ‖W₀‖₂, the largest singular values. Nothing is relative to a W₀ of zeros (a bias that
        was never trained): all four are 0 then, wherever W is finite; see `WeightDrift` for several matrices.

    Example:
        >>> weight_drift(torch.eye(4), torch.diag(torch.tensor([1.0, 1.0, 1.0, 3.0])))
        {'l1': 0.5, 'l1_change': 0.5, 'frobenius': 1.0, 'spectral': 2.0}
    """
    metric = WeightDrift()
    metric.update(before, after)
    return {measure: float(value) for measure, value in metric.compute().items()}


@torch.no_grad()
def spectral_norm(matrix: Tensor, tol: float = 1e-3) -> float:
    """Largest singular value: exact for small matrices, by subspace iteration for large ones.

    Args:
        matrix: Shape ``(m, n)``; computed in float32 on its device.
        tol: Of large matrices: the iteration ends when ‖AᵀA v − σ² v‖ ≤ tol σ², which holds σ within tol / 2 of a
            singular value, in practice the largest and far closer.

    Returns:
        σ, or nan where an entry is not finite.

    Example:
        >>> spectral_norm(torch.diag(torch.tensor([3.0, 4.0])))
        4.0
    """
    if not bool(matrix.isfinite().all()):
        return math.nan
    matrix = matrix.float().reshape(len(matrix), -1)  # a bias is a matrix of one column
    if min(matrix.shape) <= EXACT:
        return float(torch.linalg.matrix_norm(matrix, 2))
    largest = float(matrix.abs().max()) or 1.0
    matrix = matrix / largest  # squares of what is huge or tiny leave float32
    start = torch.randn(matrix.shape[1], BLOCK, generator=torch.Generator().manual_seed(0))
    basis, sigma = start.to(matrix.device), 0.0
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(basis).Q
        image = matrix @ basis
        _, values, rotation = torch.linalg.svd(image, full_matrices=False)
        sigma, back = float(values[0]), matrix.T @ image
        residual = back @ rotation[0] - sigma**2 * (basis @ rotation[0])
        if float(residual.norm()) <= tol * sigma**2:
            break
        basis = back
    return sigma * largest


class WeightDrift(Metric):
    """Relative drift of several matrices together, as if all were one; the spectral one is the largest among them.

    Called with a matrix it gives the drift of that one; `compute` gives that of all, where the change of one that was
    all zeros counts but for the spectral drift. The curve over edits is one such metric a point (EAC, Fig. 2).
    Processes that hold different layers add up.
    """

    full_state_update = False
    higher_is_better = False
    l1_before: Tensor
    l1_after: Tensor
    l1_change: Tensor
    squares_before: Tensor
    squares_change: Tensor
    spectral: Tensor

    def __init__(self, *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        for name in ("l1_before", "l1_after", "l1_change", "squares_before", "squares_change"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("spectral", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max")

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add a matrix.

        Args:
            before: The unedited matrix, shape ``(out, in)``.
            after: The edited matrix, same shape.
        """
        before, after = before.float(), after.float()
        change = after - before
        for name, value in {
            "l1_before": before.abs().sum(dtype=torch.float64),
            "l1_after": after.abs().sum(dtype=torch.float64),
            "l1_change": change.abs().sum(dtype=torch.float64),
            "squares_before": torch.linalg.vector_norm(before, dtype=torch.float64) ** 2,
            "squares_change": torch.linalg.vector_norm(change, dtype=torch.float64) ** 2,
        }.items():
            setattr(self, name, getattr(self, name) + value.to(self.device))
        of_change, of_before = torch.tensor([spectral_norm(change), spectral_norm(before)], dtype=torch.float64)
        self.spectral = torch.maximum(self.spectral, _relative(of_change, of_before).to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """The measures of `weight_drift`, each of shape ``()``."""
        return {
            "l1": _relative(self.l1_after - self.l1_before, self.l1_before),
            "l1_change": _relative(self.l1_change, self.l1_before),
            "frobenius": _relative(self.squares_change, self.squares_before).sqrt(),
            "spectral": self.spectral,
        }


def _relative(change: Tensor, before: Tensor) -> Tensor:
    """Their quotient; 0 where there was nothing before and the change is finite."""
    return torch.where(before == 0, 0 * change, change / before)
