"""What the terminal shows of an edit stream."""

from __future__ import annotations

import atexit
import logging
import shlex
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, cast

import rich.console
from lightning import LightningModule, Trainer
from rich.table import Table
from rich.text import Text

from kedit_lightning.callbacks.base import EditCallback
from kedit_lightning.callbacks.logs import LINES
from kedit_lightning.callbacks.rows import Rows
from kedit_lightning.lines import Record
from kedit_lightning.metrics.generation import says
from kedit_lightning.models.progress import DISPLAY
from kedit_lightning.report import count, edit_line, printable, quoted, table

if TYPE_CHECKING:
    from kedit_lightning.delta import WeightDelta
    from kedit_lightning.editors import Editor

FEW = 30
"""Up to this many edits have a line each."""

_PREPARING = "preparing: contexts, key statistics"
_TITLES = {"before": "measuring before", "after": "measuring after", "validate": "measuring", "test": "measuring"}


class Console(EditCallback):
    """One live set of progress bars, a line an edit where there are few, warnings, and the table at the end.

    Only the first process writes. Where the output is no terminal there are no bars and no control characters, but the
    lines, one a minute on what takes longer, and the table; with ``enable_progress_bar: false`` only the warnings and
    the table.

    Args:
        console: Where to write; standard output by default.
    """

    def __init__(self, console: rich.console.Console | None = None) -> None:
        self.out = console or rich.console.Console(highlight=False)
        self.rows = Rows(self.out)
        self._start(0)
        atexit.register(self.close)

    def _start(self, n_edits: int) -> None:
        self._n, self._done, self._evaluated, self._seconds = n_edits, 0, 0, 0.0
        self._written: set[str] = set()
        self._unknown: list[Record] = []
        self._already: list[Record] = []
        self._rejected: list[Record] = []

    # ------------------------------------------------------------------ bars

    def _bar(self, trainer: Trainer, name: str, done: float, total: int | None, note: str = "") -> None:
        if _talks(trainer):
            self.rows.show(name, done, total, note)

    def close(self) -> None:
        """Take the bars away and give the cursor back; also done when the interpreter ends, for whatever reason."""
        DISPLAY.set(None)
        self.rows.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a clean terminal behind."""
        self.close()

    def on_stream_start(self, trainer: Trainer, editor: Editor, n_edits: int) -> None:
        """Say that something is going on."""
        self._start(n_edits)
        self._bar(trainer, _PREPARING, 0, None)
        DISPLAY.set(partial(self._bar, trainer))  # the pass over documents shows its steps here
        quiet = logging.WARNING if trainer.is_global_zero else logging.CRITICAL  # the others would say it again
        LINES.setLevel(logging.INFO if _talks(trainer) else quiet)

    def on_evaluation_start(self, trainer: Trainer, title: str, total: int) -> None:
        """One bar before; one after over the whole stream, however often the weights are restored.

        An edit that is measured alone has no bar: it would flicker beside that of the edits.
        """
        title = _TITLES.get(title, title)
        after = title == _TITLES["after"]
        self._bar_of: tuple[str, int, int] | None = (title, self._evaluated, self._n) if after else (title, 0, total)
        if after and total == 1:
            self._bar_of = None
        self.on_evaluation_progress(trainer, 0)

    def on_evaluation_progress(self, trainer: Trainer, done: int) -> None:
        """Advance."""
        if self._bar_of is not None:
            title, start, total = self._bar_of
            self._bar(trainer, title, start + done, total)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Show how many edits are optimised, and the loss."""
        editor = cast("Editor", pl_module)
        passes, n = len(editor.passes()), len(editor.edits)
        optimised = (editor.pass_ * n + editor.optimised) / passes
        self._bar(trainer, "editing", self._done + optimised, self._n, self._note(editor))

    def _note(self, editor: Editor) -> str:
        curves = next((outcome.curves for outcome in reversed(editor.outcomes) if outcome.curves), None)
        loss = [] if curves is None else [f"loss {sum(float(values.nanmean()) for values in curves[-1].values()):.2f}"]
        return " · ".join([*([f"{self._seconds / self._done:.2g} s/edit"] if self._done else []), *loss])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The edits are optimised; what follows is their weights."""
        self._writing(trainer, cast("Editor", pl_module))

    def on_update_written(self, trainer: Trainer, editor: Editor, delta: WeightDelta) -> None:
        """Advance."""
        self._written.add(delta.name)
        self._writing(trainer, editor)

    def _writing(self, trainer: Trainer, editor: Editor) -> None:
        """An edit that is made alone has no bar: it would flicker beside that of the edits."""
        if len(editor.edits) > 1:
            self._bar(trainer, "writing weights", len(self._written), len(editor.names()))

    # ------------------------------------------------------------------ edits

    def on_edits_committed(self, trainer: Trainer, editor: Editor, records: Sequence[Record]) -> None:
        """Count; compare what the base model answered with what the data say."""
        self._written = set()
        tenth = 10 * self._done // max(self._n, 1)
        self._done += len(records)
        self._seconds += sum(record["seconds"] for record in records)
        for record in records:
            answer, true = record["answer_before"], record["target_true"]
            if says(answer, record["target_new"]):
                self._already.append(record)
            elif true and not says(answer, true) and not (answer and true.startswith(answer)):  # or cut off
                self._unknown.append(record)
        self._bar(trainer, "editing", self._done, self._n, self._note(editor))
        if _talks(trainer) and not self.out.is_terminal and self._n > FEW and tenth < 10 * self._done // self._n:
            self.rows.line(Text(f"{self._done} of {self._n} edits, {self._seconds / self._done:.2g} s an edit"))

    def on_edits_rejected(self, trainer: Trainer, editor: Editor, records: Sequence[Record]) -> None:
        """Count."""
        self._done += len(records)
        self._rejected += records

    def on_stream_resumed(self, trainer: Trainer, editor: Editor, records: Sequence[Record]) -> None:
        """Say where the stream goes on, and count what is done."""
        if _talks(trainer):
            self.rows.line(Text(f"resuming after {len(records)} of {count(self._n)}"))
        self._done = len(records)
        self._seconds = sum(record["seconds"] for record in records)
        self._rejected = [record for record in records if "rejected" in record]
        self._evaluated = sum("answer_after" in record for record in records)

    def on_stream_finished(self, trainer: Trainer, report: Record) -> None:
        """Say so."""
        path = trainer.run.path  # type: ignore[attr-defined] # EditTrainer, which imports this module
        if trainer.is_global_zero:
            made = f"{path} is finished: {count(report['edits'])} made and measured, nothing to resume"
            self.rows.line(Text(f"{made}; begin another run for more"))

    def on_edits_evaluated(self, trainer: Trainer, editor: Editor, records: Sequence[Record]) -> None:
        """A line an edit, where there are few."""
        self._evaluated += len(records)
        if _talks(trainer) and self._n <= FEW:
            for record in records:
                self.rows.line(edit_line(record, says(record["answer_after"], record["target_new"])))

    def on_statistics(self, trainer: Trainer, files: Sequence[Path]) -> None:
        """Where they are."""
        self.close()
        if _talks(trainer):
            for file in files:
                self.rows.line(Text(str(file)))

    def on_predictions(self, trainer: Trainer, records: Sequence[Record]) -> None:
        """The texts before and after, with what differs in colour."""
        self.close()
        if not trainer.is_global_zero:
            return
        for record in records:
            before, after = printable(record["before"]), printable(record["after"])
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
            if before != after:
                same = before.rfind(" ", 0, same + 1) + 1  # whole words
            self.rows.line(Text(printable(record["prompt"]), "bold"))
            self.rows.line(Text.assemble("  before  ", before[:same], (before[same:], "red")))
            self.rows.line(Text.assemble("  after   ", after[:same], (after[same:], "green")))

    def on_stream_end(self, trainer: Trainer, editor: Editor, report: Record) -> None:
        """Warnings, the table, and where everything is."""
        self.close()
        if not trainer.is_global_zero:
            return
        for line in self._warnings():
            self.rows.line(Text.assemble(("warning: ", "bold yellow"), line))
        if "pre" in report or "post" in report:
            self.out.print(table([(report["editor"], report)], self.out.width))
        self._where(trainer, report)
        self._start(0)

    def _warnings(self) -> list[str]:
        found = []
        if self._rejected:
            first = self._rejected[0]
            found.append(
                f"{len(self._rejected)} of {self._done} edits were rejected and not made (case {first['case_id']}: "
                f"{first['rejected']})"
            )
        if self._unknown:
            first = self._unknown[0]
            found.append(
                f"{len(self._unknown)} of {self._done} facts: the base model does not answer target_true (case "
                f"{first['case_id']}: {quoted(first['answer_before'])} instead of {quoted(first['target_true'])})"
            )
        if self._already:
            first = self._already[0]
            found.append(
                f"{len(self._already)} of {self._done} facts: the base model answers target_new before the edit (case "
                f"{first['case_id']}: {quoted(first['target_new'])})"
            )
        return found

    def _where(self, trainer: Trainer, report: Record) -> None:
        path = trainer.run.path  # type: ignore[attr-defined] # EditTrainer, which imports this module
        rows = [("run directory", str(path))]
        if self._done:
            protocol, delta = report["protocol"], path / "delta.safetensors"
            every = protocol.get("restore_every")
            held = (self._done - 1) % (every or self._done) + 1
            only = f" (the last {held} of {count(self._done)}: restore_every is {every})"
            run, base = shlex.quote(str(path)), shlex.quote(protocol.get("base") or "MODEL")
            rows += [
                ("edited model", f"{delta}{only if held < self._done else ''}"),
                ("write it out", f"kedit apply {run} --model {base} --out edited-model"),
                ("curves", f"tensorboard --logdir {run}"),
                ("speed", f"{self._done / max(self._seconds, 1e-9):.3g} edits a second, without measuring"),
            ]
        for name, value in rows:
            self.rows.line(Text.assemble((f"{name:<14}", "bold"), value))


def consoles(trainer: Trainer) -> list[Console]:
    """The consoles among the callbacks; none where nothing is to be shown."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Console)]  # type: ignore[attr-defined]


def say(trainer: Trainer, *shown: Text | Table | str, close: bool = True) -> None:
    """Print texts and tables on the terminal.

    Args:
        trainer: Whose callbacks show them.
        shown: One below the other; texts are not broken into lines, and mean no markup.
        close: Whether the bars are taken away before, for good.
    """
    for console in consoles(trainer):
        if close:
            console.close()
        for one in shown:
            console.out.print(Text(one) if isinstance(one, str) else one, soft_wrap=not isinstance(one, Table))


def _talks(trainer: Trainer) -> bool:
    """Whether this process shows progress."""
    return trainer.is_global_zero and bool(getattr(trainer, "show_progress", True))
