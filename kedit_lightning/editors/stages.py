"""Stages of a value optimisation: δ, what is minimised over it, when it ends, and how it went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kedit_lightning.edits import Site, Token
from kedit_lightning.models.processes import ranks, summed

Terms = dict[str, Tensor]
"""Terms of a loss, factors counted, each of shape ``(m,)``: their sum is the loss."""


@dataclass(frozen=True)
class Loss:
    """One evaluation of a stage's loss for m edits; of several processes each has its share, and all add up to it.

    Args:
        terms: Its terms, factors counted, each of shape ``(m,)``.
        probability: Mean over an edit's rows of the target's probability (geometric mean over its tokens), ``(m,)``;
            None where the loss has no target.
        missed: How many tokens of an edit's target, in all its rows, are not the likeliest ones, ``(m,)``.
    """

    terms: Terms
    probability: Tensor | None = None
    missed: Tensor | None = None

    def summed(self) -> Loss:
        """The whole of it: the shares of all processes, without gradient; itself where there is one."""
        if ranks()[1] == 1:
            return self
        rest = {"probability": self.probability, "missed": self.missed}
        there = {name: value for name, value in rest.items() if value is not None}
        whole = summed(torch.stack([value.detach().float() for value in (*self.terms.values(), *there.values())]))
        terms = dict(zip(self.terms, whole, strict=False))
        return Loss(terms, **dict(zip(there, whole[len(terms) :], strict=True)))

    @property
    def certain(self) -> Tensor | None:
        """Whether all tokens of an edit's target are the likeliest ones in all its rows, ``(m,)``."""
        return None if self.missed is None else self.missed == 0

    @property
    def total(self) -> Tensor:
        """The loss, shape ``(m,)``."""
        return torch.stack(list(self.terms.values())).sum(dim=0)


Stop = Callable[[Loss], Tensor]
"""Stopping rule: which edits are done, shape ``(m,)``."""


class ValueDelta(nn.Module):
    """δ, a vector an edit, added to the output of a site.

    The n edits of a batch are optimised part by part, as many together as memory takes: `delta` and `origin` are the
    lines of the m edits under way, and of all n when it is over.

    Args:
        site: Where δ is added.
        token: At which token of each row.
        shape: ``(n, d)``.
        clamp_norm_factor: After each step ‖δ‖ is at most this times ‖v₀‖.
        v_weight_decay: Factor of ``‖δ‖ / ‖v₀‖²``.
        name: Tells the δs of a loss apart in curves and records; empty where there is no need.
        written_at: The site whose output is to become v₀ + δ by the weight update; by default ``site``.

    Attributes:
        anchors: The coordinates that move, booleans of shape ``(n, d)``; None: all of them.
    """

    def __init__(
        self,
        site: Site,
        token: Token,
        shape: tuple[int, int],
        clamp_norm_factor: float,
        v_weight_decay: float,
        name: str = "",
        written_at: Site | None = None,
    ) -> None:
        super().__init__()
        self.site, self.token, self.name, self.written_at = site, token, name, written_at or site
        self.clamp_norm_factor, self.v_weight_decay = clamp_norm_factor, v_weight_decay
        self._origins, self._deltas, self._shown = torch.zeros(shape), torch.zeros(shape), torch.arange(shape[0])
        self.origin, self.delta = self._origins, nn.Parameter(torch.zeros(shape))
        self.anchors: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """v₀ + δ, shape ``(n, d)``."""
        return self.origin + self.delta.detach()

    @property
    def label(self) -> str:
        """Its name, or the part of the model that it is added to."""
        return self.name or self.site.part

    def open(self, index: Tensor, origin: Tensor) -> None:
        """Turn to m edits, which are these of the batch, with δ = 0.

        Args:
            index: Their places, shape ``(m,)``.
            origin: v₀, float32, shape ``(m, d)``.
        """
        self._origins[index], self._deltas[index] = origin.cpu(), 0.0
        if self.anchors is not None:
            self.anchors[index] = True
        self._shown = index[:0]
        self.show(index, origin.device)

    def show(self, index: Tensor, device: torch.device) -> None:
        """Keep the lines that are shown, and show those of these edits of the batch."""
        self._deltas[self._shown] = self.delta.detach()[: len(self._shown)].cpu()
        self._shown, self.delta.grad = index, None
        self.origin, self.delta.data = self._origins[index].to(device), self._deltas[index].to(device)

    @torch.no_grad()
    def restrict(self, anchors: Tensor, start: Tensor) -> None:
        """From now on only some coordinates of the edits that are shown move.

        Args:
            anchors: Which, booleans of shape ``(m, d)``.
            start: δ from which they go on, shape ``(m, d)``; the others stay as they are there.
        """
        if self.anchors is None:
            self.anchors = torch.ones_like(self._deltas, dtype=torch.bool)
        self.anchors[self._shown] = anchors.cpu()
        self.delta.copy_(start)

    @torch.no_grad()
    def hold(self) -> None:
        """Drop the gradients of the coordinates that do not move."""
        if self.anchors is not None and self.delta.grad is not None:
            self.delta.grad *= self.anchors[self._shown].to(self.delta.device)

    def whole(self) -> None:
        """Show all n edits, in main memory."""
        self.show(torch.arange(len(self._deltas)), self._deltas.device)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Scale every δ that is too long back to ``clamp_norm_factor · ‖v₀‖``; what does not move does not count."""
        moves: Tensor | bool = True if self.anchors is None else self.anchors[self._shown].to(self.delta.device)
        norm = (self.delta * moves).norm(dim=1, keepdim=True)
        longest = self.clamp_norm_factor * self.origin.norm(dim=1, keepdim=True)
        self.delta.copy_(torch.where((norm > longest) & moves, self.delta * (longest / norm), self.delta))


@dataclass(frozen=True)
class Stage:
    """One optimisation: N loss evaluations and N − 1 updates, as every released code but EAC's has it.

    Args:
        name: Prefix of its curves.
        deltas: What is optimised.
        prepare: Gives what evaluates the loss of the m edits under way, at their δs of that time.
        steps: Loss evaluations N at most.
        stop: Which edits are done. They take no further update.
        compressible: Whether ``compress`` applies to it.
        begin: Called once before its first evaluation.
        observe: Called before each update, when the gradients are there, with which of the m edits go on, ``(m,)``.
        updates_last: Whether an update follows the last evaluation too (EAC).
    """

    name: str
    deltas: tuple[ValueDelta, ...]
    prepare: Callable[[], Callable[[], Loss]]
    steps: int
    stop: Stop
    compressible: bool = True
    begin: Callable[[], None] = lambda: None
    observe: Callable[[Tensor], None] = lambda _: None
    updates_last: bool = False


@dataclass
class Outcome:
    """How a stage ended for the n edits of a batch.

    Args:
        stage: The stage.
        pass_: Which pass of the edit batch.
        deltas: What was optimised.
        steps: Loss evaluations each edit took, ``(n,)``.
        converged: Whether its stopping rule ended it before its evaluations did, ``(n,)``.
        probability: The target's probability of each edit at its last loss evaluation, ``(n,)``; nan without a target.
        curves: Per loss evaluation the terms, each ``(n,)``; an edit's last entry, that of its δ, is repeated.
        residual: By δ's label how far the edited model's value is from the one wanted, relative to the latter;
            ``(n,)``.
    """

    stage: str
    pass_: int
    deltas: tuple[ValueDelta, ...]
    steps: Tensor
    converged: Tensor
    probability: Tensor
    curves: list[Terms] = field(default_factory=list)
    residual: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, stage: Stage, pass_: int, n: int) -> Outcome:
        """That of a stage which has not begun."""
        steps, converged = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.bool)
        return cls(stage.name, pass_, stage.deltas, steps, converged, torch.full((n,), torch.nan))

    def add(self, loss: Loss, index: Tensor, running: Tensor, evaluation: int) -> None:
        """Keep a loss evaluation of m edits.

        Args:
            loss: The loss.
            index: The edits' places in the batch, shape ``(m,)``.
            running: Which of them were not done before, shape ``(m,)``; the others' last entries stay.
            evaluation: Which evaluation it is, from 0.
        """
        index = index[running]
        if evaluation == len(self.curves):
            unknown = {term: torch.full_like(self.probability, torch.nan) for term in loss.terms}
            self.curves.append({term: v.clone() for term, v in (self.curves[-1] if self.curves else unknown).items()})
        for term, values in loss.terms.items():
            for later in self.curves[evaluation:]:
                later[term][index] = values.detach().float().cpu()[running]
        if loss.probability is not None:
            self.probability[index] = loss.probability.detach().float().cpu()[running]
        self.steps[index] = evaluation + 1

    def final(self, i: int, *, value: bool = True) -> dict[str, float]:
        """Terms and number of loss evaluations of edit i when it stopped, ‖δ‖/‖v₀‖, and what is left after writing.

        Args:
            i: The edit's place in its batch.
            value: Whether δ is still what this stage has left; false where a later one optimised it again.
        """
        found = {term: float(values[i]) for term, values in self.curves[int(self.steps[i]) - 1].items()}
        for delta in self.deltas if value else ():
            found[f"delta/{delta.label}"] = float(delta.delta[i].detach().norm() / delta.origin[i].norm())
            if delta.anchors is not None:
                found[f"anchors/{delta.label}"] = int(delta.anchors[i].sum())
        found |= {f"residual/{label}": float(values[i]) for label, values in self.residual.items()}
        return {"steps": int(self.steps[i]), "converged": bool(self.converged[i]), **found}


def latest(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those whose δs no later stage of their pass optimised again: of a compressed value the second."""
    return list({(outcome.pass_, outcome.deltas): outcome for outcome in outcomes}.values())


def below(threshold: float) -> Stop:
    """Stopping rule: the loss, all terms and factors counted, is below a threshold."""
    return lambda loss: loss.total < threshold


def likely(probability: float) -> Stop:
    """Stopping rule: the target is at least this likely (JEEP)."""

    def stop(loss: Loss) -> Tensor:
        assert loss.probability is not None
        return loss.probability >= probability

    return stop
