"""Pictures of a finished edit stream: metrics before and after, and the loss curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lightning import Trainer
from torch import Tensor

from kedit_lightning.callbacks.base import EditCallback
from kedit_lightning.editors import Editor
from kedit_lightning.report import LABELS, count, shown
from kedit_lightning.run import Record
from kedit_lightning.writing import write_beside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE, AFTER, INK = "#b6bcc6", "#2f6db5", "#2b2f36"
TERMS = {"loss": INK, "nll": "#2f6db5", "distance": "#2f6db5", "kl": "#d9822b", "weight_decay": "#4b9f6a"}
OTHERS = ("#8d5bb5", "#c0504d", "#7a8699")
SCORES, MARKERS = ("#2f6db5", "#4b9f6a", "#d9822b", INK, "#8d5bb5"), "os^Dv"
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.edgecolor": "#9aa1ab",
    "grid.color": "#e3e6ea",
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
}
ALL = (-math.inf, math.inf)
FLOOR = 1e-4
"""Losses below are not drawn: at the first evaluation the decay and the KL are 0."""


@dataclass
class Curves:
    """The loss curves of one stage, over all edit batches.

    Args:
        terms: For each edit batch the terms, each of shape ``(steps, n)``.
    """

    terms: list[dict[str, Tensor]] = field(default_factory=list)

    def gathered(self) -> dict[str, Tensor]:
        """Each term, and their sum as ``loss``, of shape ``(steps, edits)``; what ended early stays as it was."""
        steps = max(len(values) for batch in self.terms for values in batch.values())
        found: dict[str, list[Tensor]] = {}
        for batch in self.terms:
            for term, values in {**batch, "loss": torch.stack(list(batch.values())).sum(dim=0)}.items():
                tail = values[-1:].expand(steps - len(values), -1)
                found.setdefault(term, []).append(torch.cat([values, tail]))
        return {term: torch.cat(parts, dim=1) for term, parts in found.items()}


class Figures(EditCallback):
    """At the end of the stream ``before_after.png`` and ``loss_curves.png`` in the run directory and in TensorBoard.

    The loss curves of a run that was resumed are those since then, as their title says; TensorBoard has them all.
    """

    def __init__(self) -> None:
        self.curves, self.resumed = dict[tuple[int, str], Curves](), 0

    def on_stream_start(self, trainer: Trainer, editor: Editor, n_edits: int) -> None:
        """Begin anew."""
        self.curves, self.resumed = {}, 0

    def on_stream_resumed(self, trainer: Trainer, editor: Editor, records: Sequence[Record]) -> None:
        """Keep after how many edits."""
        self.resumed = len(records)

    def on_edits_committed(self, trainer: Trainer, editor: Editor, records: Sequence[Record]) -> None:
        """Keep the loss curves of the edit batch."""
        if not trainer.is_global_zero:
            return
        layers = editor.passes()
        for outcome in editor.outcomes:
            if outcome.curves:
                stacked = {term: torch.stack([at[term] for at in outcome.curves]) for term in outcome.curves[0]}
                key = layers[outcome.pass_], outcome.stage
                self.curves.setdefault(key, Curves()).terms.append(stacked)

    def on_stream_end(self, trainer: Trainer, editor: Editor, report: Record) -> None:
        """Draw."""
        if not trainer.is_global_zero:
            return
        from matplotlib import rc_context

        with rc_context(STYLE):
            if "pre" in report and "post" in report:
                keep(trainer, "before_after", before_after(report), report["edits"])
            if self.curves:
                keep(trainer, "loss_curves", loss_curves(self.curves, self.resumed), report["edits"])
        self.curves = {}


def keep(trainer: Trainer, name: str, figure: Figure, step: int) -> None:
    """Write a figure into the run directory as PNG, and to TensorBoard."""
    path = trainer.run.path / f"{name}.png"  # type: ignore[attr-defined] # EditTrainer, which imports this module
    write_beside(path, lambda path: figure.savefig(path, dpi=150, format="png"))
    experiment = getattr(trainer.logger, "experiment", None)
    if experiment is not None and hasattr(experiment, "add_figure"):
        experiment.add_figure(name, figure, step, close=False)


def before_after(report: Record) -> Figure:
    """Bars of the metrics before and after with their 95 % intervals; fluency, in bits, on an axis of its own."""
    pre, post = report["pre"], report["post"]
    names = [name for name in shown([pre, post]) if name in pre and name in post]
    shares, bits = [name for name in names if name != "fluency"], [name for name in names if name == "fluency"]
    figure = blank(8.6, 1.5 + 0.52 * len(names) + 0.6 * bool(bits))
    parts = [(part, unit) for part, unit in ((shares, "%"), (bits, "bits")) if part]
    axes = figure.subplots(len(parts), squeeze=False, height_ratios=[len(part) + 0.4 for part, _ in parts])[:, 0]
    for axis, (part, unit) in zip(axes, parts, strict=True):
        _bars(axis, part, pre, post, unit)
    headline(figure, f"{report['editor']}, {count(report['edits'])}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2)
    return figure


def _bars(axis: Axes, names: Sequence[str], pre: Record, post: Record, unit: str) -> None:
    scale, most, digits = (100, 100.0, 1) if unit == "%" else (1, math.inf, 2)
    longest = most if unit == "%" else max(summary[name]["mean"] for name in names for summary in (pre, post))
    for summary, offset, colour, label in ((pre, -0.2, BEFORE, "before"), (post, 0.2, AFTER, "after")):
        means = [scale * summary[name]["mean"] for name in names]
        errors = [scale * summary[name].get("ci95", 0.0) for name in names]
        rows = [row + offset for row in range(len(names))]
        axis.barh(rows, means, 0.38, color=colour, label=label, zorder=2)
        known = [(mean, error or math.nan) for mean, error in zip(means, errors, strict=True)]  # nan: nothing is drawn
        within = [[min(error, mean) for mean, error in known], [min(error, most - mean) for mean, error in known]]
        axis.errorbar(means, rows, xerr=within, fmt="none", ecolor=INK, elinewidth=1, capsize=2, zorder=3)
        for row, mean, error in zip(rows, means, errors, strict=True):
            axis.text(min(mean + error, most) + 0.012 * longest, row, f"{mean:.{digits}f}", va="center", fontsize=8.5)
    axis.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axis.set_ylim(len(names) - 0.45, -0.55)
    axis.set_xlim(0, 1.12 * longest)
    if unit == "%":
        axis.set_xticks(range(0, 101, 20))
    axis.xaxis.set_major_formatter(f"{{x:g}} {unit}")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", zorder=0)


def loss_curves(curves: dict[tuple[int, str], Curves], resumed: int = 0) -> Figure:
    """Mean loss by stage and term over the loss evaluations, with the band that holds the middle 80 % of the edits.

    They are those since the run was resumed after ``resumed`` edits, which had been made before.
    """
    layers = {layer for layer, _ in curves}
    columns = min(len({stage for _, stage in curves}), 3)
    rows = -(-len(curves) // columns)
    figure = blank(max(5.2, 4.3 * columns), 3.8 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    edits = 0
    for axis, ((layer, stage), stage_curves) in zip(axes, curves.items(), strict=False):
        terms = stage_curves.gathered()
        edits = terms["loss"].shape[1]
        _lines(axis, terms)
        axis.set_title(f"stage {stage}" + (f", layer {layer}" if len(layers) > 1 else ""), loc="left")
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    for axis in axes[::columns]:
        axis.set_ylabel("loss")
    title = f"Loss of {count(edits)}" + (f", since the run was resumed after {resumed}" if resumed else "")
    headline(figure, title + (": mean, and where the middle 80 % lie" if edits > 1 else ""))
    return figure


def _lines(axis: Axes, terms: dict[str, Tensor]) -> None:
    from matplotlib.ticker import MaxNLocator

    others = iter(OTHERS * len(terms))
    steps = range(1, len(terms["loss"]) + 1)
    for term, values in sorted(terms.items(), key=lambda item: item[0] != "loss"):
        colour = TERMS.get(term) or next(others)
        mean = values.float().mean(dim=1)
        total = term == "loss"
        style: dict[str, Any] = {"marker": "o"} if len(steps) == 1 else {}
        axis.plot(
            steps, mean.where(mean > FLOOR, math.nan), color=colour, lw=2.4 if total else 1.5, zorder=4 if total else 3,
            label="loss (sum)" if total else term.replace("_", " "), **style,
        )  # fmt: skip
        if values.shape[1] > 1:
            low, high = torch.quantile(values.float().clamp(min=FLOOR), torch.tensor([0.1, 0.9]), dim=1)
            axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0, zorder=1, where=mean > FLOOR)
    axis.set_yscale("log")
    axis.set_ylim(bottom=max(FLOOR, axis.get_ylim()[0]))
    axis.set_xlabel("loss evaluation")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(axis="y", zorder=0)
    axis.legend(fontsize=8.5)


def draw_scaling(trainer: Trainer, title: str, rows: Sequence[Record], unedited: Mapping[str, float | None]) -> None:
    """Keep the scores over the number of edits made at once, with their 95 % intervals as bands.

    Args:
        trainer: Whose run directory and TensorBoard take it as ``scaling``.
        title: What was edited how.
        rows: A record a number of edits: ``edits`` and, by score, ``NAME`` and ``NAME_ci95``; nan where there is none.
        unedited: The scores of the unedited model, which are dotted.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        keep(trainer, "scaling", scaling(title, rows, unedited), sum(row["runs"] for row in rows))


def scaling(title: str, rows: Sequence[Record], unedited: Mapping[str, float | None]) -> Figure:
    """The figure of `draw_scaling`."""
    figure = blank(8.2, 4.6)
    axis = figure.subplots()
    for i, (name, colour) in enumerate(zip(unedited, SCORES, strict=True)):
        aside = 1.025 ** (i - len(SCORES) // 2)  # so that equal scores stand beside each other
        points = [
            {"edits": aside * row["edits"], "mean": 100 * row[name], "ci95": 100 * row[f"{name}_ci95"]} for row in rows
        ]
        if all(math.isnan(point["mean"]) for point in points):
            continue
        band(axis, points, colour, name, ends=(0, 100), marker=MARKERS[i])
        if (before := unedited[name]) is not None:
            axis.axhline(100 * before, color=colour, lw=1, ls=":", zorder=2)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel("edits in one batch (dotted: unedited model)")
    axis.set_ylim(-2, 102)
    axis.yaxis.set_major_formatter("{x:g} %")
    axis.grid(axis="y", zorder=0)
    figure.legend(loc="outside right center")
    headline(figure, title)
    return figure


def band(
    axis: Axes, rows: Sequence[Record], colour: str, label: str, ends: tuple[float, float] = ALL, **style: Any
) -> None:
    """A curve over the number of edits, with its 95 % interval as a band.

    Args:
        axis: Where to draw.
        rows: ``edits`` (or whatever else it is over), ``mean`` and ``ci95`` of each point; nan where there is none.
        colour: Of both.
        label: Of the curve.
        ends: What the band stays within.
        style: Of the curve, such as its marker.
    """
    edits = [row["edits"] for row in rows]
    mean, half = (torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in ("mean", "ci95"))
    axis.plot(edits, mean, color=colour, label=label, **{"lw": 2, "marker": "o", "ms": 4, "zorder": 3, **style})
    axis.fill_between(edits, (mean - half).clamp(*ends), (mean + half).clamp(*ends), color=colour, alpha=0.15, lw=0)


def blank(width: float, height: float) -> Figure:
    """A figure outside pyplot's state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    return figure


def headline(figure: Figure, text: str) -> None:
    """A title on the left."""
    figure.suptitle(text, fontsize=13, x=0.012, ha="left")
