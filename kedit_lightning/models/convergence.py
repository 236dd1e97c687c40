"""When a second moment is known well enough: what another doubling of the tokens still changes."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_lightning.edits import Site
from kedit_lightning.models.factors import factorise
from kedit_lightning.solvers import double


class Convergence:
    """Relative change of ``C⁻¹ k`` on held-out keys from one doubling of the tokens to the next.

    Nothing is added to the diagonal of C. While C is singular there is nothing to compare.

    Args:
        keys: For each site n keys that are not in C, shape ``(n, k)``.
    """

    def __init__(self, keys: dict[Site, Tensor]) -> None:
        self.keys = keys
        self.before: dict[Site, Tensor] = {}
        self.changes: dict[Site, dict[int, float]] = {site: {} for site in keys}

    def update(self, site: Site, mean: Tensor, count: int) -> float | None:
        """Compare with C before the doubling.

        Args:
            site: Whose C.
            mean: C, shape ``(k, k)``.
            count: Keys in it.

        Returns:
            The median over the keys of ``‖C⁻¹k - C₀⁻¹k‖ / ‖C⁻¹k‖``; None where there is nothing to compare yet.
        """
        before = self.before.pop(site, None)
        solved = _solve(mean, self.keys[site]) if count >= len(mean) else None
        if solved is None:
            return None
        self.before[site] = solved
        if before is None:
            return None
        change = float(((solved - before.to(solved)).norm(dim=1) / solved.norm(dim=1)).median())
        self.changes[site][count] = change
        return change


def _solve(mean: Tensor, keys: Tensor) -> Tensor | None:
    """``C⁻¹ k`` in float64, shape ``(n, k)``, on the device of C if it has room, else on the CPU."""
    try:
        factor = factorise(double(mean))
        return torch.cholesky_solve(double(keys).to(factor.device).T, factor).T
    except ValueError:
        return None
    except torch.OutOfMemoryError:
        return None if mean.device.type == "cpu" else _solve(mean.cpu(), keys)
