"""The edits of runs as the page's script takes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from kedit_lightning.history import sequence, worked
from kedit_lightning.lines import Record
from kedit_lightning.report import LABELS, failure, shown
from kedit_lightning.run import RunDirectory

COLUMNS = {"efficacy": "Eff.", "generalization": "Gen.", "s_specificity": "S-spec.", "r_specificity": "R-spec."}
"""Metrics that the list has a column of, by comparison or, where there is none, by tokens; the others are under it."""


def edit_list(names: Sequence[str], runs: Sequence[RunDirectory]) -> Record:
    """The edits of all runs.

    Args:
        names: What the runs are called.
        runs: The runs.

    Returns:
        ``runs``, the names; ``metrics``, the labels of those that were measured; ``columns``, which of them (by place)
        have a column, and its name; ``edits``, a record an edit, whose metrics are × 100, in the order of ``metrics``.

    Raises:
        KeditError: A file of a run is damaged.
    """
    lines = [(place, line) for place, run in enumerate(runs) for line in sequence(run)]
    metrics = shown([line.get(when) or {} for _, line in lines for when in ("before", "after")])
    known = [COLUMNS.get(name.removesuffix("_accuracy")) for name in metrics]
    return {
        "runs": list(names),
        "metrics": [LABELS[name] for name in metrics],
        "columns": [(place, name) for place, name in enumerate(known) if name],
        "edits": [_edit(place, line, metrics) for place, line in lines],
    }


def _edit(place: int, line: Record, metrics: Sequence[str]) -> Record:
    """An edit: what was asked, what was answered, how it ended and why."""
    rejected = line.get("rejected")
    success = None if rejected is not None else worked(line)
    outcome = {None: "not measured", True: "worked", False: "failed"}[success] if rejected is None else "rejected"
    before, after = line.get("before") or {}, line.get("after") or {}
    return {
        "run": place,
        **{name: line.get(name) for name in ("number", "id", "commit", "prompt", "subject", "target_new")},
        **{name: line.get(name) for name in ("target_true", "answer_before", "answer_after", "seconds", "time")},
        "outcome": outcome,
        "why": rejected or (failure(line) if success is False else ""),
        "before": [number(before.get(name), 100) for name in metrics],
        "after": [number(after.get(name), 100) for name in metrics],
        "likely": [[number(when.get(name)) for name in ("p_new", "p_true")] for when in (before, after)],
        "stages": [dict(_numbers(stage)) for stage in line.get("stages") or ()],
    }


def number(value: Any, scale: float = 1) -> float | None:  # noqa: ANN401 - JSON
    """A number to four digits; None where there is none, or no finite one.

    >>> number(0.123456, 100), number(float("nan")), number(None)
    (12.35, None, None)
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{scale * value:.4g}")


def _numbers(stage: Record) -> Iterator[tuple[str, Any]]:
    for name, value in stage.items():
        yield name, number(value) if isinstance(value, float) else value
