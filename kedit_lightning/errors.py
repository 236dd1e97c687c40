"""Errors of the user's input: one clear line each, shown without a traceback.

A message says what was expected, what was got, and what to do. The command line catches `KeditError` and nothing
else of ours; anything else that escapes is a bug in this package and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class KeditError(Exception):
    """Something the user gave cannot be used as it is; `kedit` prints it as one line and exits with status 1.

    Not a `ValueError` on purpose: jsonargparse takes those for its own and buries the sentence in a page of unions.
    """


class DataError(KeditError):
    """A data file, or one record of it, cannot be used.

    Args:
        reason: What is wrong and what was expected.
        file: The file the record stands in.
        record: Where in the file, such as `record 12` or `line 3`.
    """

    def __init__(self, reason: str, *, file: Path | str | None = None, record: str | None = None) -> None:
        where = ", ".join(str(part) for part in (file, record) if part is not None)
        super().__init__(f"{where}: {reason}" if where else reason)
        self.reason = reason
        self.file = None if file is None else Path(file)
        self.record = record


class ModelError(KeditError):
    """The base model cannot be loaded or edited: an unknown family, quantised weights, a layer out of range."""


class DeltaError(KeditError):
    """A weight delta is corrupt, truncated, or belongs to another model."""


class StatisticsError(KeditError):
    """A second-moment file is corrupt, truncated, or was made for another model, layer or dtype."""


class RejectedError(KeditError):
    """Edits of a batch that must not be written: a loss, a value or an update of theirs is not finite, say.

    Args:
        reasons: By the edit's place in its batch why it is rejected.
    """

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__("; ".join(dict.fromkeys(reasons.values())))
        self.reasons = dict(reasons)


class ElsewhereError(KeditError):
    """What the first of several processes says, which has been told of it; this one is silent."""
