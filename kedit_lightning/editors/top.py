"""TOP: a two-stage optimisation process that keeps subject and relation in balance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from kedit_lightning import objectives
from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.editors.base import Preset, at_least
from kedit_lightning.editors.rome import ROME
from kedit_lightning.editors.stages import Stage, Terms, below
from kedit_lightning.edits import Site, Token
from kedit_lightning.errors import KeditError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.statistics import Statistics


class TOP(ROME):
    """Two-stage optimisation process (https://arxiv.org/abs/2506.04042).

    `locate`: the relation feature h_r, block l_a's output at the prompt's last token, and v, the edited MLP's output at
    the subject's last token. `stages`: h_r* makes the target likely (Eq. 13), then v* makes the bare prompt's h_r equal
    to h_r* (Eq. 14). `write`: ROME's.

    As in the released code both thresholds are on the whole weighted loss, the distance is a plain L2 norm on the bare
    prompt alone, and step counts are loss evaluations. ``preset: released`` also moves the KL's place in
    "{subject} is a" one token to the left for every target token after the first (an index slip that the paper does
    not have), drops prefixes with the word "import" and tokenises targets on their own.

    Args:
        base: The frozen base model.
        layers: Layers to edit, each a full edit on the model already edited below.
        rel_feat_layer: l_a as an offset from the edited layer; a list has an entry a layer. At an offset of 0 the
            prompt's last token sees nothing of v, so only prompts that end in their subject can be edited.
        v_num_grad_steps1: Loss evaluations of stage 1 at most.
        v_num_grad_steps2: Loss evaluations of stage 2 at most.
        vec_loss_factor: Factor of stage 2's distance.
        v_lr: Adam's learning rate, in both stages.
        v_weight_decay: Factor of ``‖δ‖ / ‖v₀‖²``, in both stages.
        clamp_norm_factor: ‖δ‖ is at most this times ‖v₀‖, in both stages.
        kl_factor: Factor of the essence KL, in stage 1.
        mom2_adjustment: Whether keys are whitened by their second moment; false takes the identity.
        statistics: Where the second moment comes from.
        context_templates: Texts put before the prompts.
        preset: ``paper``, or ``released`` to follow the authors' code where it differs.
        stop1: Stage 1 ends for an edit when its loss is below this.
        stop2: Stage 2 ends for an edit when its loss is below this.
    """

    def __init__(
        self,
        base: LanguageModel,
        layers: list[int],
        rel_feat_layer: int | list[int],
        v_num_grad_steps1: int = 20,
        v_num_grad_steps2: int = 20,
        vec_loss_factor: float = 0.1,
        v_lr: float = 0.5,
        v_weight_decay: float = 0.5,
        clamp_norm_factor: float = 4.0,
        kl_factor: float = 0.0625,
        mom2_adjustment: bool = True,
        statistics: Statistics | None = None,
        context_templates: ContextTemplates | None = None,
        preset: Preset = "paper",
        stop1: float = 2e-2,
        stop2: float = 5e-2,
    ) -> None:
        templates = context_templates or ContextTemplates()
        super().__init__(
            base,
            layers,
            v_lr=v_lr,
            v_weight_decay=v_weight_decay,
            clamp_norm_factor=clamp_norm_factor,
            kl_factor=kl_factor,
            mom2_adjustment=mom2_adjustment,
            statistics=statistics,
            context_templates=replace(templates, exclude="import") if preset == "released" else templates,
            preset=preset,
        )
        at_least(1, v_num_grad_steps1=v_num_grad_steps1, v_num_grad_steps2=v_num_grad_steps2)
        at_least(0, vec_loss_factor=vec_loss_factor)
        offsets = rel_feat_layer if isinstance(rel_feat_layer, list) else [rel_feat_layer] * len(layers)
        if len(offsets) != len(layers) or min(offsets) < 0:
            msg = (
                f"rel_feat_layer: expected an offset ≥ 0, or one for each of the layers {layers}, got {rel_feat_layer}"
            )
            raise KeditError(msg)
        self.l_a = {layer: base.check_layer(layer + offset) for layer, offset in zip(layers, offsets, strict=True)}
        self.v_num_grad_steps1, self.v_num_grad_steps2 = v_num_grad_steps1, v_num_grad_steps2
        self.vec_loss_factor, self.stop1, self.stop2 = vec_loss_factor, stop1, stop2

    def locate(self) -> None:
        """h_r: block l_a's output at the prompt's last token; v: as ROME."""
        self.h_r = self.value_delta(Site(self.l_a[self.layer], "block"), Token.PROMPT_LAST)
        super().locate()

    def stages(self) -> Iterator[Stage]:
        """h_r*, then v*."""
        loss = self.edit_loss(self.h_r, essence_at=self._slipped() if self.preset == "released" else None)
        yield Stage("h_r", (self.h_r,), loss, self.v_num_grad_steps1, below(self.stop1))
        yield Stage("v", (self.v,), self._vector_loss, self.v_num_grad_steps2, below(self.stop2))

    def _vector_loss(self) -> Terms:
        rows = self.batch.bare_rows
        site, at = self.h_r.site, rows.at[self.h_r.token]
        with self.base.add(self.v.site, rows.at[self.v.token], self.v.delta), self.base.tap({site: at}) as found:
            self.base.run(rows, site.layer)
        decay = objectives.weight_decay(self.v.delta, self.v.origin)
        distance = objectives.distance(found[site].float(), self.h_r.value.to(found[site].device))
        return {"distance": self.vec_loss_factor * distance, "weight_decay": self.v_weight_decay * decay}

    def _slipped(self) -> torch.Tensor:
        """The released code's place of the KL: one to the left for every target token after the first.

        A target longer than "{subject} is a" would take it out of the row (there into the padding); here it stops at
        the first token.
        """
        rows, essence = self.batch.rows, self.batch.essence
        tokens = (rows.labels[self.batch.bare] >= 0).sum(dim=1)
        return (rows.at[Token.PROMPT_LAST][essence] - (tokens - 1)).clamp(min=0)
