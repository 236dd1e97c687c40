"""The means and the picture of the contrast probe: ranks, probabilities and entropies over the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kedit_lightning.callbacks.figures import INK, OTHERS, SCORES, STYLE, band, blank, headline
from kedit_lightning.lines import Record
from kedit_lightning.metrics.functional import summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "original": SCORES[0],
        "target": SCORES[2],
        "related": SCORES[4],
        "factual": SCORES[1],
        "non_factual": OTHERS[1],
        "stop": INK,
        "unrelated": OTHERS[2],
        "entropy": INK,
    }
)
LINES: Mapping[str, Any] = MappingProxyType(
    {"edited": {"zorder": 3}, "unedited": {"ls": "--", "marker": "", "lw": 1.4, "alpha": 0.9}}
)
"""Style of each model's curves, where there are two."""
PLACES = ("subject_last", "prediction")
TITLES = {"subject_last": "subject's last token", "prediction": "prediction"}


def means(model: str, values: Mapping[str, Tensor], curves: Sequence[str]) -> list[Record]:
    """A line for each position and layer, -1 being the embedding: means over n prompts with 95 % intervals.

    Args:
        model: Which model it is.
        values: By name, shape ``(n, 2, l + 1)``; nan is left out.
        curves: What is taken: ``entropy``, or what has a probability and a rank.
    """
    rows: list[Record] = []
    for place, position in enumerate(PLACES):
        for layer in range(next(iter(values.values())).shape[2]):
            row: Record = {"model": model, "position": position, "layer": layer - 1}
            for curve in curves:
                names = ["entropy"] if curve == "entropy" else [f"{curve}_probability", f"{curve}_rank"]
                for name in names:
                    summary = summarize(values[name][:, place, layer])
                    row |= {name: summary.mean, f"{name}_ci95": summary.ci95, f"{curve}_n": summary.n}
            rows.append(row)
    return rows


def draw(rows: Sequence[Record], curves: Sequence[str], title: str, layers: Sequence[int]) -> Figure:
    """A row of panels for each position; the unedited model dashed where an edited one is beside it.

    Args:
        rows: As of `means`.
        curves: What is drawn.
        title: What was looked at.
        layers: Layers that were edited, which are shaded.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        kinds = ["rank", "probability", *(["entropy"] if "entropy" in curves else [])]
        figure = blank(4.2 * len(kinds) + 1.4, 6.6)
        axes = figure.subplots(len(TITLES), len(kinds), sharex=True)
        for line, (position, name) in zip(axes, TITLES.items(), strict=True):
            here = [row for row in rows if row["position"] == position]
            for axis, kind in zip(line, kinds, strict=True):
                _panel(axis, here, curves, kind, layers)
                axis.set_title(f"{kind}, {name}", loc="left")
        for axis in axes[-1]:
            axis.set_xlabel("layer (-1: embedding)")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
        headline(figure, f"{title}: means with 95 % intervals")
    return figure


def _panel(axis: Axes, rows: Sequence[Record], curves: Sequence[str], kind: str, layers: Sequence[int]) -> None:
    """One quantity at one position."""
    from matplotlib.ticker import MaxNLocator

    models = list(dict.fromkeys(row["model"] for row in rows))
    for layer in layers:
        axis.axvspan(layer - 0.5, layer + 0.5, color="#f1efe6", lw=0, zorder=0)
    for curve in [kind] if kind == "entropy" else [curve for curve in curves if curve != "entropy"]:
        name = curve if kind == "entropy" else f"{curve}_{kind}"
        for model in models:
            points = [
                {"edits": row["layer"], "mean": row[name], "ci95": row[f"{name}_ci95"]}
                for row in rows
                if row["model"] == model
            ]
            style = LINES[model] if len(models) > 1 else {}
            label = curve.replace("_", "-") + (f", {model}" if len(models) > 1 else "")
            band(axis, points, COLOURS[curve], label, ends=(0, float("inf")), **style)
    if kind == "rank":
        if "target" in curves:  # means over sets keep to the middle
            axis.set_yscale("symlog", linthresh=1)
        axis.invert_yaxis()
        axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(axis="y", zorder=0)
