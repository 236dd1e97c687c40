"""Muon for the matrices of the blocks, Adam for everything else, with float32 masters of low-precision weights.

Muon orthogonalises the momentum of every matrix, which learns rare associations (facts) in far fewer steps than Adam;
see https://kellerjordan.github.io/posts/muon/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Pushes the singular values of matrices towards one by a Newton-Schulz iteration in bfloat16.

    Args:
        matrices: Stack of matrices of shape ``(n, rows, columns)``.
        steps: Iterations.

    Returns:
        Stack of the same shape, in bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    flat: Tensor = x.mT if tall else x
    return flat


class MuonAdam(Optimizer):
    """One optimiser of two rules, chosen by group.

    Args:
        matrices: Weights of shape ``(in, out)`` that Muon updates. One thrice as wide as high (GPT-2's fused query,
            key and value) is cut into its three squares.
        others: All other parameters, updated by Adam.
        lr: Learning rate of Muon; a step of 0.02 moves every matrix by about this share of a unit singular value.
        adam_lr: Learning rate of Adam.
        momentum: Nesterov momentum of Muon.
        betas: Decay rates of Adam.
        weight_decay: Decoupled weight decay of the Muon matrices.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        lr: float = 0.02,
        adam_lr: float = 0.004,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(matrices), "lr": lr, "muon": True},
            {"params": list(others), "lr": adam_lr, "muon": False},
        ]
        super().__init__(groups, {"momentum": momentum, "betas": betas, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; a closure is evaluated first, with gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if "master" not in self.state[p]:
                    self.state[p]["master"] = p.detach().float().clone()
            (self._muon if group["muon"] else self._adam)(group, parameters)
            for p in parameters:
                p.copy_(self.state[p]["master"])
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        pieces: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p in parameters:
            state = self.state[p]
            grad = _required(p.grad).float()
            buffer = state.setdefault("momentum", torch.zeros_like(grad))
            buffer.lerp_(grad, 1 - group["momentum"])
            update = grad.lerp(buffer, group["momentum"])
            state["master"].mul_(1 - group["lr"] * group["weight_decay"])
            width = p.shape[0] if p.shape[1] == 3 * p.shape[0] else p.shape[1]
            cuts = torch.split(update, width, 1), torch.split(state["master"], width, 1)
            for piece, master in zip(*cuts, strict=True):
                pieces.setdefault((piece.shape[0], piece.shape[1]), []).append((piece, master))
        for (rows, columns), items in pieces.items():
            scale = max(1.0, columns / rows) ** 0.5
            updates = orthogonalise(torch.stack([piece for piece, _ in items])).float()
            for update, (_, master) in zip(updates, items, strict=True):
                master.add_(update, alpha=-group["lr"] * scale)

    def _adam(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        for p in parameters:
            state = self.state[p]
            grad = _required(p.grad).float()
            state["step"] = state.get("step", 0) + 1
            first = state.setdefault("first", torch.zeros_like(grad)).lerp_(grad, 1 - beta1)
            second = state.setdefault("second", torch.zeros_like(grad)).lerp_(grad.square(), 1 - beta2)
            corrected = (second / (1 - beta2 ** state["step"])).sqrt_().add_(1e-10)
            state["master"].addcdiv_(first, corrected, value=-group["lr"] / (1 - beta1 ** state["step"]))


def _required(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad
