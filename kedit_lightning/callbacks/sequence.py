"""The picture of a sequence of edits: its scores at the checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning import Trainer

from kedit_lightning.callbacks.base import EditCallback
from kedit_lightning.callbacks.figures import MARKERS, SCORES, STYLE, band, blank, headline, keep
from kedit_lightning.editors import Editor
from kedit_lightning.metrics import REPORTED, eac_names
from kedit_lightning.run import Record
from kedit_lightning.writing import write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRWISE = ("efficacy", "generalization", "s_specificity", "r_specificity")
"""What CounterFact is scored by."""


class SequenceCurve(EditCallback):
    """At the end of a stream with checkpoints ``curve.csv`` and ``curve.png``, the picture in TensorBoard too."""

    def on_stream_end(self, trainer: Trainer, editor: Editor, report: Record) -> None:
        """Draw."""
        run = trainer.run  # type: ignore[attr-defined] # EditTrainer, which imports this module
        if not trainer.is_global_zero or not (records := run.checkpoints.records()):
            return
        from matplotlib import rc_context

        write_csv(run.path / "curve.csv", table(records))
        with rc_context(STYLE):
            keep(trainer, "curve", curve(f"{report['editor']}, edit after edit", records), records[-1]["edits"])


def table(records: Sequence[Record]) -> list[Record]:
    """Checkpoints as rows: ``edits`` and, for both parts, each metric (``so_far/NAME``) and ``_ci95``."""
    return [
        {
            "edits": record["edits"],
            **{
                f"{part}/{name}{suffix}": record[part].get(name, {}).get(field)
                for part in ("so_far", "latest")
                for name in REPORTED
                if any(name in other[part] for other in records)
                for suffix, field in (("", "mean"), ("_ci95", "ci95"))
            },
        }
        for record in records
    ]


def curve(title: str, records: Sequence[Record]) -> Figure:
    """Scores over the number of edits, of all facts so far (with 95 % intervals over facts) and of the latest (dashed).

    On the left EAC's measures, on the right pairwise success.
    """
    figure = blank(11, 4.4)
    axes = figure.subplots(1, 2, sharey=True)
    pairwise = {name: name for name in PAIRWISE}
    for axis, names, heading in zip(axes, (eac_names(), pairwise), ("shares of tokens (EAC)", "pairwise"), strict=True):
        for (label, name), colour, marker in zip(names.items(), SCORES, MARKERS, strict=False):
            if points := _points(records, "so_far", name):
                band(axis, points, colour, label.replace("_", "-"), ends=(0, 100), marker=marker)
            if latest := _points(records, "latest", name):
                edits, means = [point["edits"] for point in latest], [point["mean"] for point in latest]
                axis.plot(edits, means, color=colour, lw=1, ls="--", alpha=0.7, zorder=2)
        axis.set_title(heading, loc="left")
        axis.set_xlabel("edits (dashed: the latest alone)")
        axis.grid(axis="y", zorder=0)
        axis.legend(fontsize=8.5)
    axes[0].set_ylim(-2, 102)
    axes[0].yaxis.set_major_formatter("{x:g} %")
    headline(figure, title)
    return figure


def _points(records: Sequence[Mapping[str, Record]], part: str, name: str) -> list[Record]:
    found = [(record["edits"], record[part][name]) for record in records if "mean" in record[part].get(name, {})]
    return [
        {"edits": edits, "mean": 100 * score["mean"], "ci95": 100 * score.get("ci95", math.nan)}
        for edits, score in found
    ]
