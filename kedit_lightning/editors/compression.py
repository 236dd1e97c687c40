"""EAC: editing anchor compression, a setting of every editor that optimises a value.

A stage is run twice. Stage A finds the coordinates of δ that carry the edit, its anchors; stage B retrains δ on them
alone, held small by a scored elastic net (https://arxiv.org/abs/2503.00035).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kedit_lightning import objectives
from kedit_lightning.editors.checks import at_least
from kedit_lightning.editors.stages import Loss, Stage, Terms, ValueDelta
from kedit_lightning.errors import KeditError
from kedit_lightning.models.processes import once

if TYPE_CHECKING:
    from kedit_lightning.editors.base import Editor


@dataclass(frozen=True)
class Compression:
    """How a value is compressed (EAC, Eqs. 1 to 6).

    As in the released code the score is ``|mean gradient over stage A ⊙ δ|``, coordinates off the anchors are zeroed in
    δ and not in v*, each stage makes as many updates as it has loss evaluations (other stages make one fewer), and μ is
    the editor's weight decay. Fig. 7's ablations are ``gamma: 0`` (no saliency map) and ``elastic_l1: 0`` (no elastic
    net; with ``elastic_l2: squared`` also ``mu: 0``), Fig. 8's are ``select``.

    Args:
        gamma: γ, the percentile of the scores below which coordinates are dropped: ``max(1, ⌊d (100 − γ)/100⌋)`` of d
            are kept. A mapping gives each δ its own, by its name in the curves (``low``, ``high``; ``mlp``, ``attn``).
        v_num_grad_steps1: Updates of stage A. With 0 there is none, and no score: γ must be 0 or ``select`` random, and
            ``elastic_l1`` 0.
        v_num_grad_steps2: Updates of stage B.
        select: What anchors are chosen by: the score, the gradient's or δ's magnitude alone, or chance.
        elastic_l1: λ of the scored elastic net, ``λ Σᵢ |δᵢ| / (scoreᵢ + 1e-6)`` over the anchors.
        elastic_l2: What its second term is: ``weight_decay``, the editor's own ``‖δ‖/‖v₀‖²``; or ``squared``, ``‖δ‖²``.
        mu: μ, the factor of ``elastic_l2``; null: each δ's ``v_weight_decay``.
        start: Where stage B starts from: δ of stage A on the anchors, or zeros.
        kl_reference: What stage B's KL, if it has one, refers to: the model without δ, or with δ as stage B starts
            (released for ROME).
        preset: ``paper_literal`` reads the equations to the letter: the score is ``|v* ⊙ ∇L|`` with the mean gradient,
            v* is zero off the anchors, and the elastic net is taken of v*, with ``‖v*‖²``.
        seed: Of ``select: random``, together with the edit's case id and the site.

    Raises:
        KeditError: A setting is out of range or contradicts another.
    """

    gamma: float | dict[str, float] = 80.0
    v_num_grad_steps1: int = 10
    v_num_grad_steps2: int = 10
    select: Literal["score", "gradient", "magnitude", "random"] = "score"
    elastic_l1: float = 5e-7
    elastic_l2: Literal["weight_decay", "squared"] = "weight_decay"
    mu: float | None = None
    start: Literal["anchors", "zeros"] = "anchors"
    kl_reference: Literal["unedited", "start"] = "unedited"
    preset: Literal["paper", "paper_literal"] = "paper"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        gammas = self.gamma if isinstance(self.gamma, dict) else {"": self.gamma}
        if wrong := [gamma for gamma in gammas.values() if not 0 <= gamma < 100]:
            msg = f"compress.gamma: expected a percentile of at least 0 and below 100, got {wrong[0]:g}"
            raise KeditError(msg)
        at_least(0, v_num_grad_steps1=self.v_num_grad_steps1, elastic_l1=self.elastic_l1, mu=self.mu or 0)
        at_least(1, v_num_grad_steps2=self.v_num_grad_steps2)
        if not self.v_num_grad_steps1 and self.select != "random" and any(gammas.values()):
            msg = "compress: without a stage A (v_num_grad_steps1: 0) anchors need gamma: 0 (all) or select: random"
            raise KeditError(msg)
        if not self.v_num_grad_steps1 and self.elastic_l1:
            msg = "compress: without a stage A (v_num_grad_steps1: 0) there are no scores: set elastic_l1 to 0"
            raise KeditError(msg)

    def kept(self, delta: ValueDelta) -> int:
        """How many coordinates of a δ are anchors.

        Raises:
            KeditError: ``gamma`` names other δs.
        """
        gamma, d = self.gamma, delta.delta.shape[1]
        if isinstance(gamma, dict):
            if delta.label not in gamma:
                msg = f"compress.gamma: expected a percentile for {delta.label}, got one for {', '.join(gamma)} only"
                raise KeditError(msg)
            gamma = gamma[delta.label]
        return max(1, int(round(d * (100 - gamma) / 100, 6)))  # 1000 · (100 - 97.7)/100 is just below 23


class Anchors:
    """The anchors of one δ, for the m edits of a part.

    Args:
        delta: δ; shows the m edits.
    """

    def __init__(self, delta: ValueDelta) -> None:
        self.delta = delta
        self.total, self.count = torch.zeros_like(delta.delta), delta.delta.new_zeros(len(delta.delta), 1)

    def observe(self, lines: Tensor, running: Tensor) -> None:
        """Add the gradients of the edits that go on; ``lines``: which of the m edits δ shows."""
        assert self.delta.delta.grad is not None
        self.total[lines[running]] += self.delta.delta.grad[running]
        self.count[lines[running]] += 1

    def choose(self, setting: Compression, case_ids: Iterable[int]) -> None:
        """Score the coordinates of the δs that stage A has found, choose the anchors, and set where stage B starts."""
        delta, origin = self.delta.delta.detach(), self.delta.origin
        self.gradient = gradient = self.total / self.count.clamp(min=1)
        literal = setting.preset == "paper_literal"
        self.score = (gradient * (origin + delta if literal else delta)).abs()
        chosen_by = {"score": self.score, "gradient": gradient.abs(), "magnitude": delta.abs()}
        by = _chance(setting.seed, case_ids, self.delta) if setting.select == "random" else chosen_by[setting.select]
        self.mask = largest(by, setting.kept(self.delta))
        start = delta if setting.start == "anchors" else torch.zeros_like(delta)
        self.start = torch.where(self.mask, start, -origin if literal else torch.zeros_like(delta))
        self.delta.restrict(self.mask, self.start)

    def elastic_net(self, setting: Compression, lines: Tensor) -> Terms:
        """Its two terms at δ as it is, of the edits that δ shows; each of shape ``(m,)``."""
        delta = self.delta
        z = delta.delta if setting.preset == "paper" else delta.origin + delta.delta
        z = z * self.mask[lines]
        named = f"_{delta.name}" if delta.name else ""
        terms: Terms = {}
        if setting.elastic_l1:
            terms[f"elastic_l1{named}"] = setting.elastic_l1 * objectives.scored_l1(z, self.score[lines])
        mu = delta.v_weight_decay if setting.mu is None else setting.mu
        if setting.preset == "paper_literal" or setting.elastic_l2 == "squared":
            terms[f"elastic_l2{named}"] = mu * z.square().sum(dim=1)
        else:
            terms[f"weight_decay{named}"] = mu * objectives.weight_decay(delta.delta, delta.origin)
        return {name: once(term) for name, term in terms.items()}


def largest(values: Tensor, kept: int) -> Tensor:
    """Where the ``kept`` largest values of each line stand (EAC Eq. 2); of equal ones those that `torch.topk` takes.

    Args:
        values: Shape ``(n, d)``.
        kept: How many, at most d.

    Returns:
        Booleans, shape ``(n, d)``.
    """
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, values.topk(kept, dim=1).indices, True)


def compressed(editor: Editor, stages: Iterable[Stage], setting: Compression) -> Iterator[Stage]:
    """Each stage that is to be compressed as two: on all coordinates, then on its anchors.

    Args:
        editor: Whose stages they are; its `part` and `batch` are read while they run.
        stages: The stages.
        setting: How.
    """
    for stage in stages:
        if not stage.compressible:
            yield stage
            continue
        for delta in stage.deltas:
            setting.kept(delta)  # refused now rather than after stage A
        anchors = [Anchors(delta) for delta in stage.deltas]
        line = torch.zeros(len(editor.edits), dtype=torch.long)
        line[editor.part.index] = torch.arange(len(editor.part))
        twice = _Twice(editor, stage, setting, anchors, line)
        if setting.v_num_grad_steps1:
            name, steps = f"{stage.name}_anchors", setting.v_num_grad_steps1
            yield replace(stage, name=name, steps=steps, observe=twice.observe, updates_last=True)
        case_ids = [edit.case_id for edit in editor.part.edits]
        for of_one in anchors:
            of_one.choose(setting, case_ids)
        yield replace(stage, steps=setting.v_num_grad_steps2, prepare=twice.retraining, updates_last=True)


@dataclass
class _Twice:
    """What the two runs of one stage share; ``line``: which of the part's edits a place of the batch is."""

    editor: Editor
    stage: Stage
    setting: Compression
    anchors: list[Anchors]
    line: Tensor

    @property
    def lines(self) -> Tensor:
        """Which of the part's edits are shown."""
        return self.line[self.editor.batch.index].to(self.editor.base.device)

    def observe(self, running: Tensor) -> None:
        """Stage A: add up the gradients."""
        for anchors in self.anchors:
            anchors.observe(self.lines, running)

    def retraining(self) -> Callable[[], Loss]:
        """Stage B: the stage's own loss, with the elastic net instead of its weight decay."""
        lines, evaluate = self.lines, self._reference_at_start()

        def loss() -> Loss:
            found = evaluate()
            terms = {name: term for name, term in found.terms.items() if not name.startswith("weight_decay")}
            for anchors in self.anchors:
                for name, term in anchors.elastic_net(self.setting, lines).items():
                    terms[name] = terms[name] + term if name in terms else term
            return replace(found, terms=terms)

        return loss

    def _reference_at_start(self) -> Callable[[], Loss]:
        """The stage's own loss; the released code of ROME has its KL refer to the model with δ as stage B starts."""
        if self.setting.kl_reference == "unedited":
            return self.stage.prepare()
        self.editor.kl_reference = {of_one.delta.site: of_one.start[self.lines] for of_one in self.anchors}
        try:
            return self.stage.prepare()
        finally:
            self.editor.kl_reference = {}


def _chance(seed: int, case_ids: Iterable[int], like: ValueDelta) -> Tensor:
    """Random numbers of δ's shape, an edit's the same in whatever batch it comes, and others at every site."""
    site, d = like.site, like.delta.shape[1]
    streams = [Random(f"{seed}/{i}/{site.layer}/{site.part}").getrandbits(63) for i in case_ids]
    lines = [torch.rand(d, generator=torch.Generator().manual_seed(stream)) for stream in streams]
    return torch.stack(lines).to(like.delta.device)
