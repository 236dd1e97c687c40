"""What several runs say together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch


def interval_over_runs(values: Sequence[float]) -> tuple[float, float]:
    """Mean over runs, and half the width of its 95 % interval: Student's t, as JEEP has it over its three seeds.

    Args:
        values: One aggregate a run; nan where a run lacks what the metric needs, which is left out.

    Returns:
        The mean and ``t(0.975, n - 1) s / √n`` with the sample's standard deviation s; nan where there are too few.

    >>> [round(number, 3) for number in interval_over_runs([98.0, 99.0, 100.0])]
    [99.0, 2.484]
    >>> interval_over_runs([98.0])
    (98.0, nan)
    """
    known = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float64)
    n = len(known)
    if n < 2:
        return (float(known.mean()) if n else math.nan), math.nan
    return float(known.mean()), half_width(float(known.std()), n)


def half_width(std: float, n: int) -> float:
    """Half the width of the 95 % interval of a mean over n runs, ``t(0.975, n - 1) s / √n``.

    >>> round(half_width(1.0, 3), 3)
    2.484
    """
    from scipy.stats import t  # type: ignore[import-untyped] # scikit-learn brings it

    return float(t.ppf(0.975, n - 1) * std / math.sqrt(n))


def curve(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Scores over the number of edits: ``edits``, ``runs`` and, for each score, its mean over runs and ``_ci95``.

    >>> points = [{"edits": 10, "scores": {"ES": efficacy, "LS": None}} for efficacy in (0.9, 1.0)]
    >>> [{name: round(value, 3) for name, value in row.items()} for row in curve(points)]
    [{'edits': 10, 'runs': 2, 'ES': 0.95, 'ES_ci95': 0.635, 'LS': nan, 'LS_ci95': nan}]
    """
    rows: list[dict[str, Any]] = []
    edited = sorted((point for point in points if point["edits"]), key=_edits)
    for edits, group in groupby(edited, key=_edits):
        runs = [point["scores"] for point in group]
        row: dict[str, Any] = {"edits": edits, "runs": len(runs)}
        for name in runs[0]:
            known = [run[name] for run in runs if run[name] is not None]
            row[name], row[f"{name}_ci95"] = interval_over_runs(known)
        rows.append(row)
    return rows


def _edits(point: Mapping[str, Any]) -> int:
    return int(point["edits"])
