"""The table and the picture of a model's health over a stream of edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning import Trainer

from kedit_lightning.callbacks.figures import INK, SCORES, STYLE, blank, headline, keep
from kedit_lightning.lines import Record
from kedit_lightning.metrics.drift import MEASURES
from kedit_lightning.writing import write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def flat(check: Record) -> dict[str, float]:
    """The numbers of a check by name; what was not measured is left out.

    Example:
        >>> flat({"edits": 10, "drift": {"w": {"l1": 0.5}}, "delta_norm": {}, "perplexity": None, "retention": 1.0})
        {'retention': 1.0, 'l1/w': 0.5}
    """
    numbers: dict[str, Any] = {name: check[name] for name in ("retention", "perplexity")}
    matrices = check["drift"] | ({"together": check["together"]} if len(check["drift"]) > 1 else {})
    numbers |= {f"{measure}/{name}": value for name, drift in matrices.items() for measure, value in drift.items()}
    numbers |= {f"delta/{site}": value for site, value in check["delta_norm"].items()}
    return {name: value for name, value in numbers.items() if value is not None}


def keep_health(trainer: Trainer, title: str, history: Sequence[Record]) -> None:
    """Write health.csv and health.png into the run directory, and the picture to TensorBoard.

    Args:
        trainer: Whose run directory and TensorBoard.
        title: What was edited how.
        history: The checks, as in health.jsonl.
    """
    from matplotlib import rc_context

    if not history:
        return
    rows = [{"edits": check["edits"], **flat(check)} for check in history]
    columns = list(dict.fromkeys(name for row in reversed(rows) for name in row))
    path = trainer.run.path / "health.csv"  # type: ignore[attr-defined] # EditTrainer, which imports this module
    write_csv(path, [{name: row.get(name) for name in columns} for row in rows])
    with rc_context(STYLE):
        keep(trainer, "health", health(title, history), history[-1]["edits"])


def health(title: str, history: Sequence[Record]) -> Figure:
    """Retention, perplexity and drift over edits; where a warning first came is dotted."""
    figure = blank(8.2, 7.4)
    answered, text, drift = figure.subplots(3, 1, sharex=True)
    _line(answered, history, "retention", 100.0, SCORES[0])
    answered.set_ylim(-2, 102)
    answered.set_ylabel("earlier edits answered")
    answered.yaxis.set_major_formatter("{x:g} %")
    _line(text, history, "perplexity", 1.0, SCORES[1])
    text.set_ylabel("perplexity of held-out text")
    edits = [check["edits"] for check in history]
    for measure, colour in zip(MEASURES, SCORES, strict=False):
        values = [check["together"][measure] for check in history]
        drift.plot(edits, values, color=colour, lw=2, marker="o", ms=3, label=measure.replace("_", " "), zorder=3)
    drift.set_yscale("symlog", linthresh=0.1)
    drift.set_ylabel("drift of the edited matrices")
    drift.set_xlabel("edits")
    drift.legend(fontsize=8.5, ncols=len(MEASURES))
    warned = next((check["edits"] for check in history if check["warnings"]), None)
    for axis in (answered, text, drift):
        axis.grid(axis="y", zorder=0)
        if warned is not None:
            axis.axvline(warned, color=INK, lw=1, ls=":", zorder=2)
    headline(figure, title + ("" if warned is None else f" (warned after {warned})"))
    return figure


def _line(axis: Axes, history: Sequence[Record], name: str, scale: float, colour: str) -> None:
    known = [(check["edits"], scale * check[name]) for check in history if check[name] is not None]
    if known:
        axis.plot(*zip(*known, strict=True), color=colour, lw=2, marker="o", ms=3, zorder=3)
