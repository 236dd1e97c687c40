"""The run directory: what is kept of an edit stream, and how it survives a crash."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from kedit_lightning import delta as delta_files
from kedit_lightning.delta import WeightDelta
from kedit_lightning.errors import DeltaError, KeditError
from kedit_lightning.lines import Lines, as_lines
from kedit_lightning.lines import Record as Record
from kedit_lightning.models.processes import first
from kedit_lightning.writing import begun, locked, unwritable, write_beside

Commit = tuple[int, list[WeightDelta], Record]
Content = tuple[int, Sequence[WeightDelta], Record, Mapping[str, Tensor]]
"""Of a commit: its number, its updates, what it says of itself, and what the editor remembers of it."""
COMMITS = "deltas/[0-9]*.safetensors"
"""Where the commits of a run lie in its directory."""
CONFIG, SETTINGS, CONTEXTS, BEFORE, LOCK = "config.yaml", "run.json", "contexts.json", "before.jsonl", "run.lock"
PREPARED = (CONFIG, SETTINGS, CONTEXTS, BEFORE, LOCK)
"""What is written before the first edit."""
BESIDE = ".*.[0-9]*"
"""Files that were being written beside their place when the process was killed."""


class RunDirectory:
    """``lightning_logs/NAME/version_N``: config.yaml, deltas/, edits.jsonl, metrics.json and what the trainer adds.

    A commit is its delta file, written beside, flushed and renamed, and then its lines of edits.jsonl, appended and
    flushed: it is durable when both are there, and `recover` undoes what a crash has left of others. An edit that was
    rejected has a line too, whose ``commit`` is null and whose ``rejected`` says why.

    Args:
        path: The directory; made when something is first written. Where there are several processes all call what
            writes, and the first does it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.edits = path / "edits.jsonl"
        self.lines = Lines(self.edits)
        self.checkpoints = Lines(path / "checkpoints.jsonl")
        self.health = Lines(path / "health.jsonl")

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
        with self.begun():
            yield

    def begun(self) -> AbstractContextManager[None]:
        """Make the directory, of which nothing is left if the context fails before anything is found."""
        return begun(self.path, {*PREPARED, "deltas"})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out for as long as the context lasts; the system lifts the lock of one that dies.

        Raises:
            KeditError: Another process is at work in the directory, or the file system has no locks.
        """
        with locked(self.path / LOCK, f"{self.path}: another process is at work on this run; wait until it has ended"):
            yield

    def commit(self, commits: Sequence[Content], records: Sequence[Record]) -> None:
        """Save edit batches: the delta files, then the lines of edits.jsonl; all of it or nothing.

        Args:
            commits: An edit batch, or edits side by side.
            records: Their lines, and those of edits rejected among them.

        Raises:
            KeditError: The disk is full.
        """
        first(lambda: self._commit(commits, records))

    def _commit(self, commits: Sequence[Content], records: Sequence[Record]) -> None:
        try:
            for number, deltas, metadata, memory in commits:
                delta_files.save(self._file(number), deltas, metadata, memory)
            self.lines.append(records)
        except BaseException:  # an interrupt too: the trainer rolls the weights back, so the commits go as well
            for number, *_ in commits:
                self._file(number).unlink(missing_ok=True)
            raise

    def recover(self, sizes: Sequence[int]) -> list[Record]:
        """Cut the run back to its last durable edit batch.

        Args:
            sizes: Number of edits in each batch of the stream, or of those side by side.

        Returns:
            The lines of the batches that are done.
        """
        done = first(lambda: self._recover(sizes))
        return self.lines.records()[:done]

    def _recover(self, sizes: Sequence[int]) -> int:
        done, lines = 0, self.lines.records()
        for size in sizes:
            if done + size > len(lines):
                break
            done += size
        commits = [line["commit"] for line in lines[:done] if line["commit"] is not None]
        if commits and not self._durable(commits[-1]):
            done = next(i for i, line in enumerate(lines) if line["commit"] == commits[-1])
            done = max(end for end in accumulate(sizes, initial=0) if end <= done)
        self.lines.cut(done)
        for measured in (self.checkpoints, self.health):
            measured.cut(sum(line["edits"] <= done for line in measured.records()))
        kept = {self._file(line["commit"]) for line in lines[:done] if line["commit"] is not None}
        left = (file for folder in (self.path, self.path / "deltas") for file in folder.glob(BESIDE))
        stopped = (self.path / name for name in ("metrics.json", "delta.safetensors"))
        for file in {*self.path.glob(COMMITS), *left, *stopped} - kept:
            file.unlink(missing_ok=True)
        return done

    def _durable(self, number: int) -> bool:
        try:
            self._load(number)
        except DeltaError:
            return False
        return True

    def write_json(self, name: str, content: Any) -> None:  # noqa: ANN401 - JSON
        """Write a JSON file beside its place, then rename it there."""
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        first(lambda: write_beside(self.path / name, lambda path: path.write_text(text, encoding="utf-8")))

    def write_lines(self, name: str, records: Sequence[Record]) -> None:
        """Write a JSONL file beside its place, then rename it there."""
        first(lambda: write_beside(self.path / name, lambda path: path.write_bytes(as_lines(records))))

    # ------------------------------------------------------------------ reading

    def records(self) -> list[Record]:
        """The lines of edits.jsonl; a truncated last one is left out."""
        return self.lines.records()

    def read_json(self, name: str) -> Any:  # noqa: ANN401 - JSON
        """What a JSON file of the run says; None where there is none.

        Raises:
            KeditError: It is damaged.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except ValueError as error:
            msg = f"{path}: expected JSON, and it is damaged ({error}); take another copy, or run again"
            raise KeditError(msg) from error

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
        numbers, lines = self._numbers(), self.records()
        group = self.last_metadata()["group"]  # a killed run may have no lines of it
        group = max(group, lines[-1].get("group", group) if lines else group)  # or rejections alone after it
        commits: list[Commit] = []
        for number in reversed(numbers):
            if delta_files.load_metadata(self._file(number))["group"] != group:
                break
            commits.append(self._load(number))
        return commits[::-1]

    def load(self, number: int) -> tuple[list[WeightDelta], Record, dict[str, Tensor]]:
        """Updates and metadata of a commit, and what the editor remembered of it.

        Raises:
            DeltaError: The file is missing or corrupt.
        """
        file = self._file(number)
        return (*delta_files.load(file), delta_files.load_memory(file))

    def last_metadata(self) -> Record:
        """Metadata of the last commit, whether the model still holds it or not.

        Raises:
            DeltaError: This is no run directory, or a file of it is corrupt.
        """
        return delta_files.load_metadata(self._file(self._numbers()[-1]))

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
    run = RunDirectory(newest(path, COMMITS))
    standing = run.standing()
    case_ids = [case for _, _, metadata in standing for case in metadata["case_ids"]]
    return [delta for _, deltas, _ in standing for delta in deltas], {**run.last_metadata(), "case_ids": case_ids}
