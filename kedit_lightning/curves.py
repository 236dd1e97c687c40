"""Curves over the number of edits: what runs left of their checkpoints and health, a figure a quantity."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit_lightning.callbacks.figures import OTHERS, SCORES, STYLE, band, blank, headline
from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record
from kedit_lightning.metrics.runs import interval_over_runs
from kedit_lightning.run import RunDirectory, newest
from kedit_lightning.writing import write_beside, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)
KNOWN = 12
"""Quantities that a message lists at most."""


def curves(runs: Mapping[str, Sequence[Path]], quantities: Mapping[str, str], folder: Path, title: str) -> list[Path]:
    """Draw quantities over the number of edits, a curve a label: means over its runs, with 95 % intervals.

    Args:
        runs: By label its runs (one a seed): run directories, or folders of their versions (the newest is taken).
        quantities: By name places in a line of checkpoints.jsonl or health.jsonl, such as ``so_far.locality.mean`` or
            ``drift.*.l1``; ``*`` stands for every name there, and their mean is taken.
        folder: What is drawn goes there: for each quantity ``NAME.png`` and ``NAME.csv``, its name with ``_`` for what
            is no letter or digit; TensorBoard's figures and curves; and table.md, the last values of all.
        title: Of the figures.

    Returns:
        The files but for TensorBoard's.

    Raises:
        KeditError: A run has no such files, or none of the quantities is in any of them; of some only, they are left
            out with a warning (a retained share is not there where the unedited model fails all tasks).
    """
    from matplotlib import rc_context
    from torch.utils.tensorboard import SummaryWriter

    lines = {label: [_lines(Path(path)) for path in paths] for label, paths in runs.items()}
    tables = {name: curve(lines, quantity) for name, quantity in quantities.items()}
    if missing := [quantities[name] for name, rows in tables.items() if not rows]:
        every = chain.from_iterable(chain.from_iterable(lines.values()))
        known = sorted(dict.fromkeys(place for line in every for place in _names(line)))
        more = f" and {len(known) - KNOWN} more" if len(known) > KNOWN else ""
        msg = f"{', '.join(missing)} is in none of the runs; there are {', '.join(known[:KNOWN])}{more}"
        if len(missing) == len(tables):
            raise KeditError(msg)
        _log.warning("warning: not drawn: %s", msg)
        tables = {name: rows for name, rows in tables.items() if rows}
    files: list[Path] = []
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE), SummaryWriter(str(folder)) as writer:
        for name, rows in tables.items():
            stem = "_".join("".join(c if c.isalnum() else " " for c in name).split())
            picture, table = folder / f"{stem}.png", folder / f"{stem}.csv"
            figure = draw(rows, name, title)
            write_beside(picture, lambda path, figure=figure: figure.savefig(path, dpi=150, format="png"))  # type: ignore[misc]
            write_csv(table, rows)
            writer.add_figure(name, figure, max(row["edits"] for row in rows), close=False)
            for row in rows:
                writer.add_scalar(f"{name}/{row['label']}", row["mean"], row["edits"])
            files += [picture, table]
    ends = folder / "table.md"
    write_beside(ends, lambda path: path.write_text(ending(tables), encoding="utf-8"))
    return [*files, ends]


def ending(tables: Mapping[str, Sequence[Record]]) -> str:
    """The last values of all quantities as a Markdown table, a line a label.

    Args:
        tables: By quantity what `curve` gives.

    >>> row = {"label": "ROME", "edits": 300, "runs": 3, "mean": 0.5, "ci95": 0.125}
    >>> print(ending({"reliability": [row | {"edits": 0, "mean": 0.0}, row]}), end="")
    | after | edits | reliability |
    |---|---|---|
    | ROME | 300 | 0.500 ± 0.125 |
    """
    last = {name: {row["label"]: row for row in rows} for name, rows in tables.items()}  # rows come by edits
    lines = [f"| after | edits | {' | '.join(tables)} |", "|---" * (2 + len(tables)) + "|"]
    for label in dict.fromkeys(label for rows in last.values() for label in rows):
        there = [rows.get(label) for rows in last.values()]
        edits = max(row["edits"] for row in there if row is not None)
        cells = ["" if row is None else f"{row['mean']:.3f}{_interval(row)}" for row in there]
        lines.append(f"| {label} | {edits} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _interval(row: Record) -> str:
    return f" ± {row['ci95']:.3f}" if row["ci95"] == row["ci95"] else ""


def curve(lines: Mapping[str, Sequence[Sequence[Record]]], quantity: str) -> list[Record]:
    """A quantity over the number of edits.

    Args:
        lines: By label, for each of its runs, the lines.
        quantity: As in `curves`.

    Returns:
        Records of ``label``, ``edits``, ``runs`` (how many have it), ``mean`` and ``ci95``, half the width of the 95 %
        interval over runs; nan for a single run.

    >>> runs = [[{"edits": 10, "tasks": {"nli": nli}}, {"edits": 20}] for nli in (0.5, 0.75)]
    >>> [{name: row[name] for name in ("edits", "runs", "mean")} for row in curve({"ROME": runs}, "tasks.nli")]
    [{'edits': 10, 'runs': 2, 'mean': 0.625}]
    """
    rows: list[Record] = []
    for label, runs in lines.items():
        points: dict[int, list[float]] = {}
        for run in runs:
            latest = {line["edits"]: value for line in run if (value := pick(line, quantity)) is not None}
            for edits, value in latest.items():
                points.setdefault(edits, []).append(value)
        for edits, values in sorted(points.items()):
            mean, half = interval_over_runs(values)
            rows.append({"label": label, "edits": edits, "runs": len(values), "mean": mean, "ci95": half})
    return rows


def pick(line: Record, quantity: str) -> float | None:
    """A number of a line by its place, the mean where ``*`` stands for several; None where there is none.

    >>> pick({"drift": {"h.0.weight": {"l1": 1.0}, "h.1.weight": {"l1": 3.0}}}, "drift.*.l1"), pick({}, "tasks.nli")
    (2.0, None)
    """
    found = [float(value) for value in _at(line, quantity.split(".")) if isinstance(value, int | float)]
    return sum(found) / len(found) if found else None


def _at(value: Any, names: Sequence[str]) -> Iterator[Any]:  # noqa: ANN401 - JSON
    if not names:
        yield value
    elif isinstance(value, dict):
        for name in value if names[0] == "*" else {names[0]} & value.keys():
            yield from _at(value[name], names[1:])


def _names(value: Any, before: str = "") -> Iterator[str]:  # noqa: ANN401 - JSON
    """The places of all numbers; names with a dot in them, of matrices, are ``*``."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _names(inner, f"{before}.{'*' if '.' in name else name}".lstrip("."))
    elif isinstance(value, int | float):
        yield before


def _lines(path: Path) -> list[Record]:
    run = RunDirectory(newest(path, "edits.jsonl"))
    found = [*run.checkpoints.records(), *run.health.records()]
    if not found:
        msg = (
            f"{path}: expected a run with {run.checkpoints.path.name} or {run.health.path.name}, found neither; "
            "checkpoints and the collapse watch of a configuration leave them"
        )
        raise KeditError(msg)
    return found


def draw(rows: Sequence[Record], quantity: str, title: str) -> Figure:
    """One quantity: a curve a label, its 95 % interval as a band.

    Args:
        rows: From `curve`.
        quantity: Its name.
        title: What was edited how.
    """
    figure = blank(8.2, 4.6)
    axis = figure.subplots()
    labels = list(dict.fromkeys(row["label"] for row in rows))
    palette = (*SCORES, *OTHERS)
    for i, label in enumerate(labels):
        band(axis, [row for row in rows if row["label"] == label], palette[i % len(palette)], label)
    axis.set_xlabel("edits")
    axis.set_ylabel(quantity)
    axis.grid(axis="y", zorder=0)
    figure.legend(loc="outside right center")
    headline(figure, title)
    return figure
