"""AlphaEdit: null-space constrained knowledge editing."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from torch import Tensor

from kedit_lightning import solvers
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors.checks import at_least
from kedit_lightning.editors.memit import MEMIT
from kedit_lightning.edits import Site
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.memory import require


class AlphaEdit(MEMIT):
    """MEMIT's values, written where other knowledge has no keys (Fang et al., 2025, https://arxiv.org/abs/2410.02355).

    `locate` and `stages`: MEMIT's. `write`: each layer's update is projected on the eigenvectors of the second moment C
    whose eigenvalue is below ``nullspace_threshold``, P = U Uᵀ, so that it vanishes on keys with P k = 0; it spares the
    keys of earlier edits, whose K Kᵀ are summed up in M: ``Δ = R Kᵀ P [(K Kᵀ + M) P + L2 I]⁻¹``. M takes in a batch's
    keys as they are on the model edited with it, and is forgotten when the weights are restored.

    The released code solves the same system in float32 by LU; here it is reduced to the null space and solved in
    float64. P is taken from C on the unedited model.

    Args:
        base: The frozen base model.
        layers: Layers to edit, ascending.
        nullspace_threshold: Eigenvalues of C below this span the null space.
        L2: Weight of ‖Δ‖².
        shared: MEMIT's settings but λ, and the settings of every editor, see `Editor`.
    """

    def __init__(
        self, base: LanguageModel, layers: list[int], nullspace_threshold: float = 2e-2, L2: float = 10.0, **shared: Any
    ) -> None:
        super().__init__(base, layers, mom2_update_weight=1.0, **shared)
        self.hparams.pop("mom2_update_weight", None)  # `solve` has no λ
        at_least(1e-12, nullspace_threshold=nullspace_threshold, L2=L2)
        self.nullspace_threshold, self.L2 = nullspace_threshold, L2
        self.forget()

    def prepare(self) -> None:
        """Also the null space of every layer: better now than after the values."""
        super().prepare()
        require(self.base, self.sites(), 0, kept=2)  # U and M
        for moment in self.moments.values():
            moment.null_space(self.nullspace_threshold, self.base.device)

    @property
    def kept(self) -> int:
        """M, which the first commit makes."""
        return 0 if self.remembered else 1

    def memory_size(self, n: int) -> int:
        """The keys of every layer."""
        return 4 * n * sum(self.base.weight(site).shape[1] for site in self.sites())

    def write(self) -> Generator[WeightDelta, None, None]:
        """MEMIT's layers; then the keys of all of them, read on the edited model, are remembered."""
        yield from super().write()
        keys = self.keys({site: self.z.token for site in self.sites()})
        self.memory = {self.base.name(site): found.mean for site, found in keys.items()}

    def solve(self, site: Site, residual: Tensor, keys: Tensor, weight: float) -> WeightDelta:
        """The projected update; λ is not used."""
        name, moment = self.base.name(site), self.moments[site]
        basis = moment.null_space(self.nullspace_threshold).to(moment.roomy(keys.device))
        left, right = solvers.null_space_projected(residual, keys, basis, self.remembered.get(name), self.L2)
        return WeightDelta.low_rank(name, left, right)

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Add ``K Kᵀ`` of a commit's keys, shape ``(n, k)``, to each layer's M."""
        doubles = {name: solvers.double(keys) for name, keys in memory.items()}
        grams = {name: (keys.T @ keys).cpu() for name, keys in doubles.items()}
        self.remembered |= {name: gram.add_(self.remembered.get(name, 0)) for name, gram in grams.items()}

    def forget(self) -> None:
        """M = 0 again."""
        self.remembered: dict[str, Tensor] = {}
