"""Files of a JSON object a line that are appended to, and survive a crash at any instant."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kedit_lightning.errors import KeditError
from kedit_lightning.models.processes import first
from kedit_lightning.writing import unwritable, write_beside

Record = dict[str, Any]


class Lines:
    """A JSONL file: every append is flushed to the disk, and a line that a crash cut off is dropped.

    Where there are several processes all of them call what changes it, and the first does it.

    Lines that are to replace others are first written to a file of their own (the journal), from which an interrupted
    replacement is made good.

    Args:
        path: The file; made when something is first written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal = path.with_name(f".{path.stem}.journal")
        self._ends: list[int] | None = None

    def __len__(self) -> int:
        return len(self._ending()) - 1

    def append(self, records: Sequence[Record]) -> None:
        """Add lines; all or none.

        Raises:
            KeditError: The disk is full.
        """
        first(lambda: self._write(len(self), as_lines(records)))

    def replace(self, start: int, records: Sequence[Record]) -> None:
        """Write all lines from a number on anew.

        Raises:
            KeditError: The disk is full; the lines are then still there as they were.
        """
        first(lambda: self._replace(start, records))

    def _replace(self, start: int, records: Sequence[Record]) -> None:
        content = {"start": self._ending()[start], "lines": as_lines(records).decode()}
        write_beside(self._journal, lambda path: path.write_text(json.dumps(content), encoding="utf-8"))
        self._write(start, as_lines(records))
        self._journal.unlink()

    def cut(self, n: int) -> None:
        """Keep the first n lines."""
        first(lambda: self._write(n, b"") if n < len(self) else None)

    def records(self) -> list[Record]:
        """What the lines say; a truncated last one is left out.

        Raises:
            KeditError: A line is damaged.
        """
        try:
            return [json.loads(line) for line in self._whole().splitlines()]
        except ValueError as error:
            msg = f"{self.path}: expected a JSON object a line, and one is damaged ({error}); take another copy"
            raise KeditError(msg) from error

    def _ending(self) -> list[int]:
        """Where in the file each line begins, and the last ends; the first call makes good what a crash has left."""
        if self._ends is None:
            whole = self._whole()
            if self.path.is_file() and whole != self.path.read_bytes():
                write_beside(self.path, lambda path: path.write_bytes(whole))
            self._journal.unlink(missing_ok=True)
            self._ends = _ends(0, whole)
        return self._ends

    def _whole(self) -> bytes:
        """The whole lines, a replacement that was interrupted made good."""
        data = self.path.read_bytes() if self.path.is_file() else b""
        if self._journal.is_file():
            journal = json.loads(self._journal.read_text(encoding="utf-8"))
            data = data[: journal["start"]] + journal["lines"].encode()
        return data[: data.rfind(b"\n") + 1]

    def _write(self, n: int, content: bytes) -> None:
        """Let the file be its first n lines, then this content; without the content if that fails."""
        ends = self._ending()
        start = ends[n]
        del ends[n + 1 :]
        try:
            with self.path.open("ab", buffering=0) as file:
                file.truncate(start)
                try:
                    if file.write(content) < len(content):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())
                except BaseException:  # an interrupt too
                    file.truncate(start)
                    raise
        except OSError as error:
            raise unwritable(self.path, error) from error
        ends += _ends(start, content)[1:]


def as_lines(records: Sequence[Record]) -> bytes:
    """Records as the bytes of a JSONL file."""
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def _ends(start: int, content: bytes) -> list[int]:
    """Where each line begins, and the last ends, in a file that holds this content from a place on."""
    ends = [start]
    for line in content.splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    return ends
