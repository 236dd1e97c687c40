"""What a scaling run keeps, and the table of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record
from kedit_lightning.metrics import curve
from kedit_lightning.report import COLUMN_WIDTH, MEAN_WIDTH, cell

SETTINGS, POINTS = "scaling.json", "scaling.jsonl"
"""What a scaling run is of, and a line a measured point (the first: the unedited model)."""

JEEP_NAMES = "JEEP's names: ES efficacy, GS generalization, LS S-specificity, Score of the three"


def scaling_table(path: Path, width: int) -> Table:
    """A row a number of edits: the scores × 100, means over the seeds with the half-width of their 95 % interval.

    Args:
        path: Directory of a scaling run.
        width: Columns of the terminal; where they are few, the intervals are left out.

    Raises:
        KeditError: Nothing has been measured yet, or a file of it cannot be read.
    """
    try:
        settings, points = json.loads((path / SETTINGS).read_text(encoding="utf-8")), read_points(path)
        rows, before = curve(points), unedited(points)
        title = heading(settings)
    except (OSError, ValueError, LookupError, TypeError, StopIteration) as error:
        msg = f"{path}: expected a scaling run with points in {POINTS}, found none; `kedit scale` goes on with it"
        raise KeditError(msg) from error
    names = [name for name, value in before.items() if value is not None]
    intervals = width >= 2 * MEAN_WIDTH + COLUMN_WIDTH * len(names)
    found = Table(title=title, title_justify="left", caption_justify="left", box=box.HORIZONTALS)
    found.caption = f"× 100{', ± 95 % interval' if intervals else ''}\n{JEEP_NAMES}"
    for name in ("edits", "runs", *names):
        found.add_column(name, justify="right", no_wrap=True)
    found.add_row("none", "", *(cell({"mean": before[name]}, intervals) for name in names), end_section=True)
    for row in rows:
        scores = ({"mean": row[name], "ci95": row[f"{name}_ci95"], "n": row["runs"]} for name in names)
        found.add_row(f"{row['edits']:,}", str(row["runs"]), *(cell(score, intervals) for score in scores))
    return found


def read_points(path: Path) -> list[Record]:
    """The points that have been measured so far."""
    file = path / POINTS
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def heading(settings: Record) -> str:
    """What the run is of, over its table and figure."""
    return f"{settings['editor']} on {settings['data.dataset']}: means and 95 % intervals over seeds"


def unedited(points: Sequence[Record]) -> Record:
    """The scores of the unedited model."""
    scores: Record = next(point["scores"] for point in points if point["edits"] == 0)
    return scores
