"""The closed-form weight update, at the end of every fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, cast

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from kedit_lightning.callbacks.base import EditCallback
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors import Editor
from kedit_lightning.edits import Edit
from kedit_lightning.errors import KeditError, RejectedError
from kedit_lightning.solvers import NotFiniteError

if TYPE_CHECKING:
    from kedit_lightning.trainer import EditTrainer


class WeightUpdate(EditCallback):
    """Drives `Editor.write`: each Δ is added to the weights before the next is asked for.

    Lightning has moved the editor to the CPU by then; the base model, a plain object, is still where it was. What was
    added is kept until all passes of the edit batch are over.
    """

    def __init__(self) -> None:
        self.deltas: list[WeightDelta] = []

    def edit(
        self, editor: Editor, datamodule: EditDataModule, batch: list[Edit], fit: Callable[[], None]
    ) -> list[WeightDelta]:
        """Edit one batch: all its passes.

        Args:
            editor: The editor.
            datamodule: What streams the batch to it.
            batch: The edits.
            fit: Runs one `Trainer.fit`.

        Returns:
            The updates, in the order in which they were added.
        """
        datamodule.current, self.deltas = batch, []
        for pass_ in range(len(editor.passes())):
            editor.begin(batch, pass_)
            fit()
        deltas, self.deltas = self.deltas, []
        return deltas

    @torch.no_grad()
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the updates of this pass.

        Raises:
            RejectedError: An update is not finite, or a weight with it would not be; none of it is added.
            RuntimeError: The fit ended without a single loss evaluation (Lightning can do so silently).
        """
        assert isinstance(pl_module, Editor)
        if not any(outcome.curves for outcome in pl_module.outcomes if outcome.pass_ == pl_module.pass_):
            msg = f"the fit at step {trainer.global_step} took no steps, so there is nothing to write"
            raise RuntimeError(msg)
        with closing(pl_module.write()) as updates, _rejecting(pl_module):
            for delta in updates:
                update = delta.update
                _check_finite(pl_module, delta.name, update)
                pl_module.base.write(delta.name, update)
                self.deltas.append(delta)
                cast("EditTrainer", trainer).tell("on_update_written", pl_module, delta)
        pl_module.settle()


@contextmanager
def _rejecting(editor: Editor) -> Iterator[None]:
    """Reject all edits of the batch where what is to be solved for, or what is solved, is not finite."""
    try:
        yield
    except (KeditError, NotFiniteError) as error:
        if not isinstance(error, NotFiniteError) and not isinstance(error.__cause__, NotFiniteError):
            raise
        raise RejectedError(dict.fromkeys(range(len(editor.edits)), str(error))) from error


def _check_finite(editor: Editor, name: str, update: Tensor) -> None:
    """See that neither NaN nor infinity gets into a weight, in its own type."""
    weight = editor.base.master(name)
    if not (weight + update.to(weight.device)).to(editor.base.weight(name).dtype).isfinite().all():
        msg = f"the update of {name} is not finite"
        raise NotFiniteError(msg)
