"""How edits are streamed, in words; and edits that contradict each other when they are solved together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Literal

from kedit_lightning.edits import Edit
from kedit_lightning.errors import DataError

OnConflict = Literal["raise", "keep_last"]
"""What becomes of edits that want different answers to one question in one batch."""

_SHOWN = 5
"""Conflicts that are named one by one."""

_log = logging.getLogger(__name__)


def protocol_name(edits: int, batch_size: int, restore_every: int | None) -> str:
    """What happened to the weights, in words.

    Args:
        edits: Number of edits.
        batch_size: Edits solved together.
        restore_every: After how many edits the weights go back to the unedited model; None: never.

    >>> protocol_name(2000, 1, 1), protocol_name(2000, 1, None), protocol_name(2000, 1, 100)
    ('single', 'sequential', 'one by one, restored every 100')
    >>> protocol_name(10_000, 10_000, None), protocol_name(2000, 100, 100)
    ('one batch of 10000', '20 batches of 100, restored after each')
    >>> protocol_name(250, 100, None), protocol_name(2000, 100, 200)
    ('3 batches of up to 100, all kept', '20 batches of 100, restored every 200')
    """
    every = restore_every if restore_every is not None and restore_every < edits else None
    if edits == 1 or restore_every == 1:
        return "single"
    if batch_size == 1:
        return "sequential" if every is None else f"one by one, restored every {every}"
    if batch_size >= edits:
        return f"one batch of {edits}"
    up_to = "up to " if edits % batch_size else ""
    kept = "all kept" if every is None else "restored after each" if every == batch_size else f"restored every {every}"
    return f"{-(-edits // batch_size)} batches of {up_to}{batch_size}, {kept}"


def question(edit: Edit) -> tuple[str, str]:
    """What two edits have in common that ask one question: the subject, in whatever case, and the relation.

    Where no relation is given it is the same prompt.
    """
    return edit.subject.lower(), edit.relation_id or edit.prompt


def without_conflicts(edits: Sequence[Edit], batch_size: int, on_conflict: OnConflict) -> list[Edit]:
    """The edits of a stream of which no two in one batch want different answers to one question.

    Two edits towards the same answer do not contradict each other and are both kept.

    Args:
        edits: The stream.
        batch_size: Edits solved together; one by one the later edit wins by itself, and nothing is looked at.
        on_conflict: ``raise``, or ``keep_last``: earlier ones are left out of the batch, counted and logged, and the
            batch is filled with the edits that follow.

    Returns:
        The stream.

    Raises:
        DataError: There are conflicts, and they are not to be left out.
    """
    if batch_size == 1:
        return list(edits)
    kept: list[Edit] = []
    conflicts: list[list[Edit]] = []
    batch: dict[int, Edit] = {}
    asked: dict[tuple[str, str], list[int]] = {}
    for i, edit in enumerate(edits):
        if len(batch) == batch_size:
            kept += batch.values()
            batch, asked = {}, {}
        same = asked.setdefault(question(edit), [])
        if same and batch[same[0]].target_new != edit.target_new:
            conflicts.append([*(batch.pop(earlier) for earlier in same), edit])
            same.clear()
        batch[i] = edit
        same.append(i)
    kept += batch.values()
    if conflicts and on_conflict == "raise":
        msg = (
            f"one batch cannot hold different answers to one question: {_named(conflicts)}; on_conflict: keep_last "
            "keeps the last of them, batch_size: 1 lets the later edit win"
        )
        raise DataError(msg)
    if conflicts:
        left_out = len(edits) - len(kept)
        _log.warning(
            "left out %d of %d edits for a later one in their batch: %s", left_out, len(edits), _named(conflicts)
        )
    return kept


def _named(conflicts: Iterable[Sequence[Edit]]) -> str:
    named = [
        f"cases {' and '.join(str(edit.case_id) for edit in edits)} ({edits[-1].text!r}: "
        f"{' or '.join(edit.target_new for edit in edits)})"
        for edits in conflicts
    ]
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return ", ".join(named[:_SHOWN]) + more
