"""The stream of edits: what happens to an edit batch from the request to the line in edits.jsonl."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kedit_lightning import delta as delta_files
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors import Editor
from kedit_lightning.edits import Edit
from kedit_lightning.measurement import Measurement
from kedit_lightning.models.fingerprint import fingerprint
from kedit_lightning.run import Record, read_deltas

if TYPE_CHECKING:
    from kedit_lightning.trainer import EditTrainer


class EditStream:
    """Measures, edits batch after batch, measures again; `EditTrainer.fit` drives it.

    Args:
        trainer: The trainer.
        editor: The editor.
        datamodule: The stream.
    """

    def __init__(self, trainer: EditTrainer, editor: Editor, datamodule: EditDataModule) -> None:
        self.trainer, self.editor, self.datamodule = trainer, editor, datamodule
        self.edits = datamodule.edits
        self.done = 0
        self.commits = 0
        trainer.tell("on_stream_start", editor, len(self.edits))
        self.measurement = Measurement(trainer, editor, datamodule)
        self.run, self.evaluator = self.measurement.run, self.measurement.evaluator

    def open(self) -> None:
        """Prepare the editor on the unedited model, and measure that.

        Raises:
            KeditError: The run directory is taken, or something cannot be measured; nothing is left then.
        """
        with self.run.opened():
            self._prepare()

    def _prepare(self) -> None:
        self.editor.prepare()
        self.run.write_json("contexts.json", {"templates": self.editor.templates})
        names = [self.editor.base.name(site) for site in self.editor.sites()]
        self._fingerprint = {"names": names, "value": fingerprint(self.editor.base, names)}
        self.answers = self.evaluator.answers(self.edits)
        self.pre, self.post = self.evaluator.new(), self.evaluator.new()
        self.before: list[Record] = [{} for _ in self.edits]
        if self.trainer.evaluate:
            self.evaluator.references(self.edits)
            groups = [_flat(group) for group in self.datamodule.groups()]
            self.before = self.measurement.score("before", groups, self.pre)

    def restore(self) -> None:
        """Begin again with the unedited model, at a new group of edits."""
        self.editor.restore()
        self.run.start_group()

    def edit(self, batch: list[Edit], group: int, fit: Callable[[], None]) -> list[Record]:
        """One edit batch: all its passes, then the commit; nothing is left of it if anything fails.

        Args:
            batch: The edits.
            group: How often the weights have been restored so far.
            fit: Runs one `Trainer.fit`.

        Returns:
            Its lines of edits.jsonl, without what is measured after.
        """
        editor, started = self.editor, time.time()
        with editor.base.transaction():
            deltas = self.trainer.weight_update.edit(editor, self.datamodule, batch, fit)
            seconds = round((time.time() - started) / len(batch), 3)
            records = [{**self._record(i, group), "seconds": seconds} for i in range(len(batch))]
            self.run.commit(self.commits, deltas, self._metadata(batch, group), records, editor.memory)
        editor.remember(editor.memory)
        self._log_norms(deltas)
        self.done += len(batch)
        self.commits += 1
        self.trainer.tell("on_edits_committed", editor, records)
        return records

    def evaluate(self, group: Sequence[list[Edit]], records: list[Record]) -> None:
        """Measure the edits since the last restoration, and complete their lines.

        Args:
            group: Their batches.
            records: Their lines.
        """
        edits = _flat(group)
        answers = self.evaluator.answers(edits)
        after: list[Record] = [{} for _ in edits]
        if self.trainer.evaluate:
            after = self.measurement.score("after", [edits], self.post)
        for record, answer, measured in zip(records, answers, after, strict=True):
            record["answer_after"], record["after"] = answer, measured
        self.run.complete_group(records)
        self.trainer.tell("on_edits_evaluated", self.editor, records)

    def close(self) -> Record:
        """Merge the updates that the model now holds into delta.safetensors, and report."""
        deltas, metadata = read_deltas(self.run.path)
        delta_files.save(self.run.path / "delta.safetensors", delta_files.merge(deltas), metadata)
        metrics = {"pre": self.pre, "post": self.post} if self.trainer.evaluate else {}
        return self.measurement.finish(self.done, **metrics)

    def _record(self, i: int, group: int) -> Record:
        editor, position = self.editor, self.done + i
        edit = editor.edits[i]
        stages = [
            {"stage": outcome.stage, "layer": editor.passes()[outcome.pass_], **outcome.final(i)}
            for outcome in editor.outcomes
        ]
        return {
            "case_id": edit.case_id,
            "commit": self.commits,
            "group": group,
            "prompt": edit.prompt,
            "subject": edit.subject,
            "target_new": edit.target_new,
            "target_true": edit.target_true,
            "stages": stages,
            "answer_before": self.answers[position],
            "before": self.before[position],
        }

    def _metadata(self, batch: Sequence[Edit], group: int) -> Record:
        return {
            "editor": type(self.editor).__name__,
            "config": self.editor.config,
            "base": self.editor.base.name_or_path,
            "dtype": self.editor.base.dtype,
            "fingerprint": self._fingerprint,
            "case_ids": [edit.case_id for edit in batch],
            "number": self.commits,
            "group": group,
        }

    def _log_norms(self, deltas: Sequence[WeightDelta]) -> None:
        norms: dict[str, float] = {}
        for delta in delta_files.merge(deltas):
            norms[f"norm/update/{delta.name}"] = float(delta.update.norm())
            norms[f"norm/weight/{delta.name}"] = float(self.editor.base.weight(delta.name).float().norm())
        if self.trainer.logger is not None:
            self.trainer.logger.log_metrics(norms, step=self.done)


def _flat(group: Sequence[Sequence[Edit]]) -> list[Edit]:
    """The edits of the batches between two restorations: what the model holds together."""
    return [edit for batch in group for edit in batch]
