"""MEND's rule: a sum of rank-one pseudo-gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_lightning.hypernetworks.network import Factors, Hypernetwork, MENDBlock
from kedit_lightning.solvers import double


class MENDNetwork(Hypernetwork):
    """``Δ = α Σ g̃ k̃ᵀ`` over all tokens (Mitchell et al., 2022, https://arxiv.org/abs/2110.11309, Sec. 3).

    The sign is the released code's: α may come out negative, and the networks learn what goes with it.
    """

    block = MENDBlock
    additive = True

    @torch.no_grad()
    def update(self, name: str, factors: Factors) -> tuple[Tensor, Tensor]:
        """As in `Hypernetwork`; of more tokens than d the identity and Δᵀ."""
        step, (d, k) = double(self.step(name)), self.shapes[name]
        chunks = (self.pseudo(name, chunk) for chunk in factors.chunks(self.chunk, step.device))
        if len(factors.keys) > d:
            total = step.new_zeros(k, d)
            for keys, grads in chunks:
                total.addmm_(double(keys).T, double(grads))
            return torch.eye(d).to(total), step * total
        found = list(chunks)
        left, right = (torch.cat([double(chunk[i]) for chunk in found]) for i in (1, 0))
        return step * left.T, right.T

    def backward(self, name: str, factors: Factors, gradient: Tensor) -> None:
        """As in `Hypernetwork`: that of ``⟨∂L/∂W, Δ⟩``, chunk by chunk."""
        for chunk in factors.chunks(self.chunk, self.steps.device):
            keys, grads = self.pseudo(name, chunk)
            (self.step(name) * ((grads @ gradient.to(grads)) * keys).sum()).backward()  # type: ignore[no-untyped-call]
