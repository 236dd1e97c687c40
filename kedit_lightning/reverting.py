"""Undoing edits of a run: which updates stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kedit_lightning.delta import WeightDelta
from kedit_lightning.errors import KeditError
from kedit_lightning.history import sequence
from kedit_lightning.lines import Record
from kedit_lightning.run import RunDirectory

SHOWN = 10
"""Edits that a message lists at most."""


@dataclass(frozen=True)
class Reverted:
    """The model of a run without some of its edits: the pristine one, and the updates of the others in their order.

    Attributes:
        name: What was undone, as the name of a file: ``case_17``, ``edit_3``, ``commit_2``.
        undone: Lines of edits.jsonl of the edits that are left out, each with its ``number``; see `history.sequence`.
        others: Lines of those that stay.
        standing: The updates that the run ended with.
        kept: Those that stay.
        metadata: Of the delta file: as that of the run, with the case ids that stay, and those ``reverted``.
    """

    name: str
    undone: list[Record]
    others: list[Record]
    standing: list[WeightDelta] = field(repr=False)
    kept: list[WeightDelta] = field(repr=False)
    metadata: Record

    @property
    def described(self) -> str:
        """What was undone, in words."""
        if self.name == "all":
            return "without any edit"
        only = ", the only one that the run ended with" if not self.others and len(self.undone) == 1 else ""
        kind, _, which = self.name.partition("_")
        if kind == "case":
            return f"without edit {which}{only}"
        if kind == "edit":
            return f"without edit @{which} (case {self.undone[0]['case_id']}){only}"
        return f"without commit {which} ({listed(self.undone)})"


def undo(run: RunDirectory, edit: str | None = None, commit: int | None = None) -> Reverted:
    """Leave edits out of the model that a run ended with.

    Args:
        run: The run.
        edit: Case id of the edit, or ``@`` and its number in the sequence; None with ``commit`` None: all edits.
        commit: Number of the commit whose edits are all undone.

    Raises:
        KeditError: There is no such edit or commit, the run did not end with it, or it was solved together with others.
    """
    if edit is not None and commit is not None:
        msg = f"expected an edit or a commit to undo, got both (edit {edit}, commit {commit})"
        raise KeditError(msg)
    standing, lines = run.standing(), sequence(run)
    of: dict[int, list[Record]] = {number: [] for number, _, _ in standing}
    for line in lines:
        if line.get("rejected") is None and line["commit"] in of:
            of[line["commit"]].append(line)
    held = [line for number in of for line in of[number]]
    if edit is not None:
        undone = [_find(edit, run.path, lines, held)]
        name = f"edit_{edit[1:]}" if edit.startswith("@") else f"case_{edit}"
    elif commit is not None:
        if commit not in of:
            there = f"{min(of)} to {max(of)}" if of else "none"
            msg = f"{run.path}: commit {commit} is not among those that the run ended with ({there})"
            raise KeditError(msg)
        undone, name = of[commit], f"commit_{commit}"
    else:
        undone, name = held, "all"
    gone = {line["number"] for line in undone}
    kept: list[WeightDelta] = []
    for number, updates, _ in standing:
        left_out = [line for line in of[number] if line["number"] in gone]
        if not left_out:
            kept += updates
        elif len(left_out) < len(of[number]):
            kept += _without(left_out[0], of[number], updates, run.path)
    others = [line for line in held if line["number"] not in gone]
    cases = {"case_ids": [line["case_id"] for line in others], "reverted": [line["case_id"] for line in undone]}
    whole = [delta for _, updates, _ in standing for delta in updates]
    return Reverted(name, undone, others, whole, kept, run.last_metadata() | cases)


def _find(edit: str, path: Path, lines: Sequence[Record], held: Sequence[Record]) -> Record:
    """The one line of an edit's ID among the edits that the run ended with."""
    by_number = edit.startswith("@")
    if not edit.removeprefix("@").isdecimal():
        msg = f"edit: expected a case id such as 17, or @ and a number in the sequence such as @3, got {edit!r}"
        raise KeditError(msg)
    number = int(edit.removeprefix("@"))
    asked = [line for line in lines if line["number" if by_number else "case_id"] == number]
    holds = {line["number"] for line in held}
    found = [line for line in asked if line["number"] in holds]
    if len(found) == 1:
        return found[0]
    if found:
        places = "; ".join(f"@{line['number']} ({_wanted(line)}commit {line['commit']})" for line in found[:SHOWN])
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        msg = (
            f"{path}: case {edit} was edited {len(found)} times: {places}{more}; say which, such as {places.split()[0]}"
        )
        raise KeditError(msg)
    what = f"edit {edit}" if by_number else f"case {edit}"
    if not asked:
        there = f"there are @0 to @{len(lines) - 1}" if by_number else f"there are {listed(lines)}"
        msg = f"{path}: no edit has {'number' if by_number else 'case id'} {number}; {there}"
    elif all(line.get("rejected") is not None for line in asked):
        msg = f"{path}: {what} was rejected ({asked[-1]['rejected']}), so there is nothing to undo"
    else:
        msg = (
            f"{path}: {what} is not in the model that the run ended with, which holds {listed(held)}: "
            "the weights were restored after it"
        )
    raise KeditError(msg)


def _wanted(line: Record) -> str:
    return f"{line['subject']} → {line['target_new']}, " if "subject" in line else ""


def _without(line: Record, together: list[Record], updates: Sequence[WeightDelta], path: Path) -> list[WeightDelta]:
    """The updates of one commit but those of one edit: where each edit has a rank-one update of its own."""
    n, place = len(together), together.index(line)
    alone = len(updates) % n == 0 and all(
        delta.left is not None and delta.left.shape[1] == 1 and delta.name == updates[i - i % n].name
        for i, delta in enumerate(updates)
    )
    if alone:
        return [delta for i, delta in enumerate(updates) if i % n != place]
    others = [other for other in together if other is not line]
    msg = (
        f"{path}: case {line['case_id']} was solved together with {listed(others)} (commit {line['commit']}) and "
        f"cannot be undone alone; --commit {line['commit']} undoes them all; or edit again without it, or with "
        "batch_size 1"
    )
    raise KeditError(msg)


def listed(lines: Sequence[Record]) -> str:
    """The case ids of edits, as far as there is room."""
    cases = [str(line["case_id"]) for line in lines]
    more = f" and {len(cases) - SHOWN} more" if len(cases) > SHOWN else ""
    return f"case{'s' * (len(cases) > 1)} {', '.join(cases[:SHOWN])}{more}"
