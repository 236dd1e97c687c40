"""RETS: relation-focused editing with subject constraints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch

from kedit_lightning.data.bare_prompts import BarePrompts
from kedit_lightning.editors.rome import ROME
from kedit_lightning.edits import SLOT, Edit
from kedit_lightning.errors import KeditError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.prompt_statistics import PromptStatistics


class RETS(ROME):
    """ROME at the relation's last token, in a middle-late layer (Liu et al., 2024, https://arxiv.org/abs/2408.15091).

    The whole prompt takes the subject's part: δ and keys are at the prompt's last token, and the KL is there too, in
    "{prompt} is a". So it works against the edit, as it does in the released code.

    `write`: ROME's, where the second moment of the keys, C, is joined by that of the keys at the last tokens of a data
    set's bare prompts: ``C′ = C + Σ kᵣ kᵣᵀ``. C is a mean over tokens and the second term, as published, a sum, which
    outweighs it by orders of magnitude.

    Args:
        base: The frozen base model.
        layers: Layers to edit, ascending.
        constraint: The data set whose prompts are meant: CounterFact in the paper, edited and other facts alike.
        origin_mom: Whether C is part of C′; of ``statistics`` its ridge, precision and folder count in any case.
        subject_const: Whether the prompts are.
        constraint_moment: ``sum`` over the prompts; ``mean`` divides it by their number, as C is divided.
        mom2_adjustment: Whether keys are weighed by C′; false takes the identity.
        shared: ROME's settings, and the settings of every editor, see `Editor`.

    Raises:
        KeditError: Neither moment is part of C′, there are no prompts, or batches are to be solved with the sum.
    """

    def __init__(
        self,
        base: LanguageModel,
        layers: list[int],
        constraint: BarePrompts | None = None,
        origin_mom: bool = True,
        subject_const: bool = True,
        constraint_moment: Literal["sum", "mean"] = "sum",
        mom2_adjustment: bool = True,
        **shared: Any,
    ) -> None:
        super().__init__(base, layers, mom2_adjustment=mom2_adjustment, **shared)
        self.constraint = constraint if mom2_adjustment and subject_const else None
        self.origin_mom, self.constraint_moment = origin_mom, constraint_moment
        if not mom2_adjustment:
            return
        if not (origin_mom or subject_const):
            msg = "expected origin_mom or subject_const to be true, or mom2_adjustment to be false: C′ is nothing else"
            raise KeditError(msg)
        if subject_const and constraint is None:
            msg = (
                "RETS spares the prompts of a data set: give `constraint` one (dataset: counterfact, almanac, …), or "
                "set subject_const to false"
            )
            raise KeditError(msg)
        if self.solver == "least_squares" and subject_const and constraint_moment == "sum":
            msg = (
                "solver: least_squares weighs a mean second moment by mom2_update_weight: set constraint_moment to "
                "mean, or solver to constrained"
            )
            raise KeditError(msg)
        if not origin_mom:
            self.statistics = replace(self.statistics, source="identity")

    @property
    def separate_targets(self) -> bool:
        """Never: on its own, a target that begins with a space's own token would begin before δ's place."""
        return False

    def request(self, edit: Edit) -> Edit:
        """The whole prompt as the subject."""
        return replace(edit, prompt=SLOT, subject=edit.text)

    @property
    def moments_dtype(self) -> torch.dtype | None:
        """Float64, where there is a constraint."""
        return torch.float64 if self.constraint else super().moments_dtype

    def prepare(self) -> None:
        """Also the second moments of the constraint."""
        prompts = self.constraint() if self.constraint else []  # before C, which may take hours
        super().prepare()
        if not prompts:
            return
        found = PromptStatistics.like(self.statistics, prompts).second_moments(self.base, self.sites())
        weight = len(prompts) if self.constraint_moment == "sum" else 1
        if self.origin_mom:
            found = {site: self.moments[site].plus(of_prompts, weight) for site, of_prompts in found.items()}
        self.moments = found
