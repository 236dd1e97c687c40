"""Single edits side by side, outside a stream: made, looked at and forgotten again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kedit_lightning.data.datamodule import SIDE_BY_SIDE, EditDataModule, batched
from kedit_lightning.editors import Editor
from kedit_lightning.edits import Edit
from kedit_lightning.errors import RejectedError
from kedit_lightning.models.memory import fitting

if TYPE_CHECKING:
    from kedit_lightning.trainer import EditTrainer


class SingleEdits:
    """Makes edits that know nothing of each other; the weights stay as they are.

    Args:
        trainer: The trainer.
        editor: The editor.
        datamodule: What streams a batch to it.
        fit: Runs one `Trainer.fit`.
    """

    def __init__(
        self, trainer: EditTrainer, editor: Editor, datamodule: EditDataModule, fit: Callable[[], None]
    ) -> None:
        self.trainer, self.editor, self.datamodule, self.fit = trainer, editor, datamodule, fit

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Prepare the editor on the unedited model; afterwards it is as it was, and the model unedited.

        Raises:
            KeditError: The editor cannot make edits side by side.
        """
        editor = self.editor
        editor.restore()
        editor.prepare()
        editor.side_by_side = True
        try:
            yield
        finally:
            editor.side_by_side = False
            editor.base.side_by_side.clear()
            editor.restore()

    def blocks(self, edits: Sequence[Edit]) -> Iterator[tuple[list[Edit], list[int]]]:
        """Make edits in blocks as large as memory takes, inside `ready`.

        Args:
            edits: n edits.

        Yields:
            The edits of a block, while what was written for them stands, and the owner of each (`Batch.owner`): rows of
            that owner see the edit; -1: it was rejected, and changes nothing.
        """
        editor = self.editor
        for block in batched(edits, fitting(min(SIDE_BY_SIDE, len(edits)), editor.needs, editor.update_size(1))):
            made = self._edit(block)
            yield block, [made.index(i) if i in made else -1 for i in range(len(block))]
        editor.base.side_by_side.clear()

    def _edit(self, block: Sequence[Edit]) -> list[int]:
        """Which edits of a block are made."""
        made = list(range(len(block)))
        while made:
            self.editor.base.side_by_side.clear()
            try:
                self.trainer.weight_update.edit(self.editor, self.datamodule, [block[i] for i in made], self.fit)
                break
            except RejectedError as error:
                made = [i for place, i in enumerate(made) if place not in error.reasons]
        return made
