"""Tables of the page: those of the terminal, and rows of CSV files."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from kedit_lightning.errors import KeditError

MOST = 200
"""Rows of a CSV file that the page shows; the file itself is in the page too."""


@dataclass(frozen=True)
class Cell:
    """A text, and how it looks: ``number``, ``green``, ``red`` …, the words of rich's styles."""

    text: str
    look: str = ""


@dataclass(frozen=True)
class Grid:
    """A table: what stands over and under it, the names of its columns, its rows, and after which a section ends."""

    title: str
    caption: str
    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    ends: frozenset[int] = frozenset()


def from_rich(table: Table) -> Grid:
    """A table of the terminal; it is the same on the page."""
    looks = ["number" if column.justify == "right" else "" for column in table.columns]
    head = [Cell(str(column.header), look) for column, look in zip(table.columns, looks, strict=True)]
    rows = [
        [
            Cell(" ".join(str(cell).split()), f"{look} {cell.style if isinstance(cell, Text) else ''}".strip())
            for cell, look in zip(row, looks, strict=True)
        ]
        for row in zip(*(column.cells for column in table.columns), strict=True)
    ]
    ends = frozenset(i for i, row in enumerate(table.rows) if row.end_section)
    return Grid(str(table.title or ""), str(table.caption or ""), head, rows, ends)


def from_pairs(names: Sequence[str], settings: Sequence[Mapping[str, object]]) -> Grid:
    """A row a setting, a column a run; empty where a run does not say it."""
    every = dict.fromkeys(key for one in settings for key in one)
    rows = [[Cell(key), *(Cell(str(one.get(key, ""))) for one in settings)] for key in every]
    return Grid("", "", [Cell(name) for name in ("", *names)], rows)


def from_csv(path: Path) -> Grid:
    """The first rows of a CSV file.

    Raises:
        KeditError: It cannot be read.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            head, *rows = [line for line in csv.reader(file) if line] or [[]]
    except (OSError, ValueError, csv.Error) as error:
        msg = f"{path}: expected a table as a run leaves it, and it cannot be read ({error}); take another copy"
        raise KeditError(msg) from error
    numeric = ["number" if all(_is_number(row[i]) for row in rows if len(row) > i) else "" for i in range(len(head))]
    caption = f"the first {MOST} of {len(rows):,} rows; the file has all" if len(rows) > MOST else ""
    cells = [[Cell(_short(value), look) for value, look in zip(row, numeric, strict=False)] for row in rows[:MOST]]
    return Grid("", caption, [Cell(name, look) for name, look in zip(head, numeric, strict=True)], cells)


def _is_number(text: str) -> bool:
    try:
        float(text or 0)
    except ValueError:
        return False
    return True


def _short(text: str) -> str:
    """Numbers to four digits.

    >>> _short("0.123456"), _short("12"), _short("TOP"), _short("123456.5")
    ('0.1235', '12', 'TOP', '123456.5')
    """
    if "." not in text or not _is_number(text):
        return text
    return f"{float(text):.4g}" if abs(float(text)) < 1e4 else text
