"""Files that are whole or not there, whatever interrupts the writing."""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kedit_lightning.errors import KeditError


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, flush it to the disk, then rename it there: it is whole or it is not there.

    Args:
        path: The place.
        write: Called with the path to write to.

    Raises:
        KeditError: The disk is full, or the place cannot be written to.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
        _flush_names(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):  # a place below a file
            beside.unlink()


def _flush_names(folder: Path) -> None:
    """Let the disk know what a folder holds, where it can be told."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def begun(folder: Path, prepared: Collection[str]) -> Iterator[None]:
    """Make a folder; if the context fails before anything lies there but what is prepared, nothing is left.

    Args:
        folder: The folder.
        prepared: Names of what counts for nothing, beside TensorBoard's files; those stay, and the folder with them.

    Raises:
        KeditError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield
    except BaseException:
        there = [path for path in folder.iterdir() if not path.match("events.out.*")]
        if {path.name for path in there} <= set(prepared):
            for path in there:
                with suppress(OSError):  # a folder with something in it
                    path.rmdir() if path.is_dir() else path.unlink()
            with suppress(OSError):  # TensorBoard has begun its file
                folder.rmdir()
        raise


@contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Hold a file's lock for as long as the context lasts; the system lifts that of a process which dies.

    Args:
        path: The file; made if it is not there.
        taken: What to say where another process holds it.

    Raises:
        KeditError: Another process does, or the file system has no locks.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise KeditError(taken) from error
        except OSError as error:
            msg = f"{path}: cannot be locked ({error.strerror}); keep runs on a disk that has file locks"
            raise KeditError(msg) from error
        yield


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write records of equal keys as a table; numbers to six decimals, below 1 to six digits; None and nan are empty.

    Raises:
        KeditError: As `write_beside`.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        known = {name: value for name, value in row.items() if value is not None and value == value}
        writer.writerow({name: _short(v) if isinstance(v, float) else v for name, v in known.items()})
    write_beside(path, lambda path: path.write_text(table.getvalue(), encoding="utf-8"))


def _short(value: float) -> float:
    return round(value, 6) if abs(value) >= 1 else float(f"{value:.6g}")


def unwritable(path: Path, error: Exception) -> KeditError:
    """The one line about a file or folder that could not be written; nothing is left of it."""
    reason = getattr(error, "strerror", None) or error
    return KeditError(f"{path}: cannot be written ({reason}); make room there, or write somewhere else")
