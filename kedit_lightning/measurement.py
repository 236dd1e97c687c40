"""Measuring a model on the edits of a stream, and the report of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

import torch

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.editors import Editor
from kedit_lightning.edits import Edit
from kedit_lightning.lines import Lines
from kedit_lightning.metrics import EditMetrics, Evaluator, Reference, eac_names, paper_names
from kedit_lightning.run import BEFORE, Record

if TYPE_CHECKING:
    from kedit_lightning.trainer import EditTrainer


class Measurement:
    """The model of an editor, measured on the edits of a data module as it is at each call.

    Args:
        trainer: Its callbacks hear of the progress, its logger of the results.
        editor: The editor that holds the model.
        datamodule: The edits.
    """

    def __init__(self, trainer: EditTrainer, editor: Editor, datamodule: EditDataModule) -> None:
        self.trainer, self.editor, self.datamodule = trainer, editor, datamodule
        self.started, self.name = time.time(), ""
        self.run = trainer.run
        editor.base.to(trainer.strategy.root_device)
        self.evaluator = Evaluator(editor.base, trainer.evaluation, datamodule.reference_texts())

    def before(self, groups: Sequence[Sequence[Edit]]) -> list[Record]:
        """Measure the unedited model, once in a run: what it answers, and what specificity and locality refer to.

        Args:
            groups: Edits that the model will hold together.

        Returns:
            For each edit ``answer``, ``before`` (its metrics) and its `Reference`, a line of before.jsonl.
        """
        edits, kept = [edit for group in groups for edit in group], Lines(self.run.path / BEFORE)
        if not kept.path.is_file():
            lines: list[Record] = [{"answer": answer, "before": {}} for answer in self.evaluator.answers(edits)]
            if self.trainer.evaluate:
                references = self.evaluator.references(edits)
                scores = self.score("before", groups, self.evaluator.new())
                for line, found, reference in zip(lines, scores, references, strict=True):
                    line |= {"before": found, **asdict(reference)}
            self.run.write_lines(BEFORE, lines)
        lines = kept.records()
        names = [field.name for field in fields(Reference)]
        self.evaluator.refer_to(edits, [Reference(*(line.get(name, ()) for name in names)) for line in lines])
        return lines

    def score(
        self, title: str, groups: Sequence[Sequence[Edit]], metrics: EditMetrics, *, texts: bool = True
    ) -> list[Record]:
        """Add edits to metrics; their values, a record an edit.

        Args:
            title: What the progress bar says.
            groups: Edits that the model holds together. Relations edited together with a prompt's subject do not count
                as unrelated, so groups are kept apart, unless no subject comes twice: then all are scored at once,
                which is faster.
            metrics: What they are added to.
            texts: Whether the model is also let write, where the settings say so.
        """
        edits = [edit for group in groups for edit in group]
        if len({edit.subject for edit in edits}) == len(edits):
            groups = [edits]
        self.trainer.tell("on_evaluation_start", title, len(edits))
        records: list[Record] = []

        def progress(done: int) -> None:
            self.trainer.tell("on_evaluation_progress", len(records) + done)

        for group in groups:
            records += self.evaluator.update(metrics, group, progress, texts=texts)
        self.trainer.tell("on_evaluation_end")
        return records

    def open(self, stage: str) -> None:
        """Begin to be given edits in batches, by `add`; what specificity refers to is taken from the model as it is."""
        self.evaluator.references(self.datamodule.edits)
        self._metrics, self._scored = self.evaluator.new(), 0
        self.trainer.tell("on_evaluation_start", stage, len(self.datamodule.edits))

    def add(self, batch: Sequence[Edit]) -> None:
        """Score one batch on the model as it is."""
        self.evaluator.update(self._metrics, batch)
        self._scored += len(batch)
        self.trainer.tell("on_evaluation_progress", self._scored)

    def close(self, when: str, protocol: str) -> Record:
        """Report what was scored.

        Args:
            when: ``pre`` or ``post``.
            protocol: What had happened to the weights, in words.
        """
        self.trainer.tell("on_evaluation_end")
        self.name = protocol
        return self.finish(self._scored, {when: self._metrics})

    def finish(
        self, edits: int, metrics: Mapping[str, EditMetrics], rejected: int = 0, *, stopped: bool = False
    ) -> Record:
        """Log and show the report, then write it as metrics.json.

        Args:
            edits: Number of edits.
            metrics: ``pre`` and ``post``, or one of them.
            rejected: How many edits were rejected; they are measured like the others.
            stopped: Whether a callback ended the stream before its last edit.

        Returns:
            The report.
        """
        summaries = {when: found.compute() for when, found in metrics.items()}
        names: Record = {"name": self.name or self.datamodule.protocol_name}
        if summaries:
            names["scores"] = paper_names({name for found in summaries.values() for name in found})
            names["eac"] = eac_names()
        report: Record = {"editor": type(self.editor).__name__, "edits": edits, "protocol": names | self.protocol}
        report |= {"rejected": rejected} if rejected else {}
        report |= {"stopped": True} if stopped else {}
        for when, found in summaries.items():
            report[when] = {name: summary.as_dict() for name, summary in found.items()}
            means = {f"{when}/{name}": s.mean for name, s in found.items() if not math.isnan(s.mean)}
            if self.trainer.logger is not None:
                self.trainer.logger.log_metrics(means, step=edits)
        report["seconds"] = round(time.time() - self.started, 1)
        self.trainer.tell("on_stream_end", self.editor, report)
        self.run.write_json("metrics.json", report)  # last: a run that has it is finished
        return report

    @property
    def protocol(self) -> Record:
        """What the numbers depend on."""
        return {
            **self.evaluator.protocol,
            **self.datamodule.protocol,
            "base": self.editor.base.name_or_path,
            "torch": torch.__version__,
        }
