"""Stages of a value optimisation: δ, what is minimised over it, when it ends, and how it went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kedit_lightning.edits import Site, Token

Terms = dict[str, Tensor]
"""Terms of a loss, factors counted, each of shape ``(n,)``: their sum is the loss."""


class ValueDelta(nn.Module):
    """δ, a vector an edit, added to the output of a site.

    Args:
        site: Where δ is added.
        token: At which token of each row.
        origin: v₀, the site's output on each edit's bare prompt, shape ``(n, d)``, float32.
        clamp_norm_factor: After each step ‖δ‖ is at most this times ‖v₀‖.
    """

    origin: Tensor

    def __init__(self, site: Site, token: Token, origin: Tensor, clamp_norm_factor: float) -> None:
        super().__init__()
        self.site, self.token, self.clamp_norm_factor = site, token, clamp_norm_factor
        self.delta = nn.Parameter(torch.zeros_like(origin))
        self.register_buffer("origin", origin, persistent=False)

    @property
    def value(self) -> Tensor:
        """v₀ + δ, shape ``(n, d)``."""
        return self.origin + self.delta.detach()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Scale every δ that is too long back to ``clamp_norm_factor · ‖v₀‖``."""
        norm = self.delta.norm(dim=1, keepdim=True)
        longest = self.clamp_norm_factor * self.origin.norm(dim=1, keepdim=True)
        self.delta.copy_(torch.where(norm > longest, self.delta * (longest / norm), self.delta))


@dataclass(frozen=True)
class Stage:
    """One optimisation: N loss evaluations and N − 1 updates, as every released code has it.

    Args:
        name: Prefix of its curves.
        deltas: What is optimised.
        loss: Gives the terms whose sum is the loss, each of shape ``(n,)``.
        steps: Loss evaluations N at most.
        stop: From the terms, which edits are done; shape ``(n,)``. They take no further update.
    """

    name: str
    deltas: tuple[ValueDelta, ...]
    loss: Callable[[], Terms]
    steps: int
    stop: Callable[[Terms], Tensor]


@dataclass
class Outcome:
    """How a stage ended, an entry an edit.

    Args:
        stage: The stage.
        pass_: Which pass of the edit batch.
        curves: Per loss evaluation the terms, each ``(n,)``; an edit's last entry is that of its δ.
        steps: Loss evaluations each edit took, ``(n,)``.
        deltas: What was optimised.
        residual: Distance of the edited model's values from those wanted, relative to the latter, summed over the δs;
            ``(n,)``.
    """

    stage: str
    pass_: int
    deltas: tuple[ValueDelta, ...] = ()
    curves: list[Terms] = field(default_factory=list)
    steps: Tensor = field(default_factory=lambda: torch.zeros(0))
    residual: Tensor | None = None

    def final(self, i: int) -> dict[str, float]:
        """Terms and number of loss evaluations of edit i when it stopped, ‖δ‖/‖v₀‖, and what is left after writing."""
        found = {term: float(values[i]) for term, values in self.curves[int(self.steps[i]) - 1].items()}
        for delta in self.deltas:
            found[f"delta/{delta.site.part}"] = float(delta.delta[i].detach().norm() / delta.origin[i].norm())
        if self.residual is not None:
            found["residual"] = float(self.residual[i])
        return {"steps": int(self.steps[i]), **found}


def below(threshold: float) -> Callable[[Terms], Tensor]:
    """Stopping rule: the loss, all terms and factors counted, is below a threshold."""
    return lambda terms: torch.stack(list(terms.values())).sum(dim=0) < threshold
