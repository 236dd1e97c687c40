"""How far sequential edits take the edited matrices from where they were (EAC, Fig. 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, float64

from kedit_lightning import delta as delta_files
from kedit_lightning.callbacks.figures import OTHERS, SCORES, STYLE, band, blank, headline
from kedit_lightning.curves import curve
from kedit_lightning.delta import merge
from kedit_lightning.errors import DeltaError, KeditError
from kedit_lightning.lines import Record
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.progress import steps
from kedit_lightning.probes.base import Finding, Probe, Study
from kedit_lightning.run import COMMITS, RunDirectory, newest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOGETHER = "together"
"""Stands for all edited matrices as if they were one."""

PANELS = {"drift": "drift of ‖W‖₁", "change": "‖W − W₀‖₁", "update": "‖Δ‖₁ of an edit batch"}
"""What is drawn of the rows, and how it is called."""


class NormDrift(Probe):
    """The L1 norm of the edited matrices over the edits of runs that are there already (EAC, Fig. 2).

    The deltas of each run are added to the unedited model again, one commit after another, and where the run restored
    the weights they are restored. Rows: ``label``, ``run``, ``matrix`` (or ``together``), ``edits`` so far, ``l1``:
    ‖W‖₁ = Σ |wᵢⱼ|; ``drift``: (‖W‖₁ − ‖W₀‖₁) / ‖W₀‖₁; ``change``: ‖W − W₀‖₁; ``update``: ‖Δ‖₁ of the commit, empty
    before the first. Several runs of a label, such as seeds, are drawn as their mean with a 95 % interval.

    Args:
        runs: By label run directories, or folders of their versions (the newest is taken).
    """

    def __init__(self, runs: dict[str, list[str]]) -> None:
        if not runs or not all(runs.values()):
            msg = f"probe.runs: expected run directories by label, such as {{ROME: [lightning_logs/rome]}}, got {runs}"
            raise KeditError(msg)
        self.runs = runs

    def look(self, study: Study) -> Iterator[Finding]:
        """Replay the runs.

        Raises:
            DeltaError: A run is missing, damaged or of another model.
        """
        rows: list[Record] = []
        total = sum(map(len, self.runs.values()))
        with steps("norms") as step:
            for label, paths in self.runs.items():
                for i, path in enumerate(paths):
                    step(len({(row["label"], row["run"]) for row in rows}), total, label)
                    rows += ({"label": label, "run": i, **row} for row in replay(study.base, Path(path)))
        ends = {label: ending(rows, label) for label in self.runs}
        yield Finding("norm_drift", rows, draw(rows), {"runs": self.runs, "last": ends})


def replay(base: LanguageModel, path: Path) -> Iterator[Record]:
    """The norms of a run's matrices before its first commit and after each.

    Args:
        base: The unedited model; it is left so.
        path: The run directory, or the folder of its versions.

    Yields:
        A record a matrix, and one for all together where there are several.

    Raises:
        DeltaError: There is no run, it is damaged, or it is of another model.
    """
    run = RunDirectory(newest(path, COMMITS))
    names = run.last_metadata()["fingerprint"]["names"]
    numbers = dict.fromkeys(line["commit"] for line in run.records() if line["commit"] is not None)
    if not numbers:
        msg = f"{run.path}: expected committed edits, found none"
        raise DeltaError(msg)
    edits, group = 0, None
    base.restore()
    try:
        for number in numbers:
            deltas, metadata, _ = run.load(number)
            if group is None:
                delta_files.check(base, deltas, metadata, path)
                yield from norms(base, names, 0, {})
            if metadata["group"] != group:
                base.restore()
                group = metadata["group"]
            updates = {delta.name: delta.update for delta in merge(deltas)}
            for name, update in updates.items():
                base.write(name, update)
            edits += len(metadata["case_ids"])
            yield from norms(base, names, edits, updates)
    finally:
        base.restore()


def norms(base: LanguageModel, names: Sequence[str], edits: int, updates: Mapping[str, Tensor]) -> Iterator[Record]:
    """The L1 norms of matrices as they are now.

    Args:
        base: The model.
        names: Of its matrices.
        edits: How many have been made.
        updates: By name what the last commit has added, each of shape ``(out, in)``; of none before the first.

    Yields:
        A record a matrix, and one for all together where there are several.
    """
    rows: list[Record] = []
    for name in names:
        before, after = base.pristine(name).float(), base.master(name)
        row: Record = {"l1": l1(after), "before": l1(before), "change": l1(after - before)}
        rows.append({"matrix": name, **row, "update": l1(updates[name]) if name in updates else 0.0})
    if len(rows) > 1:
        rows.append({"matrix": TOGETHER, **{key: sum(row[key] for row in rows) for key in rows[0] if key != "matrix"}})
    for row in rows:
        row["drift"] = (row["l1"] - row["before"]) / row["before"] if row["before"] else 0.0
        row["update"] = row["update"] if updates else None
        yield {"matrix": row["matrix"], "edits": edits, **{name: row[name] for name in ("l1", *PANELS)}}


def l1(matrix: Tensor) -> float:
    """Σ |wᵢⱼ|, summed in float64."""
    return float(matrix.abs().sum(dtype=float64))


def overall(rows: Sequence[Record], label: str) -> list[list[Record]]:
    """Of each run of a label the records of all its matrices together."""
    runs: dict[int, list[Record]] = {}
    for row in rows:
        if row["label"] == label:
            runs.setdefault(row["run"], []).append(row)
    several = {run: [row for row in own if row["matrix"] == TOGETHER] or own for run, own in runs.items()}
    return list(several.values())


def ending(rows: Sequence[Record], label: str) -> Record:
    """The drift of a label after its last edit: ``edits``, ``runs``, ``mean`` and, of several runs, ``ci95``."""
    last = curve({label: overall(rows, label)}, "drift")[-1]
    return {name: last[name] for name in ("edits", "runs", "mean", "ci95") if last[name] == last[name]}


def draw(rows: Sequence[Record]) -> Figure:
    """Drift, change and updates over the number of edits, a curve a label.

    Args:
        rows: Of `NormDrift`.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = blank(8.2, 8.4)
        axes = figure.subplots(len(PANELS), 1, sharex=True)
        labels, palette = list(dict.fromkeys(row["label"] for row in rows)), (*SCORES, *OTHERS)
        runs = {label: overall(rows, label) for label in labels}
        for axis, (quantity, name) in zip(axes, PANELS.items(), strict=True):
            points = curve(runs, quantity)
            for i, label in enumerate(labels):
                own = [row for row in points if row["label"] == label and (quantity == "drift" or row["mean"] > 0)]
                if quantity == "update":  # intervals of single edits, over few runs, would hide the curves
                    own = [row | {"ci95": math.nan} for row in own]
                band(axis, own, palette[i % len(palette)], label, marker="")
            axis.set_yscale("linear" if quantity == "drift" else "log")
            axis.set_ylabel(name)
            axis.grid(axis="y", zorder=0)
        axes[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes[-1].set_xlabel("edits")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
        headline(figure, "Norms of the edited matrices over sequential edits")
    return figure
