"""Measuring a model on the edits of a stream, and the report of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, TypeVar

import torch

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.editors import Editor
from kedit_lightning.edits import Edit
from kedit_lightning.lines import Lines
from kedit_lightning.metrics import EditMetrics, Evaluator, Reference, eac_names, paper_names
from kedit_lightning.metrics.reference_cache import ReferenceCache, about
from kedit_lightning.models.processes import dealt, first, ranks
from kedit_lightning.run import BEFORE, Record

if TYPE_CHECKING:
    from kedit_lightning.trainer import EditTrainer

T = TypeVar("T")


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

    def before(self, groups: Sequence[Sequence[Edit]], environment: Record) -> list[Record]:
        """Measure the unedited model, once in a run: what it answers, and what specificity and locality refer to.

        An earlier run's measurement of the same is taken from the cache.

        Args:
            groups: Edits that the model will hold together.
            environment: Libraries, device and threads (`resume.environment`).

        Returns:
            For each edit ``answer``, ``before`` (its metrics) and its `Reference`, a line of before.jsonl.
        """
        edits, kept = [edit for group in groups for edit in group], Lines(self.run.path / BEFORE)
        if not first(kept.path.is_file):
            self.run.write_lines(BEFORE, self._unedited(groups, environment))
        lines = kept.records()
        names = [field.name for field in fields(Reference)]
        self.evaluator.refer_to(edits, [Reference(*(line.get(name, ()) for name in names)) for line in lines])
        return lines

    def _unedited(self, groups: Sequence[Sequence[Edit]], environment: Record) -> list[Record]:
        """The lines of before.jsonl, from the cache where they are there."""
        if not self.evaluator.settings.cache:
            return self._measure(groups)
        cache = ReferenceCache()
        key = about(self.evaluator, _apart(groups), environment, scored=self.trainer.evaluate)
        lines = first(lambda: cache.load(key))
        if lines is None:
            lines = self._measure(groups)
            cache.keep(key, lines)
        return lines

    def _measure(self, groups: Sequence[Sequence[Edit]]) -> list[Record]:
        """The lines of before.jsonl, from the model as it is."""
        edits = [edit for group in groups for edit in group]
        answers = self.answers(edits)
        lines: list[Record] = [{"answer": answer, "before": {}} for answer in answers]
        if self.trainer.evaluate:
            references = self.references(edits)
            scores = self.score("before", groups, self.evaluator.new(), answers=answers)
            for line, found, reference in zip(lines, scores, references, strict=True):
                line |= {"before": found, **reference}
        return lines

    def answers(self, edits: Sequence[Edit], owners: Sequence[int] | None = None) -> list[str]:
        """As `Evaluator.answers`, shared out over the processes."""
        return dealt(len(edits), lambda own: self.evaluator.answers(_of(edits, own), owners and _of(owners, own)))

    def references(self, edits: Sequence[Edit]) -> list[Record]:
        """As `Evaluator.references`, shared out over the processes; plain data."""
        found = dealt(len(edits), lambda own: [asdict(one) for one in self.evaluator.references(_of(edits, own))])
        self.evaluator.refer_to(edits, [Reference(**one) for one in found])
        return found

    def score(
        self,
        title: str,
        groups: Sequence[Sequence[Edit]],
        metrics: EditMetrics,
        *,
        texts: bool = True,
        owners: Sequence[int] | None = None,
        answers: Sequence[str] | None = None,
    ) -> list[Record]:
        """Add edits to metrics; their values, a record an edit.

        Args:
            title: What the progress bar says.
            groups: Edits that the model holds together. Relations edited together with a prompt's subject do not count
                as unrelated, so groups are kept apart, unless no subject comes twice: then all are scored at once,
                which is faster.
            metrics: What they are added to.
            texts: Whether the model is also let write, where the settings say so.
            owners: Of a single group, where its edits are side by side; see `Evaluator.update`.
            answers: What `Evaluator.answers` gives for all edits, where that is known already.
        """
        groups = _apart(groups)
        edits = [edit for group in groups for edit in group]
        self.trainer.tell("on_evaluation_start", title, len(edits))
        records: list[Record] = []

        def progress(done: int) -> None:
            self.trainer.tell("on_evaluation_progress", len(records) + done)

        for group in groups:
            said = None if answers is None else answers[len(records) : len(records) + len(group)]
            records += self._update(metrics, group, progress, texts, owners, said)
        self.trainer.tell("on_evaluation_end")
        return records

    def _update(
        self,
        metrics: EditMetrics,
        group: Sequence[Edit],
        progress: Callable[[int], None] | None = None,
        texts: bool = True,
        owners: Sequence[int] | None = None,
        answers: Sequence[str] | None = None,
    ) -> list[Record]:
        """As `Evaluator.update`, shared out over the processes, each of which then has the scores of all."""
        own = metrics if ranks()[1] == 1 else self.evaluator.new()

        def score(mine: list[int]) -> list[Record]:
            owned, said = owners and _of(owners, mine), answers and _of(answers, mine)
            more: Record = {"edited": group, "texts": texts, "owners": owned, "answers": said}
            return list(self.evaluator.update(own, _of(group, mine), progress, **more))

        lines = dealt(len(group), score)
        if own is not metrics:
            self.evaluator.collect(group, lines, metrics)
        return lines

    def open(self, stage: str) -> None:
        """Begin to be given edits in batches, by `add`; what specificity refers to is taken from the model as it is."""
        self.references(self.datamodule.edits)
        self._metrics, self._scored = self.evaluator.new(), 0
        self.trainer.tell("on_evaluation_start", stage, len(self.datamodule.edits))

    def add(self, batch: Sequence[Edit]) -> None:
        """Score one batch on the model as it is."""
        self._update(self._metrics, batch)
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
        if self.editor.side_by_side and self.editor.base.dtype != "float32":
            names["name"] += f", side by side: updates not rounded to {self.editor.base.dtype}"
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


def _of(items: Sequence[T], places: Sequence[int]) -> list[T]:
    return [items[i] for i in places]


def _apart(groups: Sequence[Sequence[Edit]]) -> Sequence[Sequence[Edit]]:
    """The groups, or all edits as one where no subject comes twice."""
    edits = [edit for group in groups for edit in group]
    return [edits] if len({edit.subject for edit in edits}) == len(edits) else groups
