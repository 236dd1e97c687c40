"""The run directory: what is kept of an edit stream, and how it survives a crash."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from kedit_lightning import delta as delta_files
from kedit_lightning.delta import WeightDelta
from kedit_lightning.errors import DeltaError, KeditError
from kedit_lightning.writing import unwritable, write_beside

Record = dict[str, Any]
Commit = tuple[int, list[WeightDelta], Record]
COMMITS = "deltas/[0-9]*.safetensors"
"""Where the commits of a run lie in its directory."""


class RunDirectory:
    """``lightning_logs/NAME/version_N``: config.yaml, deltas/, edits.jsonl, metrics.json and what the trainer adds.

    A commit's delta file *is* its record: it is written beside, flushed and renamed. edits.jsonl is appended to and
    flushed; a line cut off by a crash is dropped when the file is read or appended to. Lines that are to replace others
    are first written to a file of their own (the journal), from which an interrupted replacement is made good.

    Args:
        path: The directory; made when something is first written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.edits = path / "edits.jsonl"
        self._journal = path / ".edits.journal"
        self._group_start = 0
        self._size: int | None = None

    # ------------------------------------------------------------------ writing

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Take the directory for one stream of edits; if the preparations inside the context fail, nothing is left.

        Raises:
            KeditError: The directory holds a run, or cannot be made.
        """
        deltas = self.path / "deltas"
        try:
            deltas.mkdir(parents=True)
        except FileExistsError as error:
            msg = f"{self.path} holds a run already: take another EditTrainer, which gets a directory of its own"
            raise KeditError(msg) from error
        except OSError as error:
            raise unwritable(deltas, error) from error
        try:
            yield
        except BaseException:
            (self.path / "contexts.json").unlink(missing_ok=True)
            for folder in (deltas, self.path):
                with suppress(OSError):  # TensorBoard has begun its file
                    folder.rmdir()
            raise

    def start_group(self) -> None:
        """Remember where the lines of the edits since the last restoration begin."""
        self._group_start = self._end()

    def commit(
        self,
        number: int,
        deltas: Sequence[WeightDelta],
        metadata: Record,
        records: Sequence[Record],
        memory: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Save an edit batch: the delta file, then its lines of edits.jsonl; both or neither.

        Raises:
            KeditError: The disk is full.
        """
        file = self._file(number)
        delta_files.save(file, deltas, metadata, memory)
        try:
            self._write_at(self._end(), _as_lines(records))
        except BaseException:  # an interrupt too: the trainer rolls the weights back, so the commit goes as well
            file.unlink()
            raise

    def complete_group(self, records: Sequence[Record]) -> None:
        """Write the lines of the edits since the last restoration again, now with what was measured after.

        Raises:
            KeditError: The disk is full; the lines are then still there as they were committed.
        """
        content = {"start": self._group_start, "lines": _as_lines(records).decode()}
        write_beside(self._journal, lambda path: path.write_text(json.dumps(content), encoding="utf-8"))
        self._write_at(self._group_start, _as_lines(records))
        self._journal.unlink()

    def _end(self) -> int:
        """Size of edits.jsonl in bytes; the first call makes good what a crash has left."""
        if self._size is None:
            lines = self._lines()
            if self.edits.is_file() and lines != self.edits.read_bytes():
                write_beside(self.edits, lambda path: path.write_bytes(lines))
            self._journal.unlink(missing_ok=True)
            self._size = len(lines)
        return self._size

    def _write_at(self, start: int, content: bytes) -> None:
        """Let edits.jsonl be its first bytes, then this content; without the content if that fails."""
        try:
            with self.edits.open("ab", buffering=0) as file:
                file.truncate(start)
                self._size = start
                try:
                    if file.write(content) < len(content):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())
                except BaseException:
                    file.truncate(start)
                    raise
                self._size = start + len(content)
        except OSError as error:
            raise unwritable(self.edits, error) from error

    def write_json(self, name: str, content: Any) -> None:  # noqa: ANN401 - JSON
        """Write a JSON file beside its place, then rename it there."""
        text = json.dumps(content, indent=2, ensure_ascii=False)
        write_beside(self.path / name, lambda path: path.write_text(text + "\n", encoding="utf-8"))

    def write_lines(self, name: str, records: Sequence[Record]) -> None:
        """Write a JSONL file beside its place, then rename it there."""
        write_beside(self.path / name, lambda path: path.write_bytes(_as_lines(records)))

    # ------------------------------------------------------------------ reading

    def records(self) -> list[Record]:
        """The lines of edits.jsonl; a truncated last one is left out."""
        return [json.loads(line) for line in self._lines().splitlines()]

    def _lines(self) -> bytes:
        """The whole lines of edits.jsonl, a replacement that was interrupted made good."""
        data = self.edits.read_bytes() if self.edits.is_file() else b""
        if self._journal.is_file():
            journal = json.loads(self._journal.read_text(encoding="utf-8"))
            data = data[: journal["start"]] + journal["lines"].encode()
        return data[: data.rfind(b"\n") + 1]

    def commits(self) -> list[Commit]:
        """Number, updates and metadata of every commit, in order.

        Raises:
            DeltaError: This is no run directory, or a file of it is corrupt.
        """
        return [self._load(number) for number in self._numbers()]

    def metadata(self) -> list[Record]:
        """Metadata of every commit, in order, without its updates.

        Raises:
            DeltaError: This is no run directory, or a file of it is corrupt.
        """
        return [delta_files.load_metadata(self._file(number)) for number in self._numbers()]

    def standing(self) -> list[Commit]:
        """The commits that the model at the end of the stream holds: those since the last restoration.

        Raises:
            DeltaError: This is no run directory, or a file of it is corrupt.
        """
        commits: list[Commit] = []
        for number in reversed(self._numbers()):
            metadata = delta_files.load_metadata(self._file(number))
            if commits and metadata["group"] != commits[0][2]["group"]:
                break
            commits.append(self._load(number))
        return commits[::-1]

    def _file(self, number: int) -> Path:
        return self.path / "deltas" / f"{number:06d}.safetensors"

    def _load(self, number: int) -> Commit:
        return (number, *delta_files.load(self._file(number)))

    def _numbers(self) -> list[int]:
        files = self.path.glob(COMMITS)
        numbers = sorted(int(file.stem) for file in files if file.stem.isdecimal())
        if not numbers:
            msg = f"{self.path}: expected a run directory with deltas/000000.safetensors …, found none"
            raise DeltaError(msg)
        return numbers


def newest(path: Path, holding: str) -> Path:
    """The run in a directory: the directory itself, or for ``lightning_logs/NAME`` its newest ``version_N``.

    Args:
        path: The directory.
        holding: What the run is needed for, ``metrics.json`` or a commit; versions without it (a failed fit, a
            prediction) are passed over.
    """
    versions = [run for run in path.glob("version_*") if run.name.removeprefix("version_").isdecimal()]
    versions = [run for run in versions if any(run.glob(holding))] or versions
    return max(versions, key=lambda run: int(run.name.removeprefix("version_")), default=path)


def read_deltas(path: Path) -> tuple[list[WeightDelta], Record]:
    """Updates of a delta file, or of the model that a run ends with, in the order in which they are added.

    Args:
        path: A delta file, a run directory, or the folder of its versions (the newest is taken).

    Returns:
        The updates, and their metadata with the case ids of all of them.

    Raises:
        DeltaError: There is neither, or a file is corrupt.
    """
    if not path.is_dir():
        return delta_files.load(path)
    standing = RunDirectory(newest(path, COMMITS)).standing()
    case_ids = [case for _, _, metadata in standing for case in metadata["case_ids"]]
    return [delta for _, deltas, _ in standing for delta in deltas], {**standing[-1][2], "case_ids": case_ids}


def _as_lines(records: Sequence[Record]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
