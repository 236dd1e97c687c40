"""Closed forms that turn optimised values into weight updates: pure functions of tensors, in float64."""

from __future__ import annotations

from torch import Tensor


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
        ValueError: The direction is orthogonal to the key, so no such update exists.
    """
    residual, direction, key = double(residual), double(direction), double(key)
    right = direction / direction.norm()
    along = right @ key
    if not along.abs() > 1e-12 * key.norm():
        msg = "expected a key with a part along C⁻¹ k*, got one orthogonal to it (or zero)"
        raise ValueError(msg)
    return (residual / along)[:, None], right[:, None]


def double(tensor: Tensor) -> Tensor:
    """A tensor in float64; on the CPU where its own device has no such type (Apple's MPS)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
