"""Closed forms that turn optimised values into weight updates: pure functions of tensors, in float64.

Shapes: n edits; keys have width k, values width d. Keys and residuals come one line an edit, ``(n, k)`` and ``(n, d)``;
an update is returned as factors ``(d, r)`` and ``(k, r)`` of ``Δ = left rightᵀ``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1024
"""Edits whose keys are added to a k × k system at once: bounds what is copied into float64."""


class NotFiniteError(ValueError):
    """What is to be solved for holds NaN or infinity."""


class SingularError(ValueError):
    """A system has no unique solution within rounding."""


def constrained(residual: Tensor, direction: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Rank-one update that maps one key exactly to its new value and moves other keys least.

    ROME, "Locating and Editing Factual Associations in GPT", Eq. 2: ``Δ = Λ (C⁻¹ k*)ᵀ`` with
    ``Λ = (v* − W k) / ((C⁻¹ k*)ᵀ k)``; the same closed form serves TOP (Eq. 3). As in the released codes the
    direction comes from the key's mean over the context templates while the constraint holds at the bare prompt's key.

    Args:
        residual: ``v* − W k``, shape ``(d,)``.
        direction: ``C⁻¹ k*``, shape ``(k,)``; its length does not matter.
        key: Key k at which ``(W + Δ) k = v*`` holds, shape ``(k,)``.

    Returns:
        Factors of ``Δ = left rightᵀ`` in float64, shapes ``(d, 1)`` and ``(k, 1)``.

    Raises:
        ValueError: The direction is orthogonal to the key, so no such update exists, or something is not finite.
    """
    residual, direction, key = double(residual), double(direction), double(key)
    _check_finite(residuals=residual, keys=key, directions=direction)
    right = direction / direction.norm()
    along = right @ key
    if not along.abs() > 1e-12 * key.norm():
        msg = "expected a key with a part along C⁻¹ k*, got one orthogonal to it (or zero)"
        raise ValueError(msg)
    return (residual / along)[:, None], right[:, None]


def least_squares(
    residual: Tensor, keys: Tensor, moment: Tensor, weight: float, ridge: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Update that maps the keys of a batch to their new values and moves other keys little: the k × k system.

    MEMIT, "Mass-Editing Memory in a Transformer", Eq. 14; JEEP, Eq. 10: ``Δ = R Kᵀ (λ C + K Kᵀ)⁻¹`` with ``R`` (d, n)
    and ``K`` (k, n) holding an edit a column. Backward stable at any condition of C, and needs no inverse of C;
    `woodbury` is the same update where the edits are few.

    Beside what it is given and returns it holds two k × k matrices, ``K R`` (k, d), and a block of keys.

    Args:
        residual: Rᵀ, ``v* − W k`` an edit, shape ``(n, d)``.
        keys: Kᵀ, shape ``(n, k)``.
        moment: C, the mean second moment, symmetric, shape ``(k, k)``.
        weight: λ > 0, in edits: what one unit of C weighs against one edit (``mom2_update_weight``).
        ridge: Added to the diagonal of C, in units of its mean.

    Returns:
        Factors of Δ in float64, shapes ``(d, r)`` and ``(k, r)`` with r = min(n, d): residuals and solved keys, or for
        more edits than d the identity and Δᵀ, so that never more than d columns are solved for.

    Raises:
        SingularError: ``λ C + K Kᵀ`` is singular.
        ValueError: Shapes do not fit, the weight is not positive, or something is not finite.
    """
    _check(residual, keys, positive=weight)
    _check_square("the second moment", moment, keys.shape[1])
    return _normal_equations(residual, keys, ridged(moment, ridge).mul_(weight))


def woodbury(residual: Tensor, keys: Tensor, whitened: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """`least_squares` by the n × n system of the batch, from keys that are already whitened.

    ``Kᵀ (λ C + K Kᵀ)⁻¹ = (λ I + Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹``: the push-through form of the Woodbury identity. Its error
    is below ε times the condition of C at any λ. (The textbook form, ``(λ C + K Kᵀ)⁻¹`` as a difference of two large
    matrices, is the one that keeps 2 digits at a condition of 1e12.)

    Args:
        residual: Rᵀ, shape ``(n, d)``.
        keys: Kᵀ, shape ``(n, k)``.
        whitened: ``C⁻¹ k`` an edit, shape ``(n, k)``; the keys themselves for C = I.
        weight: λ > 0.

    Returns:
        Factors of Δ in float64, shapes ``(d, n)`` and ``(k, n)``; the right one holds the whitened keys.

    Raises:
        SingularError: The system is singular: keys repeat, and λ is lost beside them.
        ValueError: As in `least_squares`.
    """
    _check(residual, keys, positive=weight)
    residual, whitened = double(residual), double(whitened)
    system = double(keys) @ whitened.T
    system.diagonal().add_(weight)
    return cholesky_solve(residual, cholesky(system)).T, whitened.T


def times(left: Tensor, right: Tensor) -> Tensor:
    """``left rightᵀ`` of an update's factors, in float64, with no product where the left one is the identity."""
    if left.shape[0] == left.shape[1] and torch.equal(left, torch.eye(len(left)).to(left)):
        return double(right).T
    return double(left) @ double(right).T


def woodbury_is_cheaper(n: int, d: int, k: int) -> bool:
    """Whether `woodbury` takes fewer multiplications than `least_squares`, C being factorised.

    Counted is where they differ: ``Kᵀ C⁻¹ K``, its Cholesky and its solve, against those of the k × k system.
    """
    return n < k and n * n * (k + n / 6 + d) < k * k * (k / 6 + min(n, d))


def null_space_projected(
    residual: Tensor, keys: Tensor, basis: Tensor, memory: Tensor | None, l2: float
) -> tuple[Tensor, Tensor]:
    """Update that leaves alone what the unedited model's keys span, and the keys of earlier edits as far as it can.

    The closed form of "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models", with ``P = U Uᵀ``:
    ``Δᵀ = [P (K Kᵀ + M) + L2 I]⁻¹ P K Rᵀ``. Solved as ``Δᵀ = U [Uᵀ (K Kᵀ + M) U + L2 I]⁻¹ Uᵀ K Rᵀ``, which is the same
    algebraically, symmetric and r × r, and makes ``Δ k = 0`` exact where ``P k = 0``. It is solved where the basis is.

    Args:
        residual: Rᵀ, shape ``(n, d)``.
        keys: Kᵀ, shape ``(n, k)``.
        basis: U, orthonormal columns, shape ``(k, r)``; see `KeyStatistics.null_space`.
        memory: M, the sum of ``k kᵀ`` over earlier edits, shape ``(k, k)``; None if there are none.
        l2: L2 ≥ 0, in units of squared keys; 0 only where the rest is regular.

    Returns:
        Factors of Δ in float64, shapes ``(d, m)`` and ``(k, m)``; m is n, or min(n, d) for the r × r system.

    Raises:
        SingularError: The system is singular.
        ValueError: Shapes do not fit, L2 is negative, or something is not finite.
    """
    _check(residual, keys)
    if not l2 >= 0:
        msg = f"expected L2 of at least 0, got {l2}"
        raise ValueError(msg)
    if basis.ndim != 2 or len(basis) != keys.shape[1]:
        msg = f"expected a basis of shape ({keys.shape[1]}, r), got {tuple(basis.shape)}"
        raise ValueError(msg)
    basis = double(basis)
    residual, reduced = residual.to(basis.device), double(keys).to(basis.device) @ basis
    n, r = reduced.shape
    if memory is None and l2 > 0 and n < r:
        left, right = woodbury(residual, reduced, reduced, l2)
    else:
        system = basis.new_zeros(r, r)
        if memory is not None:
            _check_square("the memory of earlier edits", memory, len(basis))
            system = basis.T @ (double(memory).to(basis.device) @ basis)
        system.diagonal().add_(l2)
        left, right = _normal_equations(residual, reduced, system)
    return left, basis @ right


def _normal_equations(residual: Tensor, keys: Tensor, system: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of ``R Kᵀ (S + K Kᵀ)⁻¹``; the keys are added to S in place, block by block."""
    for block in _blocks(keys):
        system.addmm_(block.T, block)
    n, d = residual.shape
    if n <= d:
        return double(residual).T, cholesky_solve(double(keys).T, cholesky(system))
    target = system.new_zeros(keys.shape[1], d)
    for block, wanted in zip(_blocks(keys), _blocks(residual), strict=True):
        target.addmm_(block.T, wanted)
    return torch.eye(d).to(target), cholesky_solve(target, cholesky(system))


def ridged(moment: Tensor, ridge: float = 0.0) -> Tensor:
    """``C + ridge · tr(C)/k · I``, a copy in float64; shape ``(k, k)``."""
    matrix = double(moment)
    matrix = matrix.clone() if matrix is moment else matrix
    matrix.diagonal().add_(ridge * matrix.diagonal().mean())
    return matrix


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of a symmetric matrix of which the lower half is read.

    A pivot's share of its diagonal entry is what the coordinates before it do not explain; a share within rounding of
    nothing means a singular matrix, whichever way the rounding fell.

    Args:
        matrix: Symmetric, float64, shape ``(k, k)``.

    Raises:
        SingularError: The matrix is not positive definite within rounding.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    least = 10 * len(matrix) * torch.finfo(matrix.dtype).eps
    if int(info) or not bool((factor.diagonal().square() > least * matrix.diagonal()).all()):
        msg = f"expected a positive definite {len(matrix)} × {len(matrix)} system, got one that is singular"
        raise SingularError(msg)
    return factor


def cholesky_solve(columns: Tensor, factor: Tensor) -> Tensor:
    """``(L Lᵀ)⁻¹ B`` for B of shape ``(k, m)``; unlike torch's own it does not copy L."""
    half = torch.linalg.solve_triangular(factor, columns, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solution


def double(tensor: Tensor) -> Tensor:
    """A tensor in float64; on the CPU where its own device has no such type (Apple's MPS)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _blocks(lines: Tensor) -> Iterator[Tensor]:
    return (double(lines[i : i + BLOCK]) for i in range(0, len(lines), BLOCK))


def _check(residual: Tensor, keys: Tensor, positive: float = 1.0) -> None:
    if residual.ndim != 2 or keys.ndim != 2 or len(residual) != len(keys):
        got = f"{tuple(residual.shape)} and {tuple(keys.shape)}"
        msg = f"expected residuals (n, d) and keys (n, k), a line an edit, got {got}"
        raise ValueError(msg)
    if not positive > 0:
        msg = f"expected a weight of the second moment above 0, got {positive}"
        raise ValueError(msg)
    _check_finite(residuals=residual, keys=keys)


def _check_finite(**tensors: Tensor) -> None:
    for what, tensor in tensors.items():
        if not tensor.isfinite().all():
            msg = f"expected finite {what}, got NaN or infinity among them"
            raise NotFiniteError(msg)


def _check_square(what: str, matrix: Tensor, width: int) -> None:
    if matrix.shape != (width, width):
        msg = f"expected {what} of shape ({width}, {width}) for keys of width {width}, got {tuple(matrix.shape)}"
        raise ValueError(msg)
