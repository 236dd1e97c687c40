"""The numbers that the papers print, as files beside this one: ``source``, ``columns`` and, by model, ``rows``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from kedit_lightning.errors import KeditError

CELL = re.compile(r"(?P<value>[\d.]+)(?:\((?P<spread>[\d.]+)\))?(?P<doubtful>\?)?")


@dataclass(frozen=True)
class Printed:
    """A number as a paper prints it.

    Args:
        value: The number.
        spread: What stands in parentheses behind it.
        doubtful: Whether it contradicts other printed numbers.
    """

    value: float
    spread: float | None = None
    doubtful: bool = False

    @classmethod
    def read(cls, text: str) -> Printed:
        """A cell such as ``99.8(0.1)``, ``40.0?``.

        >>> Printed.read("69.6(.6)"), Printed.read("2.6?")
        (Printed(value=69.6, spread=0.6, doubtful=False), Printed(value=2.6, spread=None, doubtful=True))
        """
        found = CELL.fullmatch(text)
        assert found is not None, text
        spread = found["spread"]
        return cls(float(found["value"]), None if spread is None else float(spread), found["doubtful"] is not None)


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper.

    Args:
        source: Paper, number and what it shows.
        columns: Its columns, and the metric of each as metrics.json names it (or its protocol: ES, GS, LS, Score).
        rows: By name the printed numbers, in the order of the columns.
        spread: What the parentheses hold: the standard deviation or the half width of the 95 % interval.
        repeats: Over how many repeats.
        scale: What a metric is multiplied by.
        decimals: As printed.
        one_model: Whether all rows are of one base model.
    """

    source: str
    columns: Mapping[str, str]
    rows: Mapping[str, list[Printed]]
    spread: Literal["std", "ci95"] | None = None
    repeats: int = 1
    scale: float = 100
    decimals: int = 1
    one_model: bool = False


def known() -> dict[str, dict[str, Any]]:
    """All tables by name, as the files have them."""
    files = sorted(Path(__file__).parent.glob("*.yaml"))
    return {name: table for file in files for name, table in yaml.safe_load(file.read_text(encoding="utf-8")).items()}


def load(name: str) -> PaperTable:
    """A table.

    Args:
        name: Such as ``top_table1``; or ``top_table1/GPT-J``, the rows of one model, whose names are then without it.

    Raises:
        KeditError: There is none of that name.
    """
    tables = known()
    name, _, model = name.partition("/")
    if name not in tables:
        msg = f"paper: expected one of {', '.join(tables)}, got {name!r}"
        raise KeditError(msg)
    given = dict(tables[name])
    rows = given.pop("rows")
    if model and model not in rows:
        msg = f"paper: {name} has rows of {', '.join(rows)}, got {model!r}"
        raise KeditError(msg)
    read = {
        editor if model else f"{of} {editor}": [Printed.read(cell) for cell in str(cells).split()]
        for of, editors in rows.items()
        if model in ("", of)
        for editor, cells in editors.items()
    }
    return PaperTable(rows=read, one_model=bool(model), **given)
