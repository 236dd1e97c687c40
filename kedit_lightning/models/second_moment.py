"""The second moment of keys: its accumulator. What is solved with it is in `key_statistics`."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from kedit_lightning.solvers import double

BLOCK = 768
"""Columns whose products are made together."""


class SecondMoment(Metric):
    """Uncentred second moment ``C = (1/T) Σ k kᵀ`` of keys, summed over processes.

    The state follows the device of the keys. Of the symmetric sum it holds what is right of its diagonal blocks, which
    is 0.6 of the arithmetic; `total` is the whole of it.

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
        for start in range(0, keys.shape[1], BLOCK):
            self.moment[start : start + BLOCK, start:].addmm_(keys[:, start : start + BLOCK].T, keys[:, start:])
        self.count += len(keys)

    def compute(self) -> Tensor:
        """C, shape ``(k, k)``."""
        return self.total() / self.count

    def total(self) -> Tensor:
        """Σ k kᵀ, shape ``(k, k)``."""
        return self.moment.triu() + self.moment.triu(1).T
