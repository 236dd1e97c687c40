"""What a run did, edit by edit, and in which health: read from its files, without the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from json import dumps
from pathlib import Path
from statistics import fmean

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kedit_lightning.delta import load_metadata
from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record
from kedit_lightning.metrics.generation import says
from kedit_lightning.report import count, printable
from kedit_lightning.run import COMMITS, RunDirectory, newest

COLUMNS = ("commit", "edit", "what", "when", "s", "success", "δ", "Δ", "health")
"""Of the table."""

CONDITION = {"retention": "kept {:.0%}", "perplexity": "perplexity {:.4g}", "l1": "L1 {:+.2%}"}
"""What of a check of the collapse watch is shown."""


def log(run_dir: Path, *, last: int | None = None, json: bool = False, console: Console | None = None) -> None:
    """List what a run edited, when and with which health, newest last; also while it is running or after a crash.

    Args:
        run_dir: The run directory, or the folder of its versions (the newest is taken).
        last: Only so many of the newest commits and rejections.
        json: Print JSON instead of a table.
        console: Where to print; standard output by default.

    Raises:
        KeditError: There is no run, or a file of it cannot be read.
    """
    if last is not None and last < 1:
        msg = f"last: expected at least 1, got {last}"
        raise KeditError(msg)
    run = RunDirectory(newest(run_dir, "edits.jsonl"))
    rows = history(run, last)
    console = console or Console(highlight=False)
    if json:
        console.print(dumps(rows, indent=2, ensure_ascii=False), soft_wrap=True, markup=False)
        return
    console.print(_table(rows))
    console.print(Text(_summary(run)), soft_wrap=True)


def history(run: RunDirectory, last: int | None = None) -> list[Record]:
    """The commits and rejections of a run, oldest first.

    Args:
        run: The run.
        last: Only so many of the newest ones; the others' files are not opened.

    Returns:
        Records of ``commit`` (None where edits were rejected, for the reason in ``rejected``), ``edits`` (`sequence`,
        less what is measured), ``time`` (ISO 8601), ``seconds``, ``success`` (share of the edits; None until they are
        measured), ``delta`` (mean ‖δ‖/‖v₀‖ of the last stage that has one), ``update`` (‖Δ‖, by matrix), and
        ``health`` and ``checkpoint``, the lines of health.jsonl and checkpoints.jsonl that were written then.

    Raises:
        KeditError: There is no run, or a file of it cannot be read.
    """
    files = _commits(run)
    batches: dict[tuple[int | None, str | None], list[Record]] = {}
    done: int | None = None
    for line in sequence(run):
        if line.get("rejected") is None:
            done = line["commit"]
        batches.setdefault((done, line.get("rejected")), []).append(line)
    if not batches:
        msg = f"{run.path}: expected a run directory such as lightning_logs/edits/version_0, found no edits in it"
        raise KeditError(msg)
    shown = list(batches.items())[-last if last else 0 :]
    rows = [_row(key, lines, files) for key, lines in shown]
    begin = shown[0][1][0]["number"]
    for name, measured in (("health", run.health.records()), ("checkpoint", run.checkpoints.records())):
        for line in measured:
            ends = (row for row in rows if row["edits"][-1]["number"] + 1 >= line["edits"] > begin)
            if (row := next(ends, None)) is not None:
                row[name] = line
    return rows


def sequence(run: RunDirectory) -> list[Record]:
    """The lines of edits.jsonl, each with its ``number``, counted from 0, and the ``id`` that names it alone.

    The id is the case id, or ``@`` and the number where the case id comes several times. A commit that lost its lines
    in a crash has lines of ``case_id`` and ``commit`` besides.
    """
    lines = run.records()
    there = {line.get("commit") for line in lines}
    lines += [
        {"case_id": case, "commit": commit}
        for commit, file in _commits(run).items()
        if commit not in there
        for case in load_metadata(file)["case_ids"]
    ]
    times = Counter(line["case_id"] for line in lines)
    return [
        {"number": n, "id": f"@{n}" if times[line["case_id"]] > 1 else str(line["case_id"]), **line}
        for n, line in enumerate(lines)
    ]


def worked(record: Record) -> bool | None:
    """Whether an edit did what was asked: it is answered, or likelier than the former answer; None: not measured."""
    if "answer_after" not in record:
        return None
    return bool(says(record["answer_after"], record["target_new"])) or record.get("after", {}).get("efficacy") == 1


def _commits(run: RunDirectory) -> dict[int, Path]:
    return {int(file.stem): file for file in sorted(run.path.glob(COMMITS)) if file.stem.isdecimal()}


# ---------------------------------------------------------------------- rows


def _row(key: tuple[int | None, str | None], lines: Sequence[Record], files: dict[int, Path]) -> Record:
    commit, rejected = key
    file = None if rejected is not None or commit is None else files.get(commit)
    successes = [success for line in lines if (success := worked(line)) is not None]
    deltas = [norms[-1] for line in lines if (norms := list(_delta_norms(line)))]
    kept = ("number", "id", "case_id", "prompt", "subject", "target_new", "answer_before", "answer_after")
    return {
        "commit": None if rejected is not None else commit,
        "rejected": rejected,
        "edits": [{name: line[name] for name in kept if name in line} for line in lines],
        "time": _time(lines[-1].get("time"), file),
        "seconds": round(sum(seconds), 3) if (seconds := [s for line in lines if (s := line.get("seconds"))]) else None,
        "success": fmean(successes) if successes and rejected is None else None,
        "delta": fmean(deltas) if deltas else None,
        "update": load_metadata(file).get("norms", {}) if file is not None else {},
        "health": None,
        "checkpoint": None,
    }


def _delta_norms(line: Record) -> Iterator[float]:
    """‖δ‖/‖v₀‖ of each stage, the largest where a stage has several."""
    for stage in line.get("stages", ()):
        norms = [value for name, value in stage.items() if name.startswith("delta/")]
        if norms:
            yield max(norms)


def _time(recorded: float | str | None, file: Path | None) -> str | None:
    """When it was: as recorded, else when the commit's file was written."""
    if isinstance(recorded, str):
        return recorded
    seconds = file.stat().st_mtime if recorded is None and file is not None else recorded
    return None if seconds is None else datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


# ---------------------------------------------------------------------- the terminal


def _table(rows: Sequence[Record]) -> Table:
    """A line a commit; without the columns that nothing is known of."""
    found = Table(box=box.HORIZONTALS, title_justify="left", caption_justify="left")
    found.caption = "δ: ‖δ‖/‖v₀‖; Δ: ‖Δ‖ over all matrices"
    columns: dict[str, list[str | Text]] = {name: [] for name in COLUMNS}
    for row in rows:
        first, *more = row["edits"]
        updates = list(row["update"].values())
        cells = (
            "–" if row["commit"] is None else str(row["commit"]),
            first["id"] + (" …" if more else ""),
            _asked(first) + (f" and {len(more):,} more" if more else ""),
            (row["time"] or "–")[5:16].replace("T", " ") or "–",
            _number(row["seconds"], ".1f"),
            _share(row["success"], len(row["edits"])),
            _number(row["delta"], ".2f"),
            _number(math.hypot(*updates) if updates else None, ".3g"),
            _condition(row),
        )
        for column, one in zip(columns.values(), cells, strict=True):
            column.append(one)
    columns = {name: cells for name, cells in columns.items() if any(str(one) not in ("–", "") for one in cells)}
    for name in columns:
        wide = name in ("what", "health")
        found.add_column(name, justify="left" if wide else "right", overflow="fold", no_wrap=not wide)
    for line in zip(*columns.values(), strict=True):
        found.add_row(*line)
    return found


def _asked(edit: Record) -> str:
    return printable(f"{edit['subject']} → {edit['target_new']}") if "subject" in edit else "–"


def _condition(row: Record) -> Text:
    """Rejections, health and warnings in a few words."""
    if row["rejected"] is not None:
        return Text(f"rejected: {printable(row['rejected'])}", "red")
    health = row["health"] or {}
    known = {name: health.get(name) for name in ("retention", "perplexity")} | health.get("together", {})
    parts = [form.format(known[name]) for name, form in CONDITION.items() if known.get(name) is not None]
    warned = [printable(str(warning)) for warning in health.get("warnings", ())]
    return Text.assemble(", ".join(parts), "; " if parts and warned else "", ("; ".join(warned), "yellow"))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _share(value: float | None, edits: int) -> Text:
    if value is None:
        return Text("–")
    if edits == 1:
        return Text("✓", "green") if value else Text("✗", "red")
    return Text(f"{value:.0%}")


def _summary(run: RunDirectory) -> str:
    lines, commits = sequence(run), _commits(run)
    rejected = sum(line.get("rejected") is not None for line in lines)
    warned = next((line["edits"] for line in run.health.records() if line.get("warnings")), None)
    parts = [f"{run.path}: {count(len(lines) - rejected)} in {len(commits):,} commit{'s' * (len(commits) != 1)}"]
    parts += [f"{rejected} rejected"] if rejected else []
    parts += [] if warned is None else [f"warned after {warned}"]
    report = run.read_json("metrics.json")
    parts += ["not finished"] if report is None else ["stopped before its last edit"] if report.get("stopped") else []
    return ", ".join(parts)
