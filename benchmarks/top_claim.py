"""TOP's claim in miniature: relation specificity against what an edit reaches, over the settings of TOP and ROME.

    python -m benchmarks.top_claim
    python -m benchmarks.top_claim --edits 10 --seeds 0 --layers 2 --out /tmp/try/top_claim

Single edits of the almanac, 70 facts for each of three seeds; a seed chooses facts, new objects and context templates
(MEMIT's five prefixes: a quarter of the work of ROME's). Every setting is a point of a trade-off curve. Then five
relations of one subject, one edit after another. Runs that the CSV files hold are not repeated; the picture and the
tables of top_claim.md, below its line "## Tables", are made anew from them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import almanac_edits
from benchmarks.top_ground import METRICS, Ground, Row, Runs, harmonic, markdown, page, pooled, shown, summary, words
from kedit_lightning.almanac.lexicon import RELATIONS
from kedit_lightning.callbacks.logs import quiet
from kedit_lightning.edits import Edit
from kedit_lightning.models.progress import steps

SMALL = {"v_lr": 0.2, "v_weight_decay": 0.02}
"""Small steps with little decay, as in the almanac's README."""
LONG = {"ROME": {**SMALL, "v_num_grad_steps": 40}, "TOP": {**SMALL, "v_num_grad_steps2": 40, "vec_loss_factor": 0.06}}
SHARED: Sequence[dict[str, Any]] = (
    {},
    {"v_weight_decay": 0.1},
    {"v_weight_decay": 0.02},
    {"v_lr": 0.2},
    {"v_lr": 0.1},
    SMALL,
    {"clamp_norm_factor": 1},
    {"clamp_norm_factor": 0.5},
)
"""What both editors are given alike, over the published constants."""
GRID: Mapping[str, Sequence[dict[str, Any]]] = {
    "ROME": (
        *SHARED,
        {"v_num_grad_steps": 10},
        {"v_num_grad_steps": 5},
        LONG["ROME"],
        {**LONG["ROME"], "stop": 0.5},
        {**LONG["ROME"], "stop": 0.005},
    ),
    "TOP": (
        *SHARED,
        {"v_num_grad_steps1": 10, "v_num_grad_steps2": 10},
        LONG["TOP"],
        {**LONG["TOP"], "l_a": -4},
        {**LONG["TOP"], "stop1": 0.5},
        {**LONG["TOP"], "stop1": 0.005},
    ),
}
"""``l_a``: the layer, counted from the last (-1)."""
FEW = {name: [{}, {"v_weight_decay": 0.02}, LONG[name]] for name in GRID}
"""With --few, and on the layers beside the first."""
KINDS = {relation.id: relation.kind for relation in RELATIONS}
LONGEST = 5
"""Relations of one subject that are edited in sequence."""
LEVELS = (80, 90, 93, 95, 96, 97)
"""Of what an edit reaches, ES × GS in percent, at which the editors are compared."""


def sweep(
    ground: Ground, runs: Runs, base: str, layers: Sequence[int], seeds: Sequence[int], edits: int, *, few: bool
) -> None:
    """Every setting of every editor on the first layer, unless a few will do, then a few on the others."""
    grids = {layer: GRID if layer == layers[0] and not few else FEW for layer in layers}
    todo = [
        (seed, layer, name, changes)
        for layer, grid in grids.items()
        for seed in seeds
        for name, settings in grid.items()
        for changes in settings
    ]
    with steps("sweep") as step:
        for done, (seed, layer, name, changes) in enumerate(todo):
            which = {"base": base, "layer": layer, "editor": name, "settings": words(changes), "seed": seed}
            step(done, len(todo), f"{name}: {words(changes)}")
            if runs.of(**which):
                continue
            facts = facts_of(seed, edits)
            lines = ground.measured(name, facts, **ground.settings(layer, changes, seed))
            kinds = {
                kind: [line for line, edit in zip(lines, facts, strict=True) if kind_of(edit) == kind]
                for kind in KINDS.values()
            }
            runs.add([{**which, "kind": kind, **summary(mine)} for kind, mine in kinds.items() if mine])


def sequences(ground: Ground, runs: Runs, base: str, layer: int, seeds: Sequence[int], subjects: int) -> None:
    """Several relations of one subject, one edit after another."""
    for seed in seeds:
        for name in GRID:
            for changes in ({}, LONG[name]):
                which = {"base": base, "layer": layer, "editor": name, "settings": words(changes), "seed": seed}
                if runs.of(**which):
                    continue
                groups = groups_of(seed, subjects)
                found = ground.in_sequence(name, groups, **ground.settings(layer, changes, seed))
                runs.add([{**which, "relations": j, **summary(lines)} for j, lines in enumerate(found, 1)])


def facts_of(seed: int, n: int) -> list[Edit]:
    """Facts of n subjects."""
    return almanac_edits(0, n, options={"seed": seed}).edits


def groups_of(seed: int, subjects: int) -> list[list[Edit]]:
    """`LONGEST` facts each of some people."""
    edits = almanac_edits(0, 8 * subjects * LONGEST, options={"seed": seed, "facts_per_subject": LONGEST}).edits
    groups = [list(group) for _, group in groupby(edits, lambda edit: edit.subject)]
    return [group for group in groups if len(group) == LONGEST][:subjects]


def kind_of(edit: Edit) -> str:
    """Whether its subject is a person, with seven relations, or a place, with four."""
    return KINDS[str(edit.relation_id)]


# ---------------------------------------------------------------------- what they say


Points = Mapping[str, Sequence[Row]]
"""By editor a point a setting: its runs."""


def points(rows: Sequence[Row]) -> list[Row]:
    """A point a setting: means with intervals over all edits, and what it reaches, ES × GS."""
    found = []
    keys = lambda row: (row["layer"], row["editor"], row["settings"])  # noqa: E731
    for (layer, editor, settings), group in groupby(sorted(rows, key=keys), keys):
        runs = list(group)
        point: Row = {name: pooled(runs, name) for name in METRICS}
        point |= {"layer": layer, "editor": editor, "settings": settings, "edits": sum(int(r["edits"]) for r in runs)}
        point["reached"] = point["ES"][0] * point["GS"][0] / 100
        point["reached exact"] = point["ES exact"][0] * point["GS exact"][0] / 100
        point["Score4"] = harmonic([point[name][0] for name in ("ES", "GS", "S-spec", "R-spec")])
        found.append(point)
    return found


def best(found: Sequence[Row], reached: str, specificity: str, least: float) -> Row | None:
    """The point of highest specificity among those that reach so much."""
    able = [point for point in found if point[reached] >= least]
    return max(able, key=lambda point: point[specificity][0]) if able else None


def frontier(rows: Sequence[Row], reached: str, specificity: str) -> list[list[str]]:
    """Best setting of either editor at each level: chosen on the first seed, measured on the others."""
    first = min(row["seed"] for row in rows)
    chosen_on, others = (points([row for row in rows if (row["seed"] == first) == it]) for it in (True, False))
    lines = []
    for level in LEVELS:
        cells, pair = [f"{level}"], []
        for editor in GRID:
            point = best([one for one in chosen_on if one["editor"] == editor], reached, specificity, level)
            again = [o for o in others if point and (o["editor"], o["settings"]) == (editor, point["settings"])]
            pair += again
            cells += (
                [again[0]["settings"], f"{again[0][reached]:.1f}", shown(again[0][specificity])]
                if again
                else ["none"] * 3
            )
        if len(pair) == 2:
            rome, top = (point[specificity] for point in pair)
            cells.append(shown((top[0] - rome[0], (top[1] ** 2 + rome[1] ** 2) ** 0.5)))
        lines.append(cells)
    return lines


def matched(found: Sequence[Row]) -> tuple[int, int, int, float]:
    """The settings that both are given alike: how many, TOP above beyond the intervals, below, the median gap."""
    rome, top = ({p["settings"]: p["R-spec"] for p in found if p["editor"] == name} for name in GRID)
    alike = [(top[one], rome[one]) for one in map(words, SHARED) if one in top and one in rome]
    gaps = [t[0] - r[0] for t, r in alike]
    clear = [t[0] - r[0] > (t[1] ** 2 + r[1] ** 2) ** 0.5 for t, r in alike]
    return (
        len(alike),
        sum(clear),
        sum(gap < 0 for gap in gaps),
        float(torch.tensor(gaps).median()) if gaps else float("nan"),
    )


def tables(rows: Sequence[Row], sequence: Sequence[Row]) -> list[str]:
    """All tables."""
    columns = (*METRICS, "Score4")
    found = points(rows)
    lines = [
        [p["layer"], p["editor"], p["settings"], str(p["edits"]), f"{p['reached']:.1f}"]
        + [shown(p[name]) if name in METRICS else f"{p[name]:.1f}" for name in columns]
        for p in map(lambda p: {**p, "layer": str(p["layer"])}, found)
    ]
    first = str(rows[0]["layer"])
    main = [row for row in rows if str(row["layer"]) == first]
    head = ["level", *(f"{editor}{what}" for editor in GRID for what in (": setting", " reaches", "")), "TOP − ROME"]
    parts = [
        "### Best settings at each level of ES × GS, R-specificity",
        markdown(head, frontier(main, "reached", "R-spec")),
        "### The same, strictly: exact ES × GS, answers unchanged",
        markdown(head, frontier(main, "reached exact", "unchanged")),
        "### Settings that both editors are given alike",
    ]
    variants = {}
    for layer in dict.fromkeys(str(row["layer"]) for row in rows):
        for kind, relations in (("person", 7), ("place", 4)):
            mine = [row for row in rows if str(row["layer"]) == layer and row["kind"] == kind]
            variants[layer, kind, relations] = points(mine)
    head = [
        "layer",
        "subjects",
        "relations",
        "settings alike",
        "TOP above beyond intervals",
        "TOP below",
        "median TOP − ROME",
    ]
    head += ["best ROME at ES × GS ≥ 90", "best TOP"]
    cells = []
    for (layer, kind, relations), mine in variants.items():
        n, clear, below, gap = matched(mine)
        tops = [best([p for p in mine if p["editor"] == name], "reached", "R-spec", 90) for name in GRID]
        texts = [f"{shown(p['R-spec'])} ({p['settings']})" if p else "none" for p in tops]
        cells.append([layer, kind, str(relations), str(n), str(clear), str(below), f"{gap:.1f}", *texts])
    parts.append(markdown(head, cells))
    if sequence:
        keys = lambda row: (row["editor"], row["settings"], int(row["relations"]))  # noqa: E731
        lines5 = [
            [
                editor,
                settings,
                str(j),
                *(shown(pooled(list(group), name)) for name in ("ES", "GS", "S-spec", "R-spec", "unchanged")),
            ]
            for (editor, settings, j), rows_ in groupby(sorted(sequence, key=keys), keys)
            for group in [list(rows_)]
        ]
        parts += [
            "### Several relations of one subject, after each edit",
            markdown(["editor", "settings", "edits so far", "ES", "GS", "S-spec", "R-spec", "unchanged"], lines5),
        ]
    return [*parts, "### All settings", markdown(["layer", "editor", "settings", "edits", "ES × GS", *columns], lines)]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Both trade-offs of the first layer, a point a setting, and each editor's frontier."""
    from matplotlib import rc_context

    from kedit_lightning.callbacks.figures import SCORES, STYLE, blank, headline

    found = points([row for row in rows if str(row["layer"]) == str(rows[0]["layer"])])
    panels = (("reached", "R-spec", "R-specificity"), ("reached exact", "unchanged", "other answers unchanged"))
    with rc_context(STYLE):
        figure = blank(11, 4.6)
        for axis, (reached, specificity, label) in zip(figure.subplots(1, 2), panels, strict=True):
            for editor, colour, marker in zip(GRID, (SCORES[2], SCORES[0]), "so", strict=True):
                mine = sorted((p for p in found if p["editor"] == editor), key=lambda p: p[reached])
                x, pairs = [p[reached] for p in mine], [p[specificity] for p in mine]
                y, bars = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
                axis.errorbar(
                    x, y, yerr=bars, fmt=marker, color=colour, alpha=0.75, label=editor, capsize=2, markersize=5
                )
                upper = [max(y[i:]) for i in range(len(y))]
                axis.step(x, upper, where="pre", color=colour, linewidth=1)
            axis.set_xlabel("efficacy × generalization, %" + (" (exact)" if "exact" in reached else ""))
            axis.set_ylabel(f"{label}, %")
            axis.grid(visible=True)
            axis.legend(loc="lower left")
        headline(figure, "What an edit reaches, and what it leaves alone in the subject's other relations")
        figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs that are missing; draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="almanac", help="the almanac, or a folder with a model of the same world")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 0, 1, 3], help="all settings on the first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--edits", type=int, default=70, help="of a seed")
    parser.add_argument("--subjects", type=int, default=14, help="of a seed, edited in sequence")
    parser.add_argument("--few", action="store_true", help="a few settings on the first layer too")
    parser.add_argument("--only", choices=("sweep", "sequence", "tables"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    args = parser.parse_args(arguments)
    quiet()
    torch.set_num_threads(1)
    runs, sequence = Runs(args.out.with_suffix(".csv")), Runs(args.out.with_name(f"{args.out.name}_sequence.csv"))
    if args.only != "tables":
        ground = Ground(args.base)
        if args.only != "sequence":
            sweep(ground, runs, args.base, args.layers, args.seeds, args.edits, few=args.few)
        if args.only != "sweep":
            sequences(ground, sequence, args.base, args.layers[0], args.seeds, args.subjects)
    if runs.rows:
        draw(runs.rows, args.out.with_suffix(".png"))
        page(args.out.with_suffix(".md"), tables(runs.rows, sequence.rows))


if __name__ == "__main__":
    main()
