"""The scaling run: how an editor's scores change with the number of edits that it makes at once."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import timedelta
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING

from kedit_lightning.callbacks.console import consoles, say
from kedit_lightning.callbacks.figures import draw_scaling
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.protocols import without_conflicts
from kedit_lightning.editors import Editor
from kedit_lightning.edits import Edit
from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record
from kedit_lightning.measurement import Measurement
from kedit_lightning.metrics import curve, paper_names
from kedit_lightning.report import count as in_words
from kedit_lightning.resume import settings
from kedit_lightning.run import newest
from kedit_lightning.scaling_table import POINTS, SETTINGS, heading, read_points, scaling_table, unedited
from kedit_lightning.writing import write_csv

if TYPE_CHECKING:
    from kedit_lightning.trainer import EditTrainer

SEEDS = [0, 1, 2]
"""Three runs, as in JEEP."""

OF_STREAM = ("evaluate", "evaluate_at", "on_rejected", "data.batch_size", "data.restore_every")
"""Settings that a scaling run does not depend on."""


def log_scale(available: int) -> list[int]:
    """JEEP's numbers of edits, ``exp(ln(10,000) · i / 16)`` rounded, as far as there are edits.

    >>> log_scale(100)
    [1, 2, 3, 6, 10, 18, 32, 56, 100]
    >>> len(log_scale(12_800)), log_scale(12_800)[-2:]
    (17, [5623, 10000])
    """
    counts = [round(math.exp(math.log(10_000) * i / 16)) for i in range(17)]
    return [count for count in counts if count <= available]


class Scaling:
    """Edits more and more facts in one batch, each time on the unedited model; `EditTrainer.scale` drives it.

    A point is a number of edits m and a seed: the first m edits of the seed's shuffle of all edits. Points are kept as
    they are measured; the newest version of the run is gone on with, and what it holds is not measured again. The
    updates themselves are not kept.

    Args:
        trainer: The trainer.
        editor: The editor.
        datamodule: The edits; its batch size and restorations do not count.
        counts: Numbers of edits, ascending; by default `log_scale`.
        seeds: Seeds of the shuffles.

    Raises:
        KeditError: The numbers cannot be used, edits contradict each other, or the newest version of the run has other
            settings.
    """

    def __init__(
        self,
        trainer: EditTrainer,
        editor: Editor,
        datamodule: EditDataModule,
        counts: Sequence[int] | None,
        seeds: Sequence[int],
    ) -> None:
        self.trainer, self.editor, self.datamodule = trainer, editor, datamodule
        self.edits = without_conflicts(datamodule.edits, len(datamodule.edits), datamodule.on_conflict)
        counts = log_scale(len(self.edits)) if counts is None else list(counts)
        _check(counts, seeds, len(self.edits))
        self.asked = list(product(counts, seeds))
        self._go_on()
        self.measurement = Measurement(trainer, editor, datamodule)
        self.settings = self._settings()
        self._compare(trainer.run.path / SETTINGS)

    def run(self, fit: Callable[[], None]) -> list[Record]:
        """Measure what is missing; after each point the curve is written anew.

        Args:
            fit: Runs one `Trainer.fit`.

        Returns:
            The curve: a record a number of edits.
        """
        there = {(point["edits"], point["seed"]) for point in self._points()}
        missing = [(count, seed) for count, seed in self.asked if (count, seed) not in there]
        done, left, started = 0, sum(count for count, _ in missing), time.time()
        with closing(self.trainer.edit_logger):
            try:
                if missing:
                    self._prepare(missing)
                    started = time.time()
                for count, seed in missing:
                    point = self._measure(count, seed, fit)
                    self._keep(point)
                    done, left = done + count, left - count
                    remaining = timedelta(seconds=round((time.time() - started) / done * left))
                    if self.trainer.show_progress:
                        say(self.trainer, f"{_described(point)}; {remaining} left", close=False)
            finally:
                self.editor.base.restore()
                for console in consoles(self.trainer):
                    console.close()
        for console in consoles(self.trainer) if self._points() else []:
            console.out.print(scaling_table(self.trainer.run.path, console.out.width))
        say(self.trainer, f"run directory {self.trainer.run.path}")
        return curve(self._points())

    # ------------------------------------------------------------------ points

    def _prepare(self, missing: Sequence[tuple[int, int]]) -> None:
        """Prepare the editor, and take from the unedited model what specificity refers to, and its scores."""
        edits = list(dict.fromkeys(edit for count, seed in missing for edit in self._first(count, seed)))
        self.trainer.tell("on_stream_start", self.editor, len(edits))
        self.editor.restore()
        self.editor.prepare()
        self.trainer.run.write_json("contexts.json", {"templates": self.editor.templates})
        self.trainer.run.write_json(SETTINGS, self.settings)
        self.measurement.evaluator.references(edits)
        before = {point["measured"] for point in self._points() if point["edits"] == 0}
        if max(before, default=0) < len(edits):
            self._keep({"edits": 0, "seed": None, "measured": len(edits), **self._score("before", edits)})

    def _measure(self, count: int, seed: int, fit: Callable[[], None]) -> Record:
        """One point."""
        batch = self._first(count, seed)
        self.trainer.tell("on_stream_start", self.editor, count)
        self.editor.restore()
        started = time.time()
        self.trainer.weight_update.edit(self.editor, self.datamodule, batch, fit)
        edited = time.time()
        scores = self._score("after", batch)
        seconds = {"editing": round(edited - started, 3), "measuring": round(time.time() - edited, 3)}
        return {"edits": count, "seed": seed, **scores, "seconds": seconds}

    def _score(self, title: str, edits: list[Edit]) -> Record:
        """JEEP's scores and R-specificity of the model as it is, None where there is none, and all metrics."""
        metrics = self.measurement.evaluator.new()
        self.measurement.score(title, [edits], metrics)
        found = metrics.compute()
        names = paper_names(found) | {"R-specificity": "r_specificity"}
        scores = {name: found[metric].mean if metric in found else None for name, metric in names.items()}
        return {"scores": scores, "metrics": {name: summary.as_dict() for name, summary in found.items()}}

    def _first(self, count: int, seed: int) -> list[Edit]:
        edits = list(self.edits)
        random.Random(seed).shuffle(edits)
        return edits[:count]

    # ------------------------------------------------------------------ the run directory

    def _go_on(self) -> None:
        """Take the newest version that holds a scaling run, if there is one."""
        trainer = self.trainer
        found = newest(Path(trainer.edit_logger.root_dir), SETTINGS)
        if (found / SETTINGS).is_file():
            trainer.turn_to(found)

    def _settings(self) -> Record:
        """What the points depend on; points of different settings never share a directory."""
        found = settings(self.editor, self.datamodule, self.measurement)
        edits = hashlib.sha256(repr(self.edits).encode()).hexdigest()
        return {key: value for key, value in found.items() if key not in OF_STREAM} | {"edits": edits}

    def _compare(self, path: Path) -> None:
        """Refuse to go on with a run of other settings."""
        there = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else self.settings
        for key in {**there, **self.settings}:
            if there.get(key) != self.settings.get(key):
                msg = (
                    f"{path.parent} holds a scaling run of other settings ({key}: {there.get(key)} there, "
                    f"{self.settings.get(key)} here); give this one another --trainer.name"
                )
                raise KeditError(msg)

    def _points(self) -> list[Record]:
        return read_points(self.trainer.run.path)

    def _keep(self, point: Record) -> None:
        """Add a point to those on the disk, and write the curve anew."""
        key = point["edits"], point["seed"]
        points = [other for other in self._points() if (other["edits"], other["seed"]) != key]
        self.trainer.run.write_lines(POINTS, points := [*points, point])
        if not (rows := curve(points)):
            return
        write_csv(self.trainer.run.path / "scaling.csv", rows)
        draw_scaling(self.trainer, heading(self.settings), rows, unedited(points))

    # ------------------------------------------------------------------ the terminal


def _described(point: Record) -> str:
    scores = ", ".join(f"{name} {100 * value:.1f}" for name, value in point["scores"].items() if value is not None)
    return f"{in_words(point['edits'])}, seed {point['seed']}: {scores}"


def _check(counts: Sequence[int], seeds: Sequence[int], available: int) -> None:
    """Refuse numbers of edits and seeds that mean nothing."""
    if not counts or counts[0] < 1 or counts[-1] > available or any(a >= b for a, b in pairwise(counts)):
        msg = f"counts: expected ascending numbers from 1 to {available}, the edits there are, got {list(counts)}"
        raise KeditError(msg)
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        msg = f"seeds: expected at least one, each once and none below 0, got {list(seeds)}"
        raise KeditError(msg)
