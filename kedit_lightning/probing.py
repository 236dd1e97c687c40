"""The `probe` command: looks inside a model, and keeps what is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from kedit_lightning import probes
from kedit_lightning.callbacks.console import consoles, say
from kedit_lightning.callbacks.figures import keep
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.editors import Editor
from kedit_lightning.errors import KeditError
from kedit_lightning.probes.base import Finding, Probe, Study
from kedit_lightning.single_edits import SingleEdits
from kedit_lightning.writing import write_csv

if TYPE_CHECKING:
    from kedit_lightning.trainer import EditTrainer

SHOWN = 16
"""Tables of up to this many rows are shown on the terminal."""


def look(
    trainer: EditTrainer, editor: Editor, datamodule: EditDataModule, probe: Probe | None, fit: Callable[[], None]
) -> list[Finding]:
    """Look inside a model, and keep each finding in the run directory when it is there.

    Args:
        trainer: The trainer.
        editor: The editor; afterwards it and its model are as they were before any edit.
        datamodule: The edits.
        probe: The probe.
        fit: Runs one `Trainer.fit`.

    Returns:
        The findings: NAME.csv, NAME.png and NAME.json in the run directory.

    Raises:
        KeditError: There is no probe, or nothing that it could look at.
    """
    if probe is None:
        known = ", ".join(sorted(name for name in probes.__all__ if _is_probe(getattr(probes, name))))
        msg = f"probe: expected --probe and a class, got none; there are {known}"
        raise KeditError(msg)
    singles, found = SingleEdits(trainer, editor, datamodule, fit), list[Finding]()
    study = Study(editor, datamodule.edits, singles, datamodule.subjects)
    with closing(trainer.edit_logger), trainer.run.begun():
        trainer.tell("on_stream_start", editor, len(datamodule.edits))
        editor.base.to(trainer.strategy.root_device)
        editor.restore()
        try:
            for finding in probe.look(study):
                keep_finding(trainer, finding, len(datamodule.edits))
                found.append(finding)
        finally:
            editor.base.side_by_side.clear()
            editor.restore()
    _show(trainer, found)
    return found


def _is_probe(kind: type) -> bool:
    return issubclass(kind, Probe) and kind is not Probe


def keep_finding(trainer: EditTrainer, finding: Finding, n_edits: int) -> None:
    """Write its files; the notes last."""
    if finding.rows:
        write_csv(trainer.run.path / f"{finding.name}.csv", finding.rows)
    if finding.figure is not None:
        keep(trainer, finding.name, finding.figure, n_edits)
    trainer.run.write_json(f"{finding.name}.json", dict(finding.notes))


def _show(trainer: EditTrainer, findings: Sequence[Finding]) -> None:
    """Notes and short tables on the terminal, and where everything is."""
    room = min((console.out.width for console in consoles(trainer)), default=0)
    shown, said = list[Text | Table | str](), set[tuple[str, str]]()
    for finding in findings:
        short = 0 < len(finding.rows) <= SHOWN and wide(finding) <= room
        shown.append(table(finding) if short else Text(f"{finding.name}: {len(finding.rows)} rows", "italic"))
        shown += ["  {}: {}".format(*note) for note in flat(finding.notes) if note not in said]  # probes' share some
        said |= set(flat(finding.notes))
    say(trainer, *shown, f"run directory {trainer.run.path}")


def wide(finding: Finding) -> int:
    """Columns of the terminal that its table takes."""
    names = finding.rows[0]
    return sum(3 + max(len(name), *(len(text(row[name])) for row in finding.rows)) for name in names)


def table(finding: Finding) -> Table:
    """The rows of a finding."""
    shown = Table(title=finding.name, title_justify="left", box=box.HORIZONTALS)
    for name in finding.rows[0]:
        shown.add_column(name, justify="right", no_wrap=True)
    for row in finding.rows:
        shown.add_row(*(Text(text(value)) for value in row.values()))
    return shown


def flat(notes: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, str]]:
    """Notes as names and texts, nested ones by their path, without those that say nothing.

    >>> list(flat({"used": 3, "skipped": {"unknown": 0.12345678}, "rejected": []}))
    [('used', '3'), ('skipped/unknown', '0.1235')]
    """
    for key, value in notes.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}{key}/")
        elif value not in (None, "", [], ()):
            yield f"{name}{key}", text(value)


def text(value: object) -> str:
    """A value for the terminal: numbers to four digits, nothing where there is none.

    >>> text(0.123456), text(None), text([1, 2.0])
    ('0.1235', '', '1, 2')
    """
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
