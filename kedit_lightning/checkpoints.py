"""Checkpoints of a sequence of edits: all facts so far and the latest ones, scored on the model as it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedit_lightning.errors import KeditError
from kedit_lightning.measurement import Measurement
from kedit_lightning.metrics import EditMetrics
from kedit_lightning.run import Record

if TYPE_CHECKING:
    from kedit_lightning.trainer import EditTrainer


class Checkpoints:
    """Scores the model after some numbers of edits, a line of checkpoints.jsonl each; those that are there stay.

    Scores are teacher-forced; texts are written at the end of the stream only.

    Args:
        trainer: Its callbacks hear of each checkpoint, its logger of the scores.
        measurement: How edits are scored.

    Raises:
        KeditError: The stream restores the weights, so that no model holds all facts so far.
    """

    def __init__(self, trainer: EditTrainer, measurement: Measurement) -> None:
        self.trainer, self.measurement = trainer, measurement
        self.at = trainer.evaluate_at
        if self.at and measurement.datamodule.restore_every is not None:
            msg = (
                "trainer.evaluate_at is for edits that are all kept: expected data.restore_every null, got "
                f"{measurement.datamodule.restore_every}; set one of the two to null"
            )
            raise KeditError(msg)

    def begin(self, unedited: EditMetrics) -> None:
        """Checkpoint 0, the unedited model on all facts to come; nothing is the latest there.

        Raises:
            KeditError: checkpoints.jsonl is damaged.
        """
        self.there = {record["edits"] for record in self.trainer.run.checkpoints.records()}
        if 0 in self.at and 0 not in self.there:
            self._keep(0, unedited, self.measurement.evaluator.new())

    def reach(self, done: int, latest: int) -> None:
        """Score the model if one of the numbers is reached by the latest batch.

        Args:
            done: Number of edits done, rejected ones included.
            latest: Number of edits in the latest batch.
        """
        if done in self.there or not any(done - latest < at <= done for at in self.at):
            return
        measurement, edits = self.measurement, self.measurement.datamodule.edits[:done]
        so_far = measurement.evaluator.new()
        lines = measurement.score(f"checkpoint at {done}", [edits], so_far, texts=False)
        self._keep(done, so_far, measurement.evaluator.collect(edits[-latest:], lines[-latest:]))

    def _keep(self, done: int, so_far: EditMetrics, latest: EditMetrics) -> None:
        trainer, record = self.trainer, Record(edits=done)
        for name, metrics in (("so_far", so_far), ("latest", latest)):
            record[name] = {metric: summary.as_dict() for metric, summary in metrics.compute().items()}
            means = {
                f"checkpoint/{name}/{metric}": found["mean"]
                for metric, found in record[name].items()
                if "mean" in found
            }
            if trainer.logger is not None:
                trainer.logger.log_metrics(means, step=done)
        trainer.tell("on_checkpoint", self.measurement.editor, record)
        trainer.run.checkpoints.append([record])
        self.there.add(done)
