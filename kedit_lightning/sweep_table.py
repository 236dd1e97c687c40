"""What `kedit suggest` shows of the places that it tried: a record, a table and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from kedit_lightning.callbacks.figures import INK, SCORES, STYLE, band, blank, headline
from kedit_lightning.lines import Record
from kedit_lightning.metrics import EditMetrics
from kedit_lightning.metrics.functional import harmonic_mean
from kedit_lightning.places import Place, listed
from kedit_lightning.probing import text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOUR = ("efficacy", "generalization", "s_specificity", "r_specificity")


def row_of(place: Place, metrics: EditMetrics) -> Record:
    """The four metrics of a place with their 95 % intervals, as far as the records have prompts, and their score."""
    found = metrics.compute()
    four = {name: found[name] for name in FOUR if name in found}
    score = harmonic_mean([summary.mean for summary in four.values()])
    row: Record = {"layers": listed(place.layers), "high": listed(place.high), "l_a": place.l_a, "score": score}
    row |= {name: summary.mean for name, summary in four.items()}
    return row | {"edits": found["efficacy"].n, **{f"{name}_ci95": one.ci95 for name, one in four.items()}}


def table(rows: Sequence[Record], best: int) -> Table:
    """The sweep in percent."""
    shown = Table(title=f"{rows[0]['edits']} edits at every place", title_justify="left", box=box.HORIZONTALS)
    names = [name for name in ("score", *FOUR) if name in rows[0]]
    for name in ("layers", "high", "l_a", *(name.replace("_", "-") for name in names)):
        shown.add_column(name, justify="right")
    for i, row in enumerate(rows):
        scores = (f"{100 * row[name]:.1f}" for name in names)
        shown.add_row(row["layers"], row["high"], text(row["l_a"]), *scores, style="bold" if i == best else None)
    return shown


def draw(rows: Sequence[Record]) -> Figure:
    """The scores over the edited layers; or over l_a (TOP, Fig. 5) or the high layers, a panel for all others."""
    from matplotlib import rc_context
    from matplotlib.ticker import MaxNLocator

    over = "l_a" if rows[0]["l_a"] is not None else "last high layer" if rows[0]["high"] else ""
    panels = sorted({row["layers"] for row in rows}) if over else [""]
    with rc_context(STYLE):
        figure = blank(max(5.4, 3.6 * len(panels)), 4)
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, panel in zip(axes, panels, strict=True):
            mine = [row for row in rows if row["layers"] == panel] if over else rows
            of = [row["l_a"] if over == "l_a" else row["high"] or row["layers"] for row in mine]
            place = [int(str(layers).split(", ")[-1]) for layers in of]
            for name, colour in zip((*FOUR, "score"), (*SCORES[:3], SCORES[4], INK), strict=True):
                points = [
                    {"edits": place[i], "mean": 100 * row[name], "ci95": 100 * row.get(f"{name}_ci95", 0.0)}
                    for i, row in enumerate(mine)
                    if name in row
                ]
                points.sort(key=lambda point: point["edits"])
                band(axis, points, colour, "harmonic score" if name == "score" else name, ends=(0, 100))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_xlabel(f"{over}, layers {panel} edited" if over else "last edited layer")
            axis.grid(axis="y", zorder=0)
        axes[0].set_ylabel("score × 100")
        axes[-1].legend(fontsize=8)
        headline(figure, f"{rows[0]['edits']} single edits at every place")
    return figure
