"""Hooks of the edit stream, beside Lightning's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback

from kedit_lightning.run import Record

if TYPE_CHECKING:
    from lightning import Trainer

    from kedit_lightning.delta import WeightDelta
    from kedit_lightning.editors import Editor


class EditCallback(Callback):
    """A Lightning callback that also hears of the edit stream. All hooks do nothing by default."""

    reads_weights = False
    """Whether it looks at the edited weights while the stream runs: single edits are then made one by one."""

    @property
    def protocol(self) -> Record:
        """What the files of a run depend on, as plain data: a run is resumed with the same, or says what differs."""
        return {}

    def on_stream_start(self, trainer: Trainer, editor: Editor, n_edits: int) -> None:
        """Before anything is measured or edited; the run directory is this process's from then on."""

    def on_stream_resumed(self, trainer: Trainer, editor: Editor, records: Sequence[Record]) -> None:
        """After `on_stream_start`, where a run is gone on with; ``records``: its lines of edits.jsonl that are durable.

        The weights are still the unedited ones. What the other hooks tell of an edit batch is not told again.
        """

    def on_stream_caught_up(self, trainer: Trainer, editor: Editor) -> None:
        """The edits of a run that is gone on with are in the weights again, as after its last `on_edits_committed`.

        Not told where the weights have been restored since then.
        """

    def on_evaluation_start(self, trainer: Trainer, title: str, total: int) -> None:
        """Before ``total`` prompts are scored."""

    def on_evaluation_progress(self, trainer: Trainer, done: int) -> None:
        """``done`` of them are scored so far."""

    def on_evaluation_end(self, trainer: Trainer) -> None:
        """All of them are scored."""

    def on_update_written(self, trainer: Trainer, editor: Editor, delta: WeightDelta) -> None:
        """An update has been added to the weights, or side by side to its edit's rows; others may follow."""

    def on_edits_committed(self, trainer: Trainer, editor: Editor, records: Sequence[Record]) -> None:
        """An edit batch is in the weights and on the disk; ``records``: its lines of edits.jsonl, without "after".

        The weights of edits side by side are the unedited ones: say `reads_weights` to have edits made one by one.
        """

    def on_edits_rejected(self, trainer: Trainer, editor: Editor, records: Sequence[Record]) -> None:
        """Edits are not written, and their lines of edits.jsonl, with ``rejected`` (why), are on the disk.

        The weights and the editor's memory are what they were before the edit batch.
        """

    def on_checkpoint(self, trainer: Trainer, editor: Editor, record: Record) -> None:
        """A checkpoint is scored: ``edits`` done so far, ``so_far`` and ``latest`` (metric → mean, ci95, n).

        What a callback adds to ``record`` is kept with it, a line of checkpoints.jsonl.
        """

    def on_edits_evaluated(self, trainer: Trainer, editor: Editor, records: Sequence[Record]) -> None:
        """The edits since the last restoration are scored; ``records`` are their whole lines of edits.jsonl."""

    def on_stream_end(self, trainer: Trainer, editor: Editor, report: Record) -> None:
        """The stream is over; ``report`` is what metrics.json, written last, will hold."""

    def on_stream_finished(self, trainer: Trainer, report: Record) -> None:
        """A run that was to be resumed is finished; ``report`` is its metrics.json."""

    def on_predictions(self, trainer: Trainer, records: Sequence[Record]) -> None:
        """Texts before and after the edits: ``prompt``, ``before``, ``after``."""

    def on_statistics(self, trainer: Trainer, files: Sequence[Path]) -> None:
        """Key statistics are kept in these files."""
