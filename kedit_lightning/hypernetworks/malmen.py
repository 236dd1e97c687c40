"""MALMEN's rule: the least-squares fit of many wanted changes of value, and its exact gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kedit_lightning import solvers
from kedit_lightning.hypernetworks.network import Factors, Hypernetwork, MALMENBlock, Shared
from kedit_lightning.solvers import double


class MALMENNetwork(Hypernetwork):
    """``Δ = Dᵀ K (KᵀK + e^λ I)⁻¹`` with ``d = −η (k·k̃) g̃`` a token (Tan et al., 2023, https://arxiv.org/abs/2311.04661).

    η is the step size; it and λ are learned for each matrix. Solved in float64.

    Args:
        shapes: As in `Hypernetwork`.
        rank: Likewise.
        n_blocks: Likewise.
        edit_lr: First η.
        networks: As in `Hypernetwork`.
    """

    block = MALMENBlock

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        rank: int,
        n_blocks: int,
        edit_lr: float,
        networks: Shared = "shape",
    ) -> None:
        super().__init__(shapes, rank, n_blocks, edit_lr, networks)
        self.log_ridge = nn.Parameter(torch.zeros(len(self.shapes)))

    def ridge(self, name: str) -> float:
        """e^λ of a matrix."""
        return float(self.log_ridge[list(self.shapes).index(name)].detach().double().exp())

    def wanted(self, name: str, factors: Factors) -> Tensor:
        """By how much each value of a chunk is to change, shape ``(T, d)``; differentiable in the network."""
        keys, grads = self.pseudo(name, factors)
        return -self.step(name) * (factors.keys * keys).sum(dim=1, keepdim=True) * grads

    @torch.no_grad()
    def update(self, name: str, factors: Factors) -> tuple[Tensor, Tensor]:
        """As in `Hypernetwork`."""
        return ridge_update(self._all_wanted(name, factors), factors.keys.to(self.steps.device), self.ridge(name))

    @torch.no_grad()
    def _all_wanted(self, name: str, factors: Factors) -> Tensor:
        chunks = factors.chunks(self.chunk, self.steps.device)
        return torch.cat([self.wanted(name, chunk) for chunk in chunks])

    def backward(self, name: str, factors: Factors, gradient: Tensor) -> None:
        """As in `Hypernetwork`: through the normal equation in closed form, through the network chunk by chunk."""
        keys, device, ridge = factors.keys, self.steps.device, self.ridge(name)
        of_wanted, of_ridge = ridge_gradients(gradient, self._all_wanted(name, factors), keys.to(device), ridge)
        (self.log_ridge[list(self.shapes).index(name)] * (ridge * of_ridge)).backward()  # type: ignore[no-untyped-call]
        for chunk, wanted in zip(factors.chunks(self.chunk, device), torch.split(of_wanted, self.chunk), strict=True):
            (wanted.to(device) * self.wanted(name, chunk)).sum().backward()  # type: ignore[no-untyped-call]


def ridge_update(values: Tensor, keys: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Update that changes the values at keys by what is wanted, in the sense of least squares with a ridge.

    Args:
        values: D, shape ``(T, d)``.
        keys: K, shape ``(T, k)``.
        ridge: ρ > 0.

    Returns:
        Factors of ``Δ = Dᵀ K (KᵀK + ρ I)⁻¹`` in float64, shapes ``(d, r)`` and ``(k, r)``.

    Raises:
        ValueError: As of `solvers.least_squares`.
    """
    (n, d), k = values.shape, keys.shape[1]
    if solvers.woodbury_is_cheaper(n, d, k):
        return solvers.woodbury(values, keys, keys, ridge)
    return solvers.least_squares(values, keys, torch.eye(k, dtype=torch.float64, device=keys.device), ridge)


def ridge_gradients(gradient: Tensor, values: Tensor, keys: Tensor, ridge: float) -> tuple[Tensor, float]:
    """What ``⟨G, Δ⟩`` of `ridge_update` changes by, with the values wanted and with the ridge.

    ``∂/∂D = K A`` with ``A = (KᵀK + ρ I)⁻¹ Gᵀ``, and ``∂/∂ρ = −⟨A, Δᵀ⟩``: exact, by the T × T or the k × k system,
    whichever is smaller, block by block.

    Args:
        gradient: G, shape ``(d, k)``.
        values: D, shape ``(T, d)``.
        keys: K, shape ``(T, k)``.
        ridge: ρ > 0.

    Returns:
        The gradient in D, of its type and shape ``(T, d)``, and the one in ρ; solved in float64.
    """
    gradient, (n, k) = double(gradient).to(keys.device), keys.shape
    if n < k:
        lines = double(keys)
        system = lines @ lines.T
        system.diagonal().add_(ridge)
        solved = solvers.cholesky_solve(
            torch.cat([lines @ gradient.T, double(values)], dim=1), solvers.cholesky(system)
        )
        of_values, left = solved.chunk(2, dim=1)
        return of_values.to(values), -float((of_values * left).sum())
    system = torch.zeros(k, k, dtype=torch.float64, device=keys.device)
    target = torch.zeros(k, values.shape[1], dtype=torch.float64, device=keys.device)
    system.diagonal().add_(ridge)
    for key, value in zip(torch.split(keys, solvers.BLOCK), torch.split(values, solvers.BLOCK), strict=True):
        system.addmm_(double(key).T, double(key))
        target.addmm_(double(key).T, double(value))
    factor = solvers.cholesky(system)
    spread, update = solvers.cholesky_solve(gradient.T, factor), solvers.cholesky_solve(target, factor)
    of_values = torch.cat([(double(key) @ spread).to(values) for key in torch.split(keys, solvers.BLOCK)])
    return of_values, -float((spread * update).sum())
