"""Results as the terminal and `kedit show` print them: a table before and after, a line an edit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

Report = dict[str, Any]
"""What metrics.json holds."""

LABELS = {
    "efficacy": "Efficacy: the edited prompt",
    "efficacy_accuracy": "Efficacy: tokens answered",
    "efficacy_generated": "Efficacy: written freely",
    "generalization": "Generalization: its paraphrases",
    "generalization_accuracy": "Generalization: tokens answered",
    "s_specificity": "S-specificity: other subjects",
    "s_specificity_accuracy": "S-specificity: tokens answered",
    "r_specificity": "R-specificity: its other relations",
    "r_specificity_unchanged": "R-specificity: answer unchanged",
    "score3": "Score of three (no R-specificity)",
    "score3_accuracy": "Score of three (accuracies)",
    "score4": "Score of all four",
    "fluency": "Fluency: n-gram entropy",
    "consistency": "Consistency: with reference texts",
}
"""Metrics of the table, in its order and in plain words."""

TEXTS = ("fluency", "consistency")

STREAM = ("name", "batch_size", "restore_every", "torch")
"""What the protocol says about the edits; a base model's numbers do not depend on it."""

NAMES = ("name", "scores", "eac")
"""What the protocol says in words; the other entries say it in full."""

HARDLY_WRITTEN = 0.5
"""Share of a value's change, ``residual / delta``, that is missing where an edit counts as hardly written."""

LABEL_WIDTH, COLUMN_WIDTH, MEAN_WIDTH = 26, 16, 9
"""Columns of the terminal that the names of the metrics take at least, a number with its interval, and one without."""

MIN_WIDTH = 76
"""Narrower terminals get means without their intervals."""


def shown(summaries: Sequence[Report]) -> list[str]:
    """Names of the metrics worth a row: those reported, accuracies only where there is no comparison (zsRE)."""
    there = {name for summary in summaries for name in summary}
    return [name for name in LABELS if name in there and name.removesuffix("_accuracy") not in there - {name}]


def table(reports: Sequence[tuple[str, Report]], width: int = 100) -> Table:
    """Metrics × 100 with the half-width of their 95 % interval.

    Args:
        reports: Name and report of each run. One run has the columns before, after and change; of several, each has a
            column, beside one for the raw model, which all share if `same_raw`, else each its own.
        width: Columns of the terminal; where they are few, the intervals are left out.
    """
    pre, post = ([(name, report[when]) for name, report in reports if when in report] for when in ("pre", "post"))
    if len(reports) == 1:
        columns = [("before", summary) for _, summary in pre] + [("after", summary) for _, summary in post]
    elif same_raw(reports):
        columns = [("raw", summary) for _, summary in pre[:1]] + post
    else:
        columns = []
        for name, report in reports:
            columns += [(f"{name} raw", report["pre"])] if "pre" in report else []
            columns += [(name, report["post"])] if "post" in report else []
    change = len(reports) == 1 and len(columns) == 2
    intervals = width >= max(MIN_WIDTH, LABEL_WIDTH + COLUMN_WIDTH * len(columns))
    found = Table(title=title(reports), title_justify="left", caption_justify="left", box=box.HORIZONTALS)
    found.caption = "× 100" + (", ± 95 % interval" if intervals else "")
    found.add_column("", overflow="fold", min_width=14)
    for name, _ in columns:
        found.add_column(name, justify="right", no_wrap=intervals)
    if change:
        found.add_column("change", justify="right")
    rows = shown([summary for _, summary in columns])
    for name in rows:
        cells: list[str | Text] = [cell(summary.get(name), intervals) for _, summary in columns]
        if change:
            cells.append(_change(*(summary.get(name) for _, summary in columns)))
        found.add_row(LABELS[name], *cells)
        found.rows[-1].end_section = _ends_section(name, rows)
    return found


def side_by_side(reports: Sequence[tuple[str, Report]], width: int) -> Iterator[Sequence[tuple[str, Report]]]:
    """The reports in groups of as many as a table of this width has room for, without intervals where need be.

    >>> runs = [(name, {"protocol": {}, "edits": edits, "pre": {}}) for name, edits in (("a", 1), ("b", 1), ("c", 1))]
    >>> [len(group) for group in side_by_side(runs, 50)], [len(group) for group in side_by_side(runs, 80)]
    ([1, 1, 1], [3])
    >>> runs[2] = ("c", {"protocol": {}, "edits": 2, "pre": {}})
    >>> [len(group) for group in side_by_side(runs, 50)], [len(group) for group in side_by_side(runs, 80)]
    ([1, 1, 1], [3])
    """
    places, shared = (width - LABEL_WIDTH) // MEAN_WIDTH, same_raw(reports)
    n = max(1, places - 1 if shared else places // 2)
    for start in range(0, len(reports), n):
        yield reports[start : start + n]


def title(reports: Sequence[tuple[str, Report]]) -> str:
    """Name and number of edits of each run, and the protocol where they share it."""
    how = {report["protocol"].get("name", "") for _, report in reports}
    shared = f": {how.pop()}" if len(how) == 1 and "" not in how else ""
    if len(reports) > 1 and len({report["edits"] for _, report in reports}) == 1:
        return f"{reports[0][1]['edits']:,} edits{shared}"
    return "; ".join(f"{name}, {count(report['edits'])}" for name, report in reports) + shared


def count(n: int) -> str:
    """The number of edits in words: ``1 edit``, ``2,000 edits``."""
    return f"{n:,} edit" + "s" * (n != 1)


def cell(summary: Report | None, interval: bool = True) -> str:
    """A metric's mean × 100 and, where it is known, its interval: ``99.5 ± 1.0``.

    >>> cell({"mean": 0.995, "ci95": 0.01}), cell({"mean": 0.5}), cell(None)
    ('99.5 ±  1.0', '50.0       ', '–')
    """
    if summary is None or math.isnan(summary.get("mean", math.nan)):
        return "–"
    mean = f"{100 * summary['mean']:.1f}"
    if not interval:
        return mean
    ci95 = summary.get("ci95", math.nan) if summary.get("n", 2) > 1 else math.nan
    return mean + (" " * 7 if math.isnan(ci95) else f" ± {100 * ci95:4.1f}")


def same_raw(reports: Sequence[tuple[str, Report]]) -> bool:
    """Whether the runs measured the same unedited model on the same edits in the same way."""
    raw = [
        ({k: v for k, v in report["protocol"].items() if k not in STREAM}, report["edits"], report["pre"])
        for _, report in reports
        if "pre" in report
    ]
    return all(each == raw[0] for each in raw)


def differences(reports: Sequence[tuple[str, Report]]) -> str:
    """One sentence on where the protocols differ; empty where they do not."""
    protocols = [report["protocol"] for _, report in reports]
    every = {key: None for protocol in protocols for key in protocol if key not in NAMES}
    if keys := [key for key in every if any(p.get(key) != protocols[0].get(key) for p in protocols)]:
        parts = (f"{k} ({', '.join(_value(p.get(k)) for p in protocols)})" for k in keys)
        return f"The protocols differ, so the numbers do not compare as they stand: {'; '.join(parts)}."
    return "" if same_raw(reports) else "The runs are of different edits: there is no common raw model."


def edit_line(record: Report, said: bool) -> Text:
    """✓ or ✗, what was asked, the answers before and after, and what was wanted.

    Args:
        record: A line of edits.jsonl.
        said: Whether the answer after is the one wanted; an edit also worked if that one is likelier than the former.
    """
    worked = said or record["after"].get("efficacy") == 1
    return Text.assemble(
        ("✓ ", "bold green") if worked else ("✗ ", "bold red"),
        question := asked(record),
        " " if question.plain.endswith(":") else ": ",
        (quoted(record["answer_before"]), "dim"),
        " → ",
        (quoted(record["answer_after"]), "green" if said else "yellow" if worked else "red"),
        (f", wanted {quoted(record['target_new'])}", "dim"),
        f" (likelier now than {quoted(record['target_true'])})" if worked and not said else "",
        f"; {why}" if not worked and (why := failure(record)) else "",
    )


def failure(record: Report) -> str:
    """Why an edit did not work, as far as its line of edits.jsonl tells; empty where it does not.

    >>> failure({"stages": [{"stage": "v", "steps": 25, "converged": False, "nll": 3.2}]})
    'its values were not found (stage v: nll 3.2 after 25 steps)'
    >>> failure({"stages": [{"stage": "z", "converged": True, "delta/block": 0.8, "residual/block": 0.6}]})
    'its values were found and hardly written (about 75% of the change is missing)'
    """
    stages = record.get("stages", [])
    for stage in stages:
        if not stage.get("converged", True):
            nll = f"nll {stage['nll']:.2g} " if "nll" in stage else ""
            return f"its values were not found (stage {stage['stage']}: {nll}after {stage['steps']} steps)"
    missing = [
        left / stage[name.replace("residual", "delta")]
        for stage in stages
        for name, left in stage.items()
        if name.startswith("residual/") and stage.get(name.replace("residual", "delta"))
    ]
    if missing and max(missing) > HARDLY_WRITTEN:
        return f"its values were found and hardly written (about {min(max(missing), 1):.0%} of the change is missing)"
    return ""


def asked(record: Report) -> Text:
    """The edited prompt of a line of edits.jsonl, its subject in bold."""
    start, _, end = record["prompt"].partition("{}")
    return Text.assemble(printable(start), (printable(record["subject"]), "bold"), printable(end))


def quoted(text: str) -> str:
    """A model's text in quotation marks, on one line."""
    return f"“{printable(text).strip()}”"


def printable(text: str) -> str:
    """One line without control characters."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text)


def _change(before: Report | None, after: Report | None) -> Text:
    if before is None or after is None:
        return Text("–")
    change = round(100 * (after["mean"] - before["mean"]), 1) + 0.0
    return Text("0.0") if change == 0 else Text(f"{change:+.1f}", "green" if change > 0 else "red")


def _ends_section(name: str, rows: Sequence[str]) -> bool:
    """Whether the next row begins the scores or the texts."""
    here, *below = ("score" in row or 2 * (row in TEXTS) for row in rows[rows.index(name) :][:2])
    return below not in ([], [here])


def _value(value: object) -> str:
    return "none" if value is None else str(value)
