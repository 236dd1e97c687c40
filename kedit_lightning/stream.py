"""The stream of edits: what happens to an edit batch from the request to the line in edits.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch

from kedit_lightning import delta as delta_files
from kedit_lightning import resume
from kedit_lightning.checkpoints import Checkpoints
from kedit_lightning.commits import Commits
from kedit_lightning.data.datamodule import EditDataModule, batched
from kedit_lightning.editors import Editor
from kedit_lightning.edits import Edit
from kedit_lightning.errors import KeditError
from kedit_lightning.measurement import Measurement
from kedit_lightning.models.processes import agreed, first
from kedit_lightning.planning import parallel
from kedit_lightning.run import CONTEXTS, SETTINGS, Record, read_deltas

if TYPE_CHECKING:
    from kedit_lightning.trainer import EditTrainer


class EditStream:
    """Measures, edits batch after batch, measures again; `EditTrainer.fit` drives it.

    Every batch is durable before the next begins. A stream that is resumed writes the updates of its commits onto the
    unedited weights again, in their order, and goes on after the last; what was measured is read from the run.

    Args:
        trainer: The trainer.
        editor: The editor.
        datamodule: The stream.
        fit: Runs one `Trainer.fit`.
        resumed: Whether the trainer's run directory holds the beginning of the stream.
        anyway: Whether to go on even where something differs that the results depend on.
    """

    def __init__(
        self,
        trainer: EditTrainer,
        editor: Editor,
        datamodule: EditDataModule,
        fit: Callable[[], None],
        *,
        resumed: bool = False,
        anyway: bool = False,
    ) -> None:
        self.trainer, self.editor, self.datamodule, self.fit = trainer, editor, datamodule, fit
        self.run, self.resumed, self.anyway = trainer.run, resumed, anyway
        self.edits, self.groups = datamodule.edits, list(datamodule.groups())
        self.measurement = Measurement(trainer, editor, datamodule)
        self.evaluator = self.measurement.evaluator
        self.checkpoints = Checkpoints(trainer, self.measurement)
        self.lines: list[Record] = []

    # ------------------------------------------------------------------ before the first edit

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Take the run directory, prepare the editor on the unedited model, and measure that.

        Raises:
            KeditError: The run directory is taken, holds a run of something else, or something cannot be measured;
                nothing is left then of a run that is new.
        """
        with ExitStack() as held:
            held.callback(setattr, self.editor, "side_by_side", False)
            with ExitStack() as beginning:
                if not self.resumed:
                    first(lambda: beginning.enter_context(self.run.opened()))
                first(lambda: held.enter_context(self.run.locked()))
                self._prepare()
            yield

    def _prepare(self) -> None:
        editor, run = self.editor, self.run
        environment = resume.environment(self.trainer)
        here = resume.settings(editor, self.datamodule, self.measurement) | environment
        resume.check_processes(lambda: here)
        begun = first(lambda: resume.check(run, here, anyway=self.anyway))
        self.trainer.tell("on_stream_start", editor, len(self.edits))
        editor.prepare()
        moments = resume.moments(editor)
        editor.templates = agreed(editor.templates)
        if begun is None:
            own = {"seed": torch.initial_seed(), "budget": editor.budget, "moments": moments}
            begun = agreed({**here, **own, "parallel_edits": parallel(self.trainer, editor, self.datamodule)})
            run.write_json(CONTEXTS, {"templates": editor.templates})
            run.write_json(SETTINGS, begun)
        else:
            first(lambda: resume.check_moments(run, moments, anyway=self.anyway))
            editor.templates = run.read_json(CONTEXTS)["templates"]
        editor.budget, self.parallel = begun["budget"], begun.get("parallel_edits", 1)
        editor.side_by_side = self.parallel > 1
        fingerprint = {"names": editor.names(), "value": here["weights"]}
        self.commits = Commits(self.trainer, editor, self.datamodule, self.fit, begun["seed"], fingerprint)
        if self.resumed:
            batches = [len(batch) for group in self.groups for batch in group]
            blocks = [len(block) for block in batched(self.edits, self.parallel)]
            self.lines = run.recover(blocks if editor.side_by_side else batches)
            self.trainer.tell("on_stream_resumed", editor, self.lines)
        self.before = self.measurement.before([_flat(group) for group in self.groups], environment)
        self.pre = self.evaluator.collect(self.edits, [line["before"] for line in self.before])
        self.post = self.evaluator.new()

    # ------------------------------------------------------------------ edits

    def edit(self) -> None:
        """All edits, group after group of those that the model holds together, or as many groups side by side."""
        self.checkpoints.begin(self.pre)
        if self.editor.side_by_side:
            self._edit_side_by_side()
            return
        for index, group in enumerate(self.groups):
            edits = _flat(group)
            lines = self._there(len(edits))
            if (measured := self._measured(edits, lines)) and index < len(self.groups) - 1:
                self.commits.again(lines, write=False)
                continue
            self.editor.restore()
            begin = self.commits.done
            records: list[Record] = []
            for batch in group:
                records += self._batch(batch, index)
                if self.trainer.stop_stream:
                    break
            if not measured:
                self._measure(begin, edits[: len(records)], records)
            if self.trainer.stop_stream:
                break

    def _edit_side_by_side(self) -> None:
        """Blocks of single edits, each edit in its own rows; in the end the weights hold the last, as one by one."""
        editor, own = self.editor, self.editor.base.side_by_side
        editor.restore()
        records: list[Record] = []
        try:
            for block in map(list, batched(self.edits, self.parallel)):
                begin, lines = self.commits.done, self._there(len(block))
                measured = self._measured(block, lines)
                records = self._batch(block, begin, write=not measured)
                if not measured:
                    self._measure(begin, block, records)
                if self.trainer.stop_stream:
                    break
        finally:
            own.clear()
        self.commits.stand(records[-1])

    def _measured(self, edits: Sequence[Edit], lines: Sequence[Record]) -> bool:
        """Whether a resumed run holds what edits were measured to be; it is taken in."""
        if len(lines) < len(edits) or not all("answer_after" in line for line in lines):
            return False
        self.evaluator.collect(edits, [line["after"] for line in lines], self.post)
        return True

    def _there(self, n: int) -> list[Record]:
        """Lines that a resumed run holds of the next n edits."""
        return self.lines[self.commits.done : self.commits.done + n]

    def _batch(self, batch: list[Edit], group: int, *, write: bool = True) -> list[Record]:
        """The lines of an edit batch, which is edited unless it is done; then it is written again, if it is to be."""
        if lines := self._there(len(batch)):
            self.commits.again(lines, write=write)
            if self.commits.done == len(self.lines):
                self.trainer.tell("on_stream_caught_up", self.editor)
        else:
            before = self.before[self.commits.done : self.commits.done + len(batch)]
            lines = self.commits.edit(batch, [_asked(*pair) for pair in zip(batch, before, strict=True)], group)
        with resume.random_stream(self.commits.seed, f"checkpoint {self.commits.done}"):
            self.checkpoints.reach(self.commits.done, len(batch))
        return lines

    def _measure(self, begin: int, edits: list[Edit], records: list[Record]) -> None:
        """Measure the edits since the last restoration, rejected ones too, and complete their lines."""
        owners = self.commits.owners if self.editor.side_by_side else None
        answers = self.measurement.answers(edits, owners)
        after: list[Record] = [{} for _ in edits]
        if self.trainer.evaluate:
            after = self.measurement.score("after", [edits], self.post, owners=owners, answers=answers)
        for record, answer, measured in zip(records, answers, after, strict=True):
            record["answer_after"], record["after"] = answer, measured
        self.run.lines.replace(begin, records)
        self.trainer.tell("on_edits_evaluated", self.editor, records)

    def close(self) -> Record:
        """Merge the updates that the model now holds into delta.safetensors, and report.

        Raises:
            KeditError: All edits were rejected.
        """
        reasons = [line["rejected"] for line in self.run.records() if "rejected" in line]
        if len(reasons) == self.commits.done:
            msg = (
                f"{self.run.path}: nothing was committed, for all {len(reasons)} edits were rejected "
                f"({'; '.join(dict.fromkeys(reasons))}); edits.jsonl lists them"
            )
            raise KeditError(msg)
        deltas, metadata = read_deltas(self.run.path)
        first(lambda: delta_files.save(self.run.path / "delta.safetensors", delta_files.merge(deltas), metadata))
        metrics = {"pre": self.pre, "post": self.post} if self.trainer.evaluate else {}
        stopped = self.commits.done < len(self.edits)
        return self.measurement.finish(self.commits.done, metrics, len(reasons), stopped=stopped)


def _asked(edit: Edit, before: Record) -> Record:
    """What edits.jsonl says of an edit before it is made."""
    return {
        "prompt": edit.prompt,
        "subject": edit.subject,
        "target_new": edit.target_new,
        "target_true": edit.target_true,
        "answer_before": before["answer"],
        "before": before["before"],
    }


def _flat(group: Sequence[Sequence[Edit]]) -> list[Edit]:
    """The edits of the batches between two restorations: what the model holds together."""
    return [edit for batch in group for edit in batch]
