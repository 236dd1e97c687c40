"""What the runs of top_claim.py say: the tables of its page, and its picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.top_ground import FOUR, METRICS, Row, harmonic, markdown, pooled, shown

EDITORS = ("ROME", "TOP")
LEVELS = (60, 80, 85, 90, 93, 95, 96, 97)
"""Of what an edit reaches, in percent, at which the editors are compared."""
PANELS = (("reached", "R-spec", "R-specificity"), ("reached exact", "unchanged", "other answers unchanged"))
"""Pairwise, as the papers measure, and strictly, by the likeliest answer."""
KINDS = (("person", 7), ("place", 4))
"""Subjects, and how many relations they have."""


def grouped(rows: Sequence[Row], *names: str) -> Iterator[tuple[tuple[str, ...], list[Row]]]:
    """Rows by what they have in common, in the order in which it first comes."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(str(row[name]) for name in names), []).append(row)
    yield from found.items()


def points(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A point a setting: means with intervals over the edits of all seeds, and what is reached, ES × GS."""
    found = []
    for (layer, editor, settings), runs in grouped(rows, "layer", "editor", "settings"):
        point: dict[str, Any] = {name: pooled(runs, name) for name in METRICS}
        point |= {"layer": layer, "editor": editor, "settings": settings, "edits": sum(int(r["edits"]) for r in runs)}
        point["reached"] = point["ES"][0] * point["GS"][0] / 100
        point["reached exact"] = point["ES exact"][0] * point["GS exact"][0] / 100
        point["Score4"] = harmonic([point[name][0] for name in FOUR])
        found.append(point)
    return found


def comparable(rows: Sequence[Row]) -> list[Row]:
    """Those of the layer that comes first, on the seeds that all of its settings have: points of the same facts."""
    mine = [row for row in rows if str(row["layer"]) == str(rows[0]["layer"])]
    seeds = [{str(row["seed"]) for row in runs} for _, runs in grouped(mine, "editor", "settings")]
    return [row for row in mine if str(row["seed"]) in set.intersection(*seeds)]


def best(
    found: Sequence[dict[str, Any]], editor: str, reached: str, specificity: str, least: float
) -> dict[str, Any] | None:
    """An editor's point of highest specificity among those that reach so much."""
    able = [point for point in found if point["editor"] == editor and point[reached] >= least]
    return max(able, key=lambda point: point[specificity][0]) if able else None


def frontier(found: Sequence[dict[str, Any]], reached: str, specificity: str) -> str:
    """The best setting of either editor at each level."""
    lines = []
    for level in LEVELS:
        two = [best(found, editor, reached, specificity, level) for editor in EDITORS]
        cells = [str(level)]
        for point in two:
            cells += (
                [point["settings"], f"{point[reached]:.1f}", shown(point[specificity]), str(point["edits"])]
                if point
                else ["none", "", "", ""]
            )
        if two[0] and two[1]:
            rome, top = (point[specificity] for point in two if point)
            cells.append(shown((top[0] - rome[0], (top[1] ** 2 + rome[1] ** 2) ** 0.5)))
        lines.append(cells)
    return markdown(
        ["at least", *(f"{e}{what}" for e in EDITORS for what in (" setting", " reaches", "", " edits")), "TOP − ROME"],
        lines,
    )


def alike(found: Sequence[dict[str, Any]], shared: Sequence[str]) -> list[str]:
    """Settings that both editors are given alike: how many, TOP above beyond the intervals, below, the median gap."""
    by = {(point["editor"], point["settings"]): point["R-spec"] for point in found}
    pairs = [(by["TOP", one], by["ROME", one]) for one in shared if {("TOP", one), ("ROME", one)} <= by.keys()]
    gaps = [top[0] - rome[0] for top, rome in pairs]
    clear = sum(top[0] - rome[0] > (top[1] ** 2 + rome[1] ** 2) ** 0.5 for top, rome in pairs)
    middle = f"{median(gaps):.1f}" if gaps else "none"
    return [str(len(gaps)), str(clear), str(sum(gap < 0 for gap in gaps)), middle]


def tables(rows: Sequence[Row], pairs: Sequence[Row], sequence: Sequence[Row], shared: Sequence[str]) -> list[str]:
    """All tables; the frontiers are of runs that compare."""
    main = points(comparable(rows))
    parts = []
    for (reached, specificity, label), how in zip(PANELS, ("pairwise", "exact"), strict=True):
        parts += [f"### Best {label} at each level of ES × GS, {how}", frontier(main, reached, specificity)]
    if pairs:
        lines = [
            [*one, str(sum(int(row["edits"]) for row in mine)), *(shown(pooled(mine, name)) for name in METRICS)]
            for one, mine in grouped(pairs, "settings")
        ]
        parts += [
            "### TOP less ROME on the same facts, paired",
            markdown(["settings of ROME", "edits", *METRICS], lines),
        ]
    lines = []
    for place, kind_rows in grouped(rows, "layer"):
        for kind, relations in KINDS:
            found = points([row for row in comparable(kind_rows) if row["kind"] == kind])
            tops = [best(found, editor, "reached", "R-spec", 90) for editor in EDITORS]
            texts = [f"{shown(one['R-spec'])} ({one['settings']})" if one else "none" for one in tops]
            lines.append([*place, kind, str(relations), *alike(found, shared), *texts])
    head = ["layer", "subjects", "relations", "settings alike", "TOP above", "TOP below", "median TOP − ROME"]
    parts += ["### Variants: settings that both are given alike, and the best of either at ES × GS ≥ 90"]
    parts += [markdown([*head, *(f"best {editor}" for editor in EDITORS)], lines)]
    if sequence:
        columns = (*FOUR, "unchanged")
        ordered = sorted(sequence, key=lambda row: (row["editor"], row["settings"], int(row["relations"])))
        lines = [
            [*which, *(shown(pooled(mine, name)) for name in columns)]
            for which, mine in grouped(ordered, "editor", "settings", "relations")
        ]
        head = ["editor", "settings", "edits so far", *columns]
        parts += ["### Several relations of one subject: all edits so far, after each", markdown(head, lines)]
    columns = (*METRICS, "Score4")
    lines = [
        [
            p["layer"],
            p["editor"],
            p["settings"],
            str(p["edits"]),
            *(shown(p[name]) for name in METRICS),
            f"{p['Score4']:.1f}",
        ]
        for p in points(rows)
    ]
    return [*parts, "### All settings", markdown(["layer", "editor", "settings", "edits", *columns], lines)]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Both trade-offs, a point a setting of those that reach something, and each editor's frontier."""
    from matplotlib import rc_context

    from kedit_lightning.callbacks.figures import SCORES, STYLE, blank, headline

    found = points(comparable(rows))
    with rc_context(STYLE):
        figure = blank(11, 4.6)
        for axis, (reached, specificity, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
            for editor, colour, marker in zip(EDITORS, (SCORES[2], SCORES[0]), "so", strict=True):
                mine = sorted((p for p in found if p["editor"] == editor), key=lambda p: float(p[reached]))
                x, (y, bars) = [p[reached] for p in mine], zip(*(p[specificity] for p in mine), strict=True)
                axis.errorbar(
                    x, y, yerr=bars, fmt=marker, color=colour, alpha=0.75, label=editor, capsize=2, markersize=5
                )
                axis.step(x, [max(y[i:]) for i in range(len(y))], where="pre", color=colour, linewidth=1)
            axis.set_xlabel(
                "efficacy × generalization, %" + (" (the new answer is the likeliest)" if "exact" in reached else "")
            )
            axis.set_ylabel(f"{label}, %")
            axis.set_xlim(60, 101)
            axis.grid(visible=True)
            axis.legend(loc="lower left")
        headline(figure, "What an edit reaches, and what it leaves of the subject's other relations")
        figure.savefig(path, dpi=150)
