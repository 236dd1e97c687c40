"""Scores what `validate` and `test` stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lightning import LightningModule, Trainer

from kedit_lightning.callbacks.base import EditCallback
from kedit_lightning.edits import Edit

if TYPE_CHECKING:
    from kedit_lightning.trainer import EditTrainer


class Scoring(EditCallback):
    """Hands every batch of edits of `validate` and `test` to the trainer's evaluator."""

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: list[Edit], *_: int
    ) -> None:
        """Score the batch."""
        del pl_module, outputs
        cast("EditTrainer", trainer).score(batch)

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]
