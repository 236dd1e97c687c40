"""What is solved with the second moment of keys: whitening, batch least squares, null spaces; no model."""

from __future__ import annotations

import logging
import math
from functools import cached_property

import torch
from torch import Tensor

from kedit_lightning import solvers
from kedit_lightning.errors import StatisticsError
from kedit_lightning.models.devices import free_memory
from kedit_lightning.models.factors import condition, factorise, symmetric
from kedit_lightning.solvers import SingularError, double

log = logging.getLogger(__name__)
ILL_CONDITIONED = 1e10
WHITENS_WELL = 1e8
"""Largest condition of C at which batches are solved through C⁻¹: the error, measured up to 5e-9 there and growing in
proportion, then stays below the 6e-8 with which a delta is rounded to float32, with room for a low estimate."""

ROOMY = 6
"""Float64 matrices of a second moment's size that must fit into a GPU for it to be solved there."""
ADVICE = "take more tokens (`statistics.tokens`; 10 × the width is usual) or set `statistics.ridge`, say 1e-3"


class KeyStatistics:
    """Second moment C of the keys of one site, factorised on first use and then used for every edit.

    Args:
        mean: C, shape ``(k, k)``.
        count: Keys that went into it; None where a file does not say.
        ridge: Added to the diagonal of C wherever it is inverted, in units of its mean.
        name: Name of the linear map that reads the keys, for messages.
    """

    def __init__(self, mean: Tensor, count: int | None = None, ridge: float = 0.0, name: str = "the keys") -> None:
        self.width = len(mean)
        self.mean, self.count, self.ridge, self.name = mean, count, ridge, name
        self._factor: Tensor | None = None
        self._condition: float | None = None
        self._null_spaces: dict[float, Tensor] = {}

    def plus(self, other: KeyStatistics, weight: float) -> KeyStatistics:
        """Those of C + weight · C of others, in float64."""
        mean = double(self.mean) + weight * double(other.mean)
        count = None if self.count is None or other.count is None else self.count + other.count
        return KeyStatistics(mean, count, self.ridge, self.name)

    def factor(self, device: torch.device | None = None) -> Tensor:
        """Lower Cholesky factor of C with its ridge, float64, shape ``(k, k)``; made once.

        Args:
            device: Where it would be used; it is put there if that is a GPU with ample room, else into main memory.

        Raises:
            StatisticsError: C is singular, or not a finite symmetric matrix.
        """
        if self._factor is not None:
            return self._factor
        if self._rank_is_below_width(0):
            raise StatisticsError(self._singular("is singular"))
        try:
            factor = factorise(self._matrix.to(self.roomy(device)), self.ridge)
        except SingularError as error:
            raise StatisticsError(self._singular("is singular")) from error
        number = condition(factor)
        if number > ILL_CONDITIONED:
            log.warning("The second moment of %s is ill-conditioned (about %.0e): %s.", self.name, number, ADVICE)
        else:
            log.info("Second moment of %s: condition about %.0e.", self.name, number)
        self._factor, self._condition = factor, number
        return factor

    @property
    def factor_is_due(self) -> bool:
        """Whether a factor may still be made and kept: none has been tried, and C is not used by its null space."""
        return self._condition is None and not self._null_spaces

    def solve(self, keys: Tensor) -> Tensor:
        """``C⁻¹ k`` for keys of shape ``(k,)`` or ``(n, k)``; float64, same shape and (if it has float64) device."""
        self._check_width(keys)
        keys = double(keys)
        factor = self.factor(keys.device)
        columns = keys.to(factor.device).reshape(-1, self.width).T
        return solvers.cholesky_solve(columns, factor).T.reshape(keys.shape).to(keys.device)

    def least_squares(self, residual: Tensor, keys: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Update of a batch, ``Δ = R Kᵀ (λ C + K Kᵀ)⁻¹``, with the ridge in C (MEMIT Eq. 14, JEEP Eq. 10).

        By the n × n system of the batch where that is cheaper and C is conditioned well enough (its factor is made on
        first use and kept), else by the k × k system. A singular C is fine as long as ``λ C + K Kᵀ`` is not.

        Args:
            residual: ``v* − W k`` an edit, shape ``(n, d)``.
            keys: Shape ``(n, k)``.
            weight: λ > 0 (``mom2_update_weight``).

        Returns:
            Factors of Δ in float64, shapes ``(d, r)`` and ``(k, r)``, on the device where it was solved: that of the
            keys where there is room.

        Raises:
            StatisticsError: C does not fit the keys, is no finite symmetric matrix, or the system is singular.
            ValueError: Residuals and keys do not fit, or the weight is not positive.
        """
        self._check_width(keys)
        n, d = len(residual), residual.shape[-1]
        try:
            if solvers.woodbury_is_cheaper(n, d, self.width) and self._whitens_well(keys.device):
                return solvers.woodbury(residual.to(keys.device), keys, self.solve(keys), weight)
            if self._rank_is_below_width(n):
                raise StatisticsError(self._singular(f"is singular, also with the keys of {n} edits"))
            place = self.roomy(keys.device)
            return solvers.least_squares(
                residual.to(place), keys.to(place), self._matrix.to(place), weight, ridge=self.ridge
            )
        except SingularError as error:
            raise StatisticsError(
                self._singular(f"times {weight} is singular, also with the keys of {n} edits")
            ) from error

    def null_space(self, threshold: float, device: torch.device | None = None) -> Tensor:
        """Directions that keys hardly take: eigenvectors of C (without a ridge) below a threshold; made once.

        AlphaEdit's ``P = U Uᵀ``, with a threshold of 0.02 in the released code: there by a singular value decomposition
        in float32, here by a symmetric eigendecomposition in float64.

        Args:
            threshold: Eigenvalues below it count as zero (``nullspace_threshold``), in units of squared keys.
            device: Where it would be used; it is computed there if that is a GPU with ample room.

        Returns:
            U, orthonormal columns in float64, shape ``(k, r)``, in main memory.

        Raises:
            StatisticsError: No eigenvalue is below the threshold, or C is no finite symmetric matrix.
        """
        if threshold not in self._null_spaces:
            values, vectors = torch.linalg.eigh(double(self._matrix.to(self.roomy(device))))
            rank = int((values < threshold).sum())
            if not rank:
                msg = (
                    f"nothing can be written into the null space of {self.name}: expected eigenvalues of its second "
                    f"moment below {threshold}, got {float(values[0]):.3g} as the smallest; raise `nullspace_threshold`"
                )
                raise StatisticsError(msg)
            log.info("Null space of %s below %g: rank %d of %d.", self.name, threshold, rank, self.width)
            if rank == self.width:
                highest = float(values[-1])
                log.warning(
                    "The null space of %s is everything, so nothing is protected: its largest eigenvalue is %.3g; "
                    "lower `nullspace_threshold` (%g).",
                    *(self.name, highest, threshold),
                )
            self._null_spaces[threshold] = vectors[:, :rank].clone().cpu()
        return self._null_spaces[threshold]

    @cached_property
    def _matrix(self) -> Tensor:
        """C, once it is known to be a finite symmetric matrix."""
        return symmetric(self.mean, self.name)

    def _check_width(self, keys: Tensor) -> None:
        if keys.shape[-1] != self.width:
            msg = (
                f"the second moment of {self.name} is of another width: expected {keys.shape[-1]}, that of the keys, "
                f"got {self.width}; take statistics of this model and layer"
            )
            raise StatisticsError(msg)

    def _whitens_well(self, device: torch.device) -> bool:
        """Whether ``C⁻¹ k`` is exact enough for `least_squares`; found out once. Else no factor is kept."""
        if self._condition is None:
            _ = self._matrix  # refused as such, not as singular
            try:
                self.factor(device)
            except StatisticsError:
                self._condition = math.inf
                log.info("Second moment of %s: singular; batches are solved by the whole system.", self.name)
        assert self._condition is not None
        if self._condition > WHITENS_WELL:
            self._factor = None
        return self._condition <= WHITENS_WELL

    def _rank_is_below_width(self, more: int) -> bool:
        """Whether so few keys went into C that it is singular even with some more."""
        return self.count is not None and self.count + more < self.width and not self.ridge

    def _singular(self, how: str) -> str:
        tokens = "unknown many" if self.count is None else self.count
        return f"the second moment of {self.name} {how} (width {self.width}, {tokens} tokens); {ADVICE}"

    def roomy(self, device: torch.device | None) -> torch.device:
        """The device, if it does float64 and `ROOMY` matrices of that size fit into it."""
        if device is not None and device.type == "cuda" and free_memory(device) > ROOMY * 8 * self.width**2:
            return device
        return torch.device("cpu")


class Identity(KeyStatistics):
    """C = I: keys are not whitened, by explicit choice.

    Args:
        width: Width k of the keys.
        name: Name of the linear map that reads the keys.
    """

    def __init__(self, width: int, name: str = "the keys") -> None:
        super().__init__(torch.zeros(()).expand(width, width), name=name)
        del self.mean  # made where it is needed, which is hardly ever

    @cached_property
    def mean(self) -> Tensor:  # type: ignore[override]
        """The identity, shape ``(k, k)``."""
        return torch.eye(self.width)

    factor_is_due = False

    def solve(self, keys: Tensor) -> Tensor:
        """The keys themselves, in float64."""
        return double(keys)

    def _whitens_well(self, device: torch.device) -> bool:
        """Always, and nothing is factorised."""
        del device
        return True
