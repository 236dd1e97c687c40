"""General abilities over the number of edits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning import Trainer

from kedit_lightning.callbacks.base import EditCallback
from kedit_lightning.lines import Record
from kedit_lightning.run import RunDirectory
from kedit_lightning.tasks import Tasks, retained, scores

if TYPE_CHECKING:
    from kedit_lightning.editors import Editor


class TaskCurves(EditCallback):
    """Measures tasks at every checkpoint of the stream.

    A checkpoint's record gets ``tasks`` (task → score, null where it is no number) and ``retained`` (task → share of
    what the first checkpoint had, and ``mean``); TensorBoard gets ``tasks/NAME`` and ``retained/NAME`` at the number of
    edits. A stream that is resumed goes on from the first checkpoint that it has kept.

    Args:
        tasks: What is measured; by default the almanac's four tasks and perplexity.
    """

    def __init__(self, tasks: Tasks | None = None) -> None:
        self.tasks = tasks or Tasks()
        self._first: dict[str, float | None] | None = None

    @property
    def protocol(self) -> Record:
        """The tasks and how they are read."""
        tasks = self.tasks
        read = {"items": tasks.items, "scorer": tasks.scorer, "few_shot": tasks.few_shot}
        return {"names": list(tasks.names), "sources": dict(tasks.sources), **read}

    def on_stream_start(self, trainer: Trainer, editor: Editor, n_edits: int) -> None:
        """Begin a curve of its own."""
        self._first = None

    def on_checkpoint(self, trainer: Trainer, editor: Editor, record: Record) -> None:
        """Measure the model as it stands."""
        found = scores(self.tasks.evaluate(editor.base))
        if self._first is None:
            run: RunDirectory = trainer.run  # type: ignore[attr-defined] # EditTrainer, which imports callbacks
            kept = (line["tasks"] for line in run.checkpoints.records() if "tasks" in line)
            self._first = next(kept, found)
        record["tasks"], record["retained"] = found, retained(self._first, found)
        curves = {f"{group}/{name}": v for group in ("tasks", "retained") for name, v in record[group].items()}
        if trainer.logger is not None:
            known = {name: value for name, value in curves.items() if value is not None}
            trainer.logger.log_metrics(known, step=record["edits"])
