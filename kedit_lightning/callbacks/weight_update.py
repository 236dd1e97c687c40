"""The closed-form weight update, at the end of every fit."""

from __future__ import annotations

from contextlib import closing

import torch
from lightning import LightningModule, Trainer

from kedit_lightning.callbacks.base import EditCallback
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors import Editor


class WeightUpdate(EditCallback):
    """Drives `Editor.write`: each Δ is added to the weights before the next is asked for.

    Lightning has moved the editor to the CPU by then; the base model, a plain object, is still where it was. What was
    added is kept in ``deltas`` until the trainer commits the edit batch.
    """

    def __init__(self) -> None:
        self.deltas: list[WeightDelta] = []

    @torch.no_grad()
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the updates of this pass.

        Raises:
            RuntimeError: The fit ended without a single loss evaluation (Lightning can do so silently).
        """
        assert isinstance(pl_module, Editor)
        if not any(outcome.curves for outcome in pl_module.outcomes if outcome.pass_ == pl_module.pass_):
            msg = f"the fit at step {trainer.global_step} took no steps, so there is nothing to write"
            raise RuntimeError(msg)
        with closing(pl_module.write()) as updates:
            for delta in updates:
                pl_module.base.write(delta.name, delta.update)
                self.deltas.append(delta)
        pl_module.settle()

    def take(self) -> list[WeightDelta]:
        """The updates added since the last call."""
        deltas, self.deltas = self.deltas, []
        return deltas
