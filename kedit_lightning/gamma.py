"""How far values can be compressed: EAC's γ, chosen on single edits (EAC, appendix A)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from kedit_lightning.callbacks.console import say
from kedit_lightning.callbacks.figures import SCORES as COLOURS
from kedit_lightning.callbacks.figures import STYLE, blank, headline, keep
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.editors import Editor
from kedit_lightning.editors.compression import Compression
from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record
from kedit_lightning.measurement import Measurement
from kedit_lightning.metrics import eac_names
from kedit_lightning.single_edits import SingleEdits
from kedit_lightning.writing import write_beside, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kedit_lightning.trainer import EditTrainer

GAMMAS = [0.0, 20.0, 40.0, 50.0, 60.0, 70.0, 80.0, 85.0, 90.0, 95.0, 98.0]
"""Percentiles that are tried; those of EAC's Table 2 among them."""


SEED = 0
"""Of the choice of edits."""


class GammaSearch:
    """Edits the same facts under every γ, each by itself, side by side; `EditTrainer.tune_gamma` drives it.

    The γ chosen is the largest at which each of reliability, generalization and locality is within ``tolerance`` of
    what the editor reaches without compression. gamma.csv and gamma.png in the run directory hold the scores,
    gamma.yaml is an overlay for `kedit fit` with the choice.

    Args:
        trainer: The trainer.
        editor: The editor; of its ``compress`` all but γ is kept.
        datamodule: The edits, of which ``edits`` are taken by chance, the same ones each time.
        gammas: The percentiles.
        edits: How many facts.
        tolerance: How far a score may fall, as a fraction.

    Raises:
        KeditError: A setting is out of range, or the editor has no values to compress.
    """

    def __init__(
        self,
        trainer: EditTrainer,
        editor: Editor,
        datamodule: EditDataModule,
        gammas: Sequence[float],
        edits: int,
        tolerance: float,
    ) -> None:
        if not gammas or edits < 1 or not 0 <= tolerance < 1:
            msg = (
                "tune-gamma: expected at least one percentile, one edit and a tolerance from 0 to below 1, got "
                f"gammas {list(gammas)}, edits {edits}, tolerance {tolerance:g}"
            )
            raise KeditError(msg)
        if "compress" not in editor.config:
            msg = f"tune-gamma: {type(editor).__name__} has no setting `compress`: it optimises no value"
            raise KeditError(msg)
        self.trainer, self.editor, self.datamodule, self.tolerance = trainer, editor, datamodule, tolerance
        setting = editor.compress or Compression()
        self.settings = [replace(setting, gamma=gamma) for gamma in sorted(set(gammas))]
        self.edits = random.Random(SEED).sample(datamodule.edits, min(edits, len(datamodule.edits)))
        self.measurement = Measurement(trainer, editor, datamodule)

    def run(self, fit: Callable[[], None]) -> float | None:
        """Measure every γ, and choose.

        Args:
            fit: Runs one `Trainer.fit`.

        Returns:
            The chosen γ; None where none of them keeps the scores.
        """
        trainer, editor, given = self.trainer, self.editor, self.editor.compress
        trainer.tell("on_stream_start", editor, len(self.edits) * (len(self.settings) + 1))
        singles = SingleEdits(trainer, editor, self.datamodule, fit)
        with closing(trainer.edit_logger):
            try:
                with singles.ready():
                    self.measurement.evaluator.references(self.edits)
                    rows = [self._measure(setting, singles) for setting in (None, *self.settings)]
            finally:
                editor.compress = given
            chosen = choose(rows, self.tolerance)
            self._keep(rows, chosen)
        return chosen

    def _measure(self, setting: Compression | None, singles: SingleEdits) -> Record:
        """The scores of single edits under one γ; one that is rejected counts as changing nothing."""
        self.editor.compress, evaluator = setting, self.measurement.evaluator
        metrics = evaluator.new()
        for block, owners in singles.blocks(self.edits):
            evaluator.update(metrics, block, owners=owners)
        found = metrics.compute()
        if missing := [name for name, metric in eac_names().items() if metric not in found]:
            msg = f"tune-gamma needs edits with prompts for {', '.join(missing)}; these records have none"
            raise KeditError(msg)
        scores = {name: found[metric].mean for name, metric in eac_names().items()}
        return {"gamma": None if setting is None else setting.gamma, "edits": len(self.edits), **scores}

    def _keep(self, rows: Sequence[Record], chosen: float | None) -> None:
        path: Path = self.trainer.run.path
        write_csv(path / "gamma.csv", rows)
        keep(self.trainer, "gamma", draw(rows, chosen), len(self.edits))
        if chosen is not None:
            overlay = f"model:\n  init_args:\n    compress:\n      gamma: {chosen:g}\n"
            write_beside(path / "gamma.yaml", lambda path: path.write_text(overlay, encoding="utf-8"))
        found = "no γ keeps every score" if chosen is None else f"γ = {chosen:g} keeps every score"
        said = f"{found} within {100 * self.tolerance:g} points; run directory {path}"
        say(self.trainer, table(rows, chosen), said)


def choose(rows: Sequence[Record], tolerance: float) -> float | None:
    """The largest γ that keeps every score.

    Args:
        rows: Of each γ the scores; of γ None those without compression.
        tolerance: How far a score may fall below the latter.

    >>> scores = {"reliability": 1.0, "generalization": 0.5, "locality": 1.0}
    >>> rows = [{"gamma": None, **scores}, {"gamma": 80.0, **scores}, {"gamma": 95.0, **scores, "generalization": 0.4}]
    >>> choose(rows, 0.05), choose(rows, 0.2), choose([{**rows[0], "locality": 2.0}, *rows[1:]], 0.05)
    (80.0, 95.0, None)
    """
    base = next(row for row in rows if row["gamma"] is None)
    kept = [
        row["gamma"]
        for row in rows
        if row["gamma"] is not None and all(row[name] >= base[name] - tolerance - 1e-12 for name in eac_names())
    ]
    return max(kept, default=None)


def table(rows: Sequence[Record], chosen: float | None) -> Table:
    """EAC's Table 3 for one editor, a row a γ."""
    found = Table(title="EAC: how far values can be compressed", title_justify="left", box=box.HORIZONTALS)
    for name in ("γ", *eac_names()):
        found.add_column(name, justify="right")
    for row in rows:
        gamma = "none" if row["gamma"] is None else f"P{row['gamma']:g}"
        style = "bold" if row["gamma"] is not None and row["gamma"] == chosen else None
        found.add_row(gamma, *(f"{100 * row[name]:.1f}" for name in eac_names()), style=style)
    return found


def draw(rows: Sequence[Record], chosen: float | None) -> Figure:
    """The scores over γ; those without compression dashed."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = blank(7, 4)
        axis = figure.subplots()
        base, *tried = rows
        for name, colour in zip(eac_names(), COLOURS, strict=False):
            axis.plot([row["gamma"] for row in tried], [100 * row[name] for row in tried], "o-", c=colour, label=name)
            axis.axhline(100 * base[name], c=colour, ls="--", lw=0.8)
        if chosen is not None:
            axis.axvline(chosen, c="#666666", lw=0.8)
        axis.set_xlabel("γ, percentile of the scores below which coordinates are dropped")
        axis.set_ylabel("score × 100; dashed: not compressed")
        axis.legend()
        headline(figure, f"EAC on {base['edits']} single edits")
    return figure
