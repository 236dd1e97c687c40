"""ROME: Rank-One Model Editing."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

from kedit_lightning import solvers
from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors.base import Editor, Preset, at_least
from kedit_lightning.editors.stages import Stage, below
from kedit_lightning.edits import Site, Token
from kedit_lightning.errors import KeditError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.statistics import Statistics


class ROME(Editor):
    """Rank-one editing of one MLP (Meng et al., 2022, https://arxiv.org/abs/2202.05262).

    `locate`: the MLP output at the subject's last token. `stages`: v* maximises the target's probability over the
    context templates (Eq. 4). `write`: the constrained rank-one update (Eq. 2). Several layers are several passes, each
    a full edit on the model already edited below.

    As in the released code the direction ``C⁻¹ k*`` comes from the key's mean over the templates, the constraint holds
    at the bare prompt's key, ``v_num_grad_steps`` counts loss evaluations (one update fewer), the KL sits at the
    subject's last token, and the loss has a clamp, a weight decay and an early stop at 0.05. ``preset: released``
    also tokenises targets on their own.

    Args:
        base: The frozen base model.
        layers: Layers to edit.
        v_num_grad_steps: Loss evaluations at most.
        v_lr: Adam's learning rate.
        v_weight_decay: Factor of ``‖δ‖ / ‖v₀‖²``.
        clamp_norm_factor: ‖δ‖ is at most this times ‖v₀‖.
        kl_factor: Factor of the essence KL.
        mom2_adjustment: Whether keys are whitened by their second moment; false takes the identity.
        statistics: Where the second moment comes from.
        context_templates: Texts put before the prompts.
        preset: ``paper``, or ``released`` to follow the authors' code where it differs.
        stop: The stage ends for an edit when its loss is below this.
    """

    def __init__(
        self,
        base: LanguageModel,
        layers: list[int],
        v_num_grad_steps: int = 20,
        v_lr: float = 0.5,
        v_weight_decay: float = 0.5,
        clamp_norm_factor: float = 4.0,
        kl_factor: float = 0.0625,
        mom2_adjustment: bool = True,
        statistics: Statistics | None = None,
        context_templates: ContextTemplates | None = None,
        preset: Preset = "paper",
        stop: float = 5e-2,
    ) -> None:
        super().__init__(
            base,
            layers,
            v_lr=v_lr,
            v_weight_decay=v_weight_decay,
            clamp_norm_factor=clamp_norm_factor,
            kl_factor=kl_factor,
            mom2_adjustment=mom2_adjustment,
            statistics=statistics,
            context_templates=context_templates,
            preset=preset,
        )
        at_least(1, v_num_grad_steps=v_num_grad_steps)
        self.v_num_grad_steps, self.stop = v_num_grad_steps, stop

    def passes(self) -> Sequence[int]:
        """One pass a layer."""
        return self.layers

    def locate(self) -> None:
        """v: the edited MLP's output at the subject's last token."""
        self.v = self.value_delta(Site(self.layer, "mlp"), Token.SUBJECT_LAST)

    def stages(self) -> Iterator[Stage]:
        """v*."""
        yield Stage("v", (self.v,), self.edit_loss(self.v), self.v_num_grad_steps, below(self.stop))

    def write(self) -> Generator[WeightDelta, None, None]:
        """One rank-one update an edit, so that ``(W + Δ) k = v*`` at the bare prompt's key."""
        site, values = self.v.site, self.v.value
        direction = self.whiten(self.mean_keys(site, self.v.token), site)
        keys = self.bare_keys(site, self.v.token)
        for i, request in enumerate(self.batch.edits):
            present = self.base.project(site, keys[i])
            residual = values[i].to(present.device) - present
            try:
                left, right = solvers.constrained(residual, direction[i], keys[i])
            except ValueError as error:
                msg = f"case {request.case_id}: {error}"
                raise KeditError(msg) from error
            yield WeightDelta.low_rank(self.base.name(site), left, right)
