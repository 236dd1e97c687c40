"""ROME: Rank-One Model Editing."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal

from kedit_lightning import solvers
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors.base import Editor
from kedit_lightning.editors.checks import at_least
from kedit_lightning.editors.closed_form import Spread
from kedit_lightning.editors.stages import Stage, below
from kedit_lightning.edits import Site, Token
from kedit_lightning.models import LanguageModel


class ROME(Editor):
    """Rank-one editing of one MLP (Meng et al., 2022, https://arxiv.org/abs/2202.05262).

    `locate`: the MLP output at the subject's last token. `stages`: v* maximises the target's probability over the
    context templates (Eq. 4). `write`: the constrained rank-one update (Eq. 2). Several layers are several passes, each
    a full edit on the model already edited below.

    As in the released code the direction ``C⁻¹ k*`` comes from the key's mean over the templates, the constraint holds
    at the bare prompt's key, ``v_num_grad_steps`` counts loss evaluations (one update fewer), the KL sits at the
    subject's last token, and the loss has a clamp, a weight decay and an early stop at 0.05. ``preset: released``
    also tokenises targets on their own.

    ``solver: least_squares`` is in no paper: it writes the values v* of a whole edit batch at once, as MEMIT does, over
    one or several layers.

    Args:
        base: The frozen base model.
        layers: Layers to edit, ascending.
        v_num_grad_steps: Loss evaluations at most.
        clamp_norm_factor: ‖δ‖ is at most this times ‖v₀‖.
        stop: The stage ends for an edit when its loss is below this.
        solver: ``constrained``: one rank-one update an edit; ``least_squares``: one update for all edits of a batch.
        mom2_update_weight: λ of ``least_squares``, the weight of the second moment.
        spread: How ``least_squares`` shares the residual over several layers.
        shared: The settings of every editor, see `Editor`.
    """

    def __init__(
        self,
        base: LanguageModel,
        layers: list[int],
        v_num_grad_steps: int = 20,
        clamp_norm_factor: float = 4.0,
        stop: float = 5e-2,
        solver: Literal["constrained", "least_squares"] = "constrained",
        mom2_update_weight: float = 15000,
        spread: Spread = "even",
        **shared: Any,
    ) -> None:
        super().__init__(base, layers, v_num_grad_steps=v_num_grad_steps, clamp_norm_factor=clamp_norm_factor, **shared)
        at_least(1e-12, mom2_update_weight=mom2_update_weight)
        self.stop, self.solver = stop, solver
        self.mom2_update_weight, self.rule = mom2_update_weight, spread

    def passes(self) -> Sequence[int]:
        """One pass a layer, or one for all with ``least_squares``."""
        return self.layers if self.solver == "constrained" else self.layers[-1:]

    def locate(self) -> None:
        """v: the edited MLP's output at the subject's last token."""
        self.v = self.value_delta(Site(self.layer, "mlp"), Token.SUBJECT_LAST)

    def stages(self) -> Iterator[Stage]:
        """v*."""
        yield Stage("v", (self.v,), lambda: self.edit_loss(self.v), self.v_num_grad_steps, below(self.stop))

    def write(self) -> Generator[WeightDelta, None, None]:
        """One rank-one update an edit, so that ``(W + Δ) k = v*`` at the bare prompt's key; or all at once."""
        if self.solver == "least_squares":
            yield from self.spread(self.layers, {"mlp": self.v}, self.rule, self.mom2_update_weight)
            return
        site, values = self.v.site, self.v.value
        keys = self.keys({site: self.v.token}, bare=True)[site]
        direction, present = self.whiten(keys.mean, site), self.base.project(site, keys.bare)
        for i, request in enumerate(self.edits):
            residual = values[i].to(present.device) - present[i]
            try:
                left, right = solvers.constrained(residual, direction[i], keys.bare[i])
            except ValueError as error:
                raise self.unsolvable(i, f"case {request.case_id}", error) from error
            if not self.side_by_side:
                present = present + solvers.double(keys.bare) @ right @ left.T
            yield WeightDelta.low_rank(self.base.name(site), left, right, edit=i)
