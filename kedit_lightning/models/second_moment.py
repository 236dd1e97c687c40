"""The second moment of keys: its accumulator and what is solved with it; pure tensors, no model."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torchmetrics import Metric

from kedit_lightning.errors import StatisticsError
from kedit_lightning.solvers import double

log = logging.getLogger(__name__)
ILL_CONDITIONED = 1e10


class SecondMoment(Metric):
    """Uncentred second moment ``C = (1/T) Σ k kᵀ`` of keys, summed over processes.

    The state follows the device of the keys.

    Args:
        width: Width k of the keys.
        dtype: Type in which is summed.

    >>> moment = SecondMoment(2)
    >>> moment.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> moment.compute()
    tensor([[5., 1.],
            [1., 2.]])
    """

    full_state_update = False
    moment: Tensor
    count: Tensor

    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(compute_with_cache=False)
        # The default is kept beside the state: as a view of one zero it costs nothing. reset() makes a matrix of it.
        self.add_state("moment", torch.zeros((), dtype=dtype).expand(width, width), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.reset()

    def update(self, keys: Tensor) -> None:
        """Add keys of shape ``(n, k)``."""
        keys = double(keys) if self.moment.dtype == torch.float64 else keys.to(self.moment.dtype)
        self.moment, self.count = self.moment.to(keys.device), self.count.to(keys.device)
        self.moment.addmm_(keys.T, keys)
        self.count += len(keys)

    def compute(self) -> Tensor:
        """C, shape ``(k, k)``."""
        return self.moment / self.count


def factorise(mean: Tensor, ridge: float = 0.0) -> Tensor:
    """Lower Cholesky factor of ``C + ridge · tr(C)/k · I`` in float64.

    Args:
        mean: C, symmetric, shape ``(k, k)``.
        ridge: What is added to the diagonal, in units of its mean.

    Returns:
        L with ``L Lᵀ = C + …``, shape ``(k, k)``.

    Raises:
        ValueError: The matrix is not positive definite.
    """
    matrix = mean.double()
    if ridge:
        matrix = matrix + ridge * matrix.diagonal().mean() * torch.eye(len(matrix)).to(matrix)
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        msg = "the second moment is singular"
        raise ValueError(msg)
    return factor


def condition(factor: Tensor, iterations: int = 20) -> float:
    """Estimate of the condition number of ``L Lᵀ`` by power iterations; it is a lower bound.

    Args:
        factor: L, lower triangular, shape ``(k, k)``.
        iterations: Steps for the largest and for the smallest eigenvalue; a step costs O(k²).
    """
    start = torch.randn(len(factor), 1, dtype=factor.dtype, generator=torch.Generator().manual_seed(0))
    high = low = start.to(factor.device)
    largest = smallest = 0.0
    for _ in range(iterations):
        high, low = factor @ (factor.T @ (high / high.norm())), torch.cholesky_solve(low / low.norm(), factor)
        largest, smallest = float(high.norm()), 1 / float(low.norm())
    return largest / smallest


class KeyStatistics:
    """Second moment C of the keys of one site, factorised on first use and then used for every edit.

    Args:
        mean: C, shape ``(k, k)``.
        count: Keys that went into it; None where a file does not say.
        ridge: Added to the diagonal of C in `factor`, in units of its mean.
        name: Name of the linear map that reads the keys, for messages.
    """

    def __init__(self, mean: Tensor, count: int | None = None, ridge: float = 0.0, name: str = "the keys") -> None:
        self.mean, self.count, self.ridge, self.name = mean, count, ridge, name
        self._factor: Tensor | None = None

    @property
    def width(self) -> int:
        """Width k of the keys."""
        return len(self.mean)

    def factor(self, device: torch.device | None = None) -> Tensor:
        """Lower Cholesky factor of C with its ridge, float64, shape ``(k, k)``; made once.

        Args:
            device: Where it would be used; it is put there if that is a GPU with ample room, else into main memory.

        Raises:
            StatisticsError: C is singular.
        """
        if self._factor is not None:
            return self._factor
        advice = "take more tokens (`statistics.tokens`; 10 × the width is usual) or set `statistics.ridge`, say 1e-3"
        tokens = "unknown many" if self.count is None else self.count
        singular = f"the second moment of {self.name} is singular (width {self.width}, {tokens} tokens); {advice}"
        if self.count is not None and self.count < self.width and not self.ridge:
            raise StatisticsError(singular)
        try:
            factor = factorise(self.mean.to(self._roomy(device)), self.ridge)
        except ValueError as error:
            raise StatisticsError(singular) from error
        number = condition(factor)
        if number > ILL_CONDITIONED:
            log.warning("The second moment of %s is ill-conditioned (about %.0e): %s.", self.name, number, advice)
        else:
            log.info("Second moment of %s: condition about %.0e.", self.name, number)
        self._factor = factor
        return factor

    def solve(self, keys: Tensor) -> Tensor:
        """``C⁻¹ k`` for keys of shape ``(k,)`` or ``(n, k)``; float64, same shape and (if it has float64) device."""
        keys = double(keys)
        factor = self.factor(keys.device)
        columns = keys.to(factor.device).reshape(-1, self.width).T
        return torch.cholesky_solve(columns, factor).T.reshape(keys.shape).to(keys.device)

    def _roomy(self, device: torch.device | None) -> torch.device:
        """The device, if it does float64 and six matrices of that size fit into it."""
        if device is not None and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if free > 6 * 8 * self.mean.numel():
                return device
        return torch.device("cpu")


class Identity(KeyStatistics):
    """C = I: keys are not whitened, by explicit choice.

    Args:
        width: Width k of the keys.
        name: Name of the linear map that reads the keys.
    """

    def __init__(self, width: int, name: str = "the keys") -> None:
        super().__init__(torch.eye(width), name=name)

    def solve(self, keys: Tensor) -> Tensor:
        """The keys themselves, in float64."""
        return double(keys)
