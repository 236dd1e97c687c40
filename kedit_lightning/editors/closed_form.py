"""What an edit batch is written with: its keys and values on the model, and the updates solved from them."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors.reading import Keys, read_keys, read_values
from kedit_lightning.editors.stages import ValueDelta, latest
from kedit_lightning.editors.training import StagedTraining
from kedit_lightning.edits import Part, Site, Token
from kedit_lightning.errors import KeditError, RejectedError
from kedit_lightning.models.key_statistics import KeyStatistics
from kedit_lightning.models.statistics import Statistics
from kedit_lightning.solvers import NotFiniteError

Spread = Literal["even", "sqrt"]


class ClosedForm(StagedTraining):
    """Values that have been trained, written into the weights in closed form."""

    moments: dict[Site, KeyStatistics]
    """Second moment of the keys of each site that is edited."""
    statistics: Statistics
    """Where they come from."""
    can_be_side_by_side = True
    """Whether edits can be `side_by_side`."""
    side_by_side = False
    """Whether the edits know nothing of each other: each is written alone, into its own rows (`SideBySide`)."""

    @property
    def moments_dtype(self) -> torch.dtype | None:
        """In which type second moments are kept from `prepare` on; None: there are none."""
        return None if self.statistics.source == "identity" else getattr(torch, self.statistics.mom2_dtype)

    def keys(self, tokens: Mapping[Site, Token], *, bare: bool = False) -> dict[Site, Keys]:
        """Keys of all edits of the batch at tokens of sites, by one forward pass; also those of the bare prompts."""
        return read_keys(self.base, self.parts, tokens, bare=bare)

    def present(self, tokens: Mapping[Site, Token]) -> dict[Site, Tensor]:
        """What sites put out now at tokens of the bare prompts of all edits; float32, shape ``(n, d)``."""
        return read_values(self.base, self.parts, tokens)

    # ------------------------------------------------------------------ what is solved with them

    def whiten(self, keys: Tensor, site: Site) -> Tensor:
        """``C⁻¹ k`` in float64 for keys of shape ``(n, k)``; k itself without ``mom2_adjustment``."""
        return self.moments[site].solve(keys)

    def spread(
        self,
        layers: Sequence[int],
        deltas: Mapping[Part, ValueDelta],
        rule: Spread,
        weight: float,
        *,
        together: bool = True,
    ) -> Generator[WeightDelta, None, None]:
        """Write values over layers, each taking its share of what the layers below have left (MEMIT, Sec. 4.3).

        Layer i of n takes ``(v − present) / (n − i)``, or with ``sqrt`` its square root (PMET, JEEP), where both are
        taken where the value is written and on the model edited so far.

        Args:
            layers: The layers, ascending.
            deltas: For each kind of weight the value that it is to produce in the last layer.
            rule: How the residual is shared.
            weight: λ of the second moment.
            together: Read the keys of all kinds of weights of a layer before any of them is written.
        """
        groups = [deltas] if together else [{part: delta} for part, delta in deltas.items()]
        for (i, layer), group in product(enumerate(layers), groups):
            share = (len(layers) - i) ** (0.5 if rule == "sqrt" else 1.0)
            keys = self.keys({Site(layer, part): delta.token for part, delta in group.items()})
            present = self.present({delta.written_at: delta.token for delta in group.values()})
            for part, delta in group.items():
                site, now = Site(layer, part), present[delta.written_at]
                residual = (delta.value.to(now.device) - now) / share
                for edits in self.solved_together():
                    try:
                        update = self.solve(site, residual[edits], keys[site].mean[edits], weight)
                    except ValueError as error:
                        raise self.unsolvable(edits.start, f"layer {layer}, {part}", error) from error
                    yield replace(update, edit=edits.start)

    def unsolvable(self, edit: int | None, where: str, error: ValueError) -> KeditError:
        """What to raise where an update cannot be solved for.

        Args:
            edit: Whose it is; of edits side by side it alone is rejected where something of it is not finite.
            where: Words before the reason.
            error: The reason.
        """
        if self.side_by_side and edit is not None and isinstance(error, NotFiniteError):
            return RejectedError({edit: f"case {self.edits[edit].case_id}: {error}"})
        return KeditError(f"{where}: {error}")

    def solved_together(self) -> list[slice]:
        """The edits in groups of those that one update writes: all of them, or each by itself where side by side."""
        return [slice(i, i + 1) for i in range(len(self.edits))] if self.side_by_side else [slice(None)]

    def solve(self, site: Site, residual: Tensor, keys: Tensor, weight: float) -> WeightDelta:
        """``Δ = R Kᵀ (λC + K Kᵀ)⁻¹`` for residuals ``(n, d)`` and keys ``(n, k)`` (MEMIT Eq. 14)."""
        left, right = self.moments[site].least_squares(residual, keys, weight)
        return WeightDelta.low_rank(self.base.name(site), left, right)

    def settle(self) -> None:
        """After `write`: how far the edited model's values are from those that were wanted."""
        for outcome in latest(self.outcomes):
            if outcome.pass_ == self.pass_:
                found = self.present({delta.written_at: delta.token for delta in outcome.deltas})
                for delta in outcome.deltas:
                    error = (found[delta.written_at].cpu() - delta.value).norm(dim=1)
                    outcome.residual[delta.label] = error / delta.value.norm(dim=1)
