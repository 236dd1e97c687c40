"""Single edits outside a stream: made, looked at and forgotten again."""

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
    """Makes edits that know nothing of each other: side by side, or one by one where the editor cannot do that.

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
        """Prepare the editor on the unedited model; afterwards it is as it was, and the model unedited."""
        editor = self.editor
        editor.restore()
        editor.prepare()
        editor.side_by_side = editor.can_be_side_by_side
        try:
            yield
        finally:
            self._forget()
            editor.side_by_side = False

    def blocks(self, edits: Sequence[Edit]) -> Iterator[tuple[Sequence[Edit], list[int]]]:
        """Make edits in blocks as large as memory takes, inside `ready`.

        Args:
            edits: n edits.

        Yields:
            The edits of a block, while what was written for them stands, and the owner of each (`Batch.owner`): rows of
            that owner see the edit; -1: it was rejected, and changes nothing. Only a block made one by one is in the
            weights.
        """
        editor = self.editor
        most = SIDE_BY_SIDE if editor.side_by_side else 1
        for block in batched(edits, fitting(min(most, len(edits)), editor.needs, editor.update_size(1))):
            made = self._edit(block)
            yield block, [made.index(i) if i in made else -1 for i in range(len(block))]
        self._forget()

    def _edit(self, block: Sequence[Edit]) -> list[int]:
        """Which edits of a block are made."""
        made = list(range(len(block)))
        while made:
            self._forget()
            try:
                self.trainer.weight_update.edit(self.editor, self.datamodule, [block[i] for i in made], self.fit)
                return made
            except RejectedError as error:
                made = [i for place, i in enumerate(made) if place not in error.reasons]
        self._forget()
        return made

    def _forget(self) -> None:
        """Undo what was made."""
        self.editor.base.side_by_side.clear()
        self.editor.restore()
