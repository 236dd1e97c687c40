"""Numbers kept per case, so that several processes and padded samplers cannot change a mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from kedit_lightning.metrics.functional import Summary, per_case_mean, summarize


class PerCaseMetric(Metric):
    """Base of the metrics that are a mean over a case's prompts, then over cases.

    A case is counted once however often it comes (a `DistributedSampler` repeats cases to even out its ranks); the
    first occurrence wins. All prompts of a case belong into one update. A value of nan says that the case lacks what
    the metric needs: it is counted as skipped.

    Args:
        columns: Names of the values kept for each case.
    """

    full_state_update = False
    higher_is_better = True
    case_id: list[Tensor] | Tensor

    def __init__(self, *columns: str) -> None:
        super().__init__()
        self.columns = columns
        self.add_state("case_id", [], dist_reduce_fx="cat")
        for column in columns:
            self.add_state(column, [], dist_reduce_fx="cat")

    def append(self, case_ids: Tensor, *values: Tensor) -> None:
        """Keep the per-case means of one update.

        Args:
            case_ids: The case of each prompt, shape ``(b,)``.
            values: For each column one value a prompt, shape ``(b,)``.
        """
        case_ids = case_ids.to(self.device)
        for column, value in zip(self.columns, values, strict=True):
            cases, means = per_case_mean(case_ids, value.to(self.device, torch.float32))
            getattr(self, column).append(means)
        getattr(self, "case_id").append(cases)  # noqa: B009 - a list until it is gathered, which mypy cannot know

    def latest(self) -> dict[int, dict[str, float]]:
        """Values of the last update: case → column → value."""
        columns = {column: getattr(self, column)[-1].tolist() for column in self.columns}
        return {
            case: {column: values[i] for column, values in columns.items()}
            for i, case in enumerate(self.case_id[-1].tolist())
        }

    def export(self) -> dict[str, Tensor]:
        """The table of cases, each once: ``case_id`` and every column, shape ``(n,)``.

        Within one process it holds that process's cases; inside `compute` those of all processes.
        """
        if len(self.case_id) == 0:
            return {"case_id": torch.zeros(0, dtype=torch.long), **{name: torch.zeros(0) for name in self.columns}}
        ids, inverse = torch.unique(dim_zero_cat(self.case_id), return_inverse=True)
        order = torch.arange(len(inverse), device=inverse.device)
        first = order.new_full((len(ids),), len(order)).scatter_reduce(0, inverse, order, "amin")
        table = {"case_id": ids}
        for column in self.columns:
            values = dim_zero_cat(getattr(self, column))
            table[column] = values[first]
            if ((values - values[first][inverse]).abs() > 1e-6).any():
                rank_zero_warn(f"a case came twice with different values of {column}; the first is kept")
        return table

    def compute(self) -> dict[str, Summary]:
        """Summary of each column over cases."""
        table = self.export()
        return {column: summarize(table[column]) for column in self.columns}

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: object = None) -> None:
        """Gather, with empty states of the right type where a process has had no case.

        torchmetrics fills an empty state with a float tensor, and gathering that with integers aborts the job.
        """
        if len(self.case_id) == 0:
            self.case_id = [torch.zeros(0, dtype=torch.long, device=self.device)]
            for column in self.columns:
                setattr(self, column, [torch.zeros(0, device=self.device)])
        super()._sync_dist(dist_sync_fn, process_group)
