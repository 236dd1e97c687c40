"""What papers print beside what runs measured, as Markdown, CSV and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from rich import get_console

from kedit_lightning import papers
from kedit_lightning.callbacks.figures import MARKERS, SCORES, STYLE, band, blank, headline
from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record
from kedit_lightning.metrics.runs import half_width, interval_over_runs
from kedit_lightning.papers import PaperTable, Printed
from kedit_lightning.papers.text import latex, markdown
from kedit_lightning.run import RunDirectory, newest
from kedit_lightning.writing import write_beside, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RAW = "raw"
"""Ends the name of a row of the unedited model, which every run of that model has measured."""

SECONDS = "seconds"
"""Stands for a metric: the mean time of an edit, from edits.jsonl."""


def tables(
    *,
    paper: str,
    folder: Path | None = None,
    runs: dict[str, list[str]] | None = None,
    out: Path = Path("lightning_logs/tables"),
) -> list[Path]:
    """Put the numbers that a paper prints beside those of runs, with difference and interval.

    Args:
        paper: The table, such as ``top_table1``, or ``top_table1/GPT-J`` for the rows of one model.
        folder: A folder of `kedit compare`, ``VARIANT/seed_N``; variants whose name is that of a row stand beside it.
        runs: By row other runs, one a seed: run directories, or folders of their versions.
        out: Where ``NAME.md``, ``NAME.csv`` and ``NAME.tex`` are written.

    Returns:
        The files.

    Raises:
        KeditError: There is no such table or run, or the runs are of several base models where one is asked for.
    """
    found: dict[str, list[Path]] = {}
    if folder is not None:
        for place in sorted(folder.glob("*/seed_*")):
            found.setdefault(place.parent.name, []).append(place)
        if not found:
            msg = f"{folder}: expected runs of `kedit compare`, VARIANT/seed_N, found none"
            raise KeditError(msg)
    found |= {name: [Path(path) for path in paths] for name, paths in (runs or {}).items()}
    table = papers.load(paper)
    files = write(lines(table, found), table, out, paper.replace("/", "_"), table.source)
    get_console().print("\n".join(str(file) for file in files), highlight=False)
    return files


def compared(
    runs: Mapping[str, Sequence[Path]], paper: str, scores: Sequence[str], folder: Path, title: str, setting: str = ""
) -> list[Path]:
    """The tables of an experiment, and where it sweeps a setting, the scores over it.

    Args:
        runs: By variant its runs, one a seed.
        paper: A paper's table, as in `tables`; or none.
        scores: Without one, the metrics that are the columns, as metrics.json names them.
        folder: Where ``scores.md``, ``scores.csv``, ``scores.tex`` and ``scores.png`` are written.
        title: Of the table.
        setting: The setting that the variants are values of, if they are.

    Returns:
        The files.
    """
    table = papers.load(paper) if paper else PaperTable(title, {name: name for name in scores}, {})
    rows = lines(table, runs)
    files = write(rows, table, folder, "scores", f"{title}. {table.source}" if paper else title)
    if setting:
        from matplotlib import rc_context

        picture = folder / "scores.png"
        with rc_context(STYLE):
            figure = draw(rows, setting.rpartition(".")[2], title)
            write_beside(picture, lambda path: figure.savefig(path, dpi=150, format="png"))
        files.append(picture)
    return files


def lines(table: PaperTable, runs: Mapping[str, Sequence[Path]]) -> list[Record]:
    """A record a row and column.

    Args:
        table: The paper's.
        runs: By row its runs; a row of the unedited model takes what the others have measured before their edits.

    Returns:
        ``row``, ``column``; ``paper``, ``paper_spread`` and ``doubtful``; ``ours``, the mean over ``runs`` runs;
        ``std`` and ``ci95`` over them (of a single run the 95 % interval over its edits); ``difference``, ours less the
        paper's, and the half width of its 95 % interval, ``interval``; ``base``, the model that ours are of. None where
        there is no such number.

    Raises:
        KeditError: A run has no results, or those of a row are of several base models.
    """
    reports = {name: [_report(path) for path in paths] for name, paths in runs.items()}
    alike = {table.source: [report for given in reports.values() for report in given]} if table.one_model else reports
    for name, given in alike.items():
        if len(models := {report["protocol"].get("base") for report in given}) > 1:
            msg = f"{name}: expected runs of one base model, got {', '.join(sorted(map(str, models)))}"
            raise KeditError(msg)
    rows: list[Record] = []
    for name in dict.fromkeys([*table.rows, *reports]):
        printed: Sequence[Printed | None] = table.rows.get(name, [None] * len(table.columns))
        given, when = reports.get(name, []), "post"
        if not given and name.endswith(RAW):
            of = (ours for other, ours in reports.items() if other.startswith(name.removesuffix(RAW)))
            given, when = next(of, []), "pre"
        for (column, metric), cell in zip(table.columns.items(), printed, strict=True):
            ours = _ours([_value(report, when, metric) for report in given], table.scale)
            base = str(given[0]["protocol"].get("base")) if given else None
            rows.append({"row": name, "column": column, **_beside(cell, ours, table), "base": base})
    return rows


def _report(path: Path) -> Record:
    run = RunDirectory(newest(path, "metrics.json"))
    report: Record | None = run.read_json("metrics.json")
    if report is None:
        msg = f"{path}: expected a run with metrics.json, found none; `kedit fit` leaves it at its end"
        raise KeditError(msg)
    seconds = [line[SECONDS] for line in run.records() if line.get(SECONDS) is not None]
    return {**report, SECONDS: {"mean": fmean(seconds)} if seconds else None}


def _value(report: Record, when: str, metric: str) -> Record | None:
    if metric == SECONDS:
        found: Record | None = report[SECONDS] if when == "post" else None
        return found
    found = report.get(when, {}).get(report["protocol"].get("scores", {}).get(metric, metric))
    return None if found is None else dict(found)


def _ours(found: Sequence[Record | None], scale: float) -> Record:
    known = [one for one in found if one is not None and not math.isnan(one["mean"])]
    if not known:
        return {"ours": None, "std": None, "ci95": None, "runs": 0}
    values = [scale * one["mean"] for one in known]
    mean, half = interval_over_runs(values)
    if len(values) == 1:
        half = scale * known[0].get("ci95", math.nan)
    return {"ours": mean, "std": stdev(values) if len(values) > 1 else None, "ci95": half, "runs": len(values)}


def _beside(cell: Printed | None, ours: Record, table: PaperTable) -> Record:
    printed = {
        "paper": cell and cell.value,
        "paper_spread": cell and cell.spread,
        "doubtful": bool(cell and cell.doubtful),
    }
    found: Record = {**printed, **ours, "difference": None, "interval": None}
    if cell is not None and ours["ours"] is not None:
        theirs = cell.spread or 0.0
        if table.spread == "std":
            theirs = half_width(theirs, table.repeats)
        interval = math.hypot(ours["ci95"], theirs) if cell.spread is not None else math.nan  # unknown without theirs
        found |= {"difference": ours["ours"] - cell.value, "interval": interval}
    return found


def write(rows: Sequence[Record], table: PaperTable, folder: Path, stem: str, title: str) -> list[Path]:
    """Write ``STEM.md``, ``STEM.csv`` and ``STEM.tex``.

    Args:
        rows: From `lines`.
        table: The paper's.
        folder: Where.
        stem: Of the files.
        title: Above the table.
    """
    cells = _cells(rows, table)
    header, note = ["", *table.columns], _note(rows, table)
    texts = {".md": markdown(header, cells, title, note), ".tex": latex(header, cells, title, note)}
    files = [folder / f"{stem}{suffix}" for suffix in (".md", ".csv", ".tex")]
    write_csv(files[1], rows)
    for suffix, text in texts.items():
        write_beside(folder / f"{stem}{suffix}", lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    return files


def _cells(rows: Sequence[Record], table: PaperTable) -> list[list[str]]:
    """The lines of the table: of each row the paper's, ours and the difference, as far as there are any."""
    found: list[list[str]] = []
    by_row: dict[str, list[Record]] = {}
    for row in rows:
        by_row.setdefault(row["row"], []).append(row)
    spread = "std" if table.spread == "std" else "ci95"
    for name, own in by_row.items():
        kinds = {
            "paper": [_cell(row["paper"], row["paper_spread"], table, "?" * row["doubtful"]) for row in own],
            "ours": [_cell(row["ours"], row[spread], table) for row in own],
            "difference": [_difference(row, table) for row in own],
        }
        found += [[f"{name}, {kind}", *cells] for kind, cells in kinds.items() if any(cells)]
    return found


def _cell(value: float | None, spread: float | None, table: PaperTable, mark: str = "") -> str:
    if value is None:
        return ""
    known = spread is not None and not math.isnan(spread)
    return f"{value:.{table.decimals}f}{mark}" + (f" ({spread:.{table.decimals}f})" if known else "")


def _difference(row: Record, table: PaperTable) -> str:
    if row["difference"] is None:
        return ""
    half = "" if math.isnan(row["interval"]) else f" ± {row['interval']:.{table.decimals}f}"
    return f"{row['difference']:+.{table.decimals}f}{half}"


def _note(rows: Sequence[Record], table: PaperTable) -> str:
    spread = "standard deviations over runs" if table.spread == "std" else "half widths of 95 % intervals"
    runs = sorted({row["runs"] for row in rows if row["runs"]})
    parts = [f"Ours: measured on {', '.join(sorted({row['base'] for row in rows if row['base']})) or 'nothing yet'}"]
    parts += [f"in parentheses: {spread}"]
    parts += (
        ["± half the width of the difference's 95 % interval"] if any(row["paper"] is not None for row in rows) else []
    )
    parts += [f"runs a row: {', '.join(map(str, runs))} (of one alone the interval over its edits)"] if runs else []
    parts += ["?: the printed number contradicts others"] if any(row["doubtful"] for row in rows) else []
    return "; ".join(parts) + "."


def draw(rows: Sequence[Record], setting: str, title: str) -> Figure:
    """The scores over the values of a setting, with their 95 % intervals as bands.

    Args:
        rows: From `lines`; the names of the rows are the values.
        setting: Its name.
        title: What was edited how.
    """
    figure = blank(8.2, 4.6)
    axis = figure.subplots()
    values = list(dict.fromkeys(row["row"] for row in rows))
    places = {value: float(value) if _numbers(values) else i for i, value in enumerate(values)}
    for i, column in enumerate(dict.fromkeys(row["column"] for row in rows)):
        own = [row for row in rows if row["column"] == column and row["ours"] is not None]
        points = sorted(
            ({"edits": places[row["row"]], "mean": row["ours"], "ci95": row["ci95"]} for row in own),
            key=lambda point: point["edits"],
        )
        marker = MARKERS[i % len(MARKERS)]
        band(axis, points, SCORES[i % len(SCORES)], column.replace("_", " "), marker=marker)
    if not _numbers(values):
        axis.set_xticks(range(len(values)), values)
    axis.set_xlabel(setting.replace("_", " "))
    axis.grid(axis="y", zorder=0)
    figure.legend(loc="outside right center")
    headline(figure, title)
    return figure


def _numbers(values: Sequence[str]) -> bool:
    return all(value.replace(".", "", 1).removeprefix("-").isdecimal() for value in values)
