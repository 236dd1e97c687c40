"""The closed-form weight update, at the end of every fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, cast

import torch
from lightning import LightningModule, Trainer

from kedit_lightning.callbacks.base import EditCallback
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors import Editor
from kedit_lightning.edits import Edit
from kedit_lightning.errors import KeditError, RejectedError
from kedit_lightning.models import LanguageModel
from kedit_lightning.solvers import NotFiniteError

if TYPE_CHECKING:
    from kedit_lightning.trainer import EditTrainer


class WeightUpdate(EditCallback):
    """Drives `Editor.write`: each Δ is added to the weights before the next is asked for.

    Lightning has moved the editor to the CPU by then; the base model, a plain object, is still where it was. What was
    added is kept until all passes of the edit batch are over. Where edits are side by side each Δ holds in its own
    edit's rows from then on, and no weight is touched.
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
            for solved in updates:
                delta = solved.of_first_process()
                if pl_module.side_by_side and delta.edit is None:
                    msg = f"{type(pl_module).__name__}.write: expected updates of one edit each, side by side"
                    raise RuntimeError(msg)
                _check_finite(pl_module, delta)
                put(pl_module.base, delta, delta.edit if pl_module.side_by_side else None)
                self.deltas.append(delta)
                cast("EditTrainer", trainer).tell("on_update_written", pl_module, delta)
        pl_module.settle()


@contextmanager
def _rejecting(editor: Editor) -> Iterator[None]:
    """Reject all edits of the batch where what is to be solved for, or what is solved, is not finite."""
    try:
        yield
    except RejectedError:
        raise
    except (KeditError, NotFiniteError) as error:
        if not isinstance(error, NotFiniteError) and not isinstance(error.__cause__, NotFiniteError):
            raise
        raise RejectedError(dict.fromkeys(range(len(editor.edits)), str(error))) from error


def put(base: LanguageModel, delta: WeightDelta, edit: int | None) -> None:
    """Add an update to its weight, or to what holds in the rows of one edit."""
    if edit is None:
        base.write(delta.name, delta.update)
    else:
        left, right = delta.factors
        base.side_by_side.write(edit, delta.name, left, right)


def _check_finite(editor: Editor, delta: WeightDelta) -> None:
    """See that neither NaN nor infinity gets into a weight, in its own type.

    Raises:
        RejectedError: An edit that is side by side with others would bring it there; the others would not.
        NotFiniteError: An update would.
    """
    weight, msg = editor.base.weight(delta.name), f"the update of {delta.name} is not finite"
    if editor.side_by_side and delta.edit is not None:
        if not math.isfinite(delta.norm) or delta.norm > torch.finfo(weight.dtype).max:
            raise RejectedError({delta.edit: f"case {editor.edits[delta.edit].case_id}: {msg}"})
        return
    master = editor.base.master(delta.name)
    if not (master + delta.update.to(master.device)).to(weight.dtype).isfinite().all():
        raise NotFiniteError(msg)
