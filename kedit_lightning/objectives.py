"""Terms of the value losses: pure functions of tensors, in float32.

The loss of seven editors is ``nll + kl_factor · essence_kl + v_weight_decay · ‖δ‖ / ‖v₀‖²``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pairwise_distance


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of target tokens: ROME Eq. 4 and TOP Eq. 5, first term, before its means.

    Args:
        logits: Next-token logits before each target token, shape ``(p, vocabulary)``.
        targets: The target tokens, shape ``(p,)``.

    Returns:
        Nats, shape ``(p,)``.
    """
    return -logits.float().log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]


def essence_kl(log_p: Tensor, reference: Tensor) -> Tensor:
    """Divergence of the edited from the unedited next-token distribution at "{subject} is a".

    ROME Eq. 4, second term: ``D_KL(P_δ ‖ P_0)``.

    Args:
        log_p: Log-probabilities with δ, shape ``(n, vocabulary)``.
        reference: Log-probabilities without, shape ``(n, vocabulary)``.

    Returns:
        Nats, shape ``(n,)``.
    """
    divergence: Tensor = (log_p.exp() * (log_p - reference)).sum(dim=-1)
    return divergence


def weight_decay(delta: Tensor, origin: Tensor) -> Tensor:
    """Norm of δ over the squared norm of the value it is added to, as every released code has it.

    Args:
        delta: δ, shape ``(n, d)``. The gradient at δ = 0 is 0.
        origin: v₀, shape ``(n, d)``.

    Returns:
        ``‖δ‖ / ‖v₀‖²``, shape ``(n,)``.
    """
    decay: Tensor = delta.norm(dim=-1) / origin.norm(dim=-1).square()
    return decay


def scored_l1(delta: Tensor, score: Tensor, eps: float = 1e-6) -> Tensor:
    """The weighted L1 norm of the scored elastic net: what matters little to the edit costs much (EAC Eq. 5).

    Args:
        delta: What is kept small, shape ``(n, …)``.
        score: How much each entry matters, not negative, of the same shape; no gradient flows into it.
        eps: Added to the scores.

    Returns:
        ``Σᵢ |δᵢ| / (scoreᵢ + eps)``, shape ``(n,)``.
    """
    weighted: Tensor = (delta.abs() / (score.detach() + eps)).flatten(start_dim=1).sum(dim=1)
    return weighted


def distance(vectors: Tensor, targets: Tensor) -> Tensor:
    """Distance between a hidden state and the one wanted there, TOP Eq. 14 (1e-6 is added to each difference).

    Args:
        vectors: Shape ``(n, d)``.
        targets: Shape ``(n, d)``.

    Returns:
        ``‖vectors − targets + 1e-6‖₂``, shape ``(n,)``.
    """
    return pairwise_distance(vectors, targets)


def sum_over_rows(values: Tensor, edit: Tensor, n: int) -> Tensor:
    """Sum of row values over each edit's rows; 0 where it has none.

    Args:
        values: One value a row, shape ``(b,)``.
        edit: The edit of each row, shape ``(b,)``.
        n: Number of edits.

    Returns:
        Shape ``(n,)``.
    """
    return values.new_zeros(n).index_add(0, edit, values)


def mean_over_rows(values: Tensor, edit: Tensor, n: int) -> Tensor:
    """Mean of row values over each edit's rows.

    Args:
        values: One value a row, shape ``(b,)``.
        edit: The edit of each row, shape ``(b,)``.
        n: Number of edits.

    Returns:
        Shape ``(n,)``.
    """
    return sum_over_rows(values, edit, n) / torch.bincount(edit, minlength=n)
