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
from benchmarks.top_claim_tables import draw, tables
from benchmarks.top_ground import METRICS, Ground, Row, Runs, page, summary, words
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
        {"kl_factor": 1},
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
        {"stop1_probability": 0.99},
    ),
}
"""``l_a``: the layer, counted from the last (-1)."""
FEW = {name: [{}, {"v_weight_decay": 0.02}, LONG[name]] for name in GRID}
"""Pairs of which both editors are given the same facts, and what is run on the layers beside the first."""
KINDS = {relation.id: relation.kind for relation in RELATIONS}
OFFSET = 5
"""l_a above the edited layer, as published for GPT-J; the last layer where there are fewer."""
LONGEST = 5
"""Relations of one subject that are edited in sequence."""


def sweep(ground: Ground, runs: Runs, base: str, layers: Sequence[int], seeds: Sequence[int], edits: int) -> None:
    """Every setting of every editor on the first layer, then a few on the others."""
    grids = {layer: GRID if layer == layers[0] else FEW for layer in layers}
    todo = [
        (seed, layer, name, changes)
        for layer, grid in grids.items()
        for seed in seeds
        for name, settings in grid.items()
        for changes in settings
    ]
    with steps("sweep") as step:
        for done, (seed, layer, name, changes) in enumerate(todo):
            step(done, len(todo), f"{name}: {words(changes)}")
            if not runs.of(**point_of(base, layer, name, changes, seed)):
                point(ground, runs, base, layer, name, changes, seed, edits)


def point_of(base: str, layer: int, name: str, changes: Mapping[str, Any], seed: int) -> Row:
    """What says which run it is."""
    return {"base": base, "layer": layer, "editor": name, "settings": words(changes), "seed": seed}


def point(
    ground: Ground, runs: Runs, base: str, layer: int, name: str, changes: Mapping[str, Any], seed: int, edits: int
) -> list[dict[str, float]]:
    """One run: each edit's metrics. It is kept, if it was not before."""
    facts, which = facts_of(seed, edits), point_of(base, layer, name, changes, seed)
    last = {"l_a": -1} if name == "TOP" and layer + OFFSET >= ground.base.num_layers else {}
    lines = ground.measured(name, facts, **ground.settings(layer, {**last, **changes}, seed))
    kinds = {
        kind: [line for line, edit in zip(lines, facts, strict=True) if kind_of(edit) == kind]
        for kind in KINDS.values()
    }
    if not runs.of(**which):
        runs.add([{**which, "kind": kind, **summary(mine)} for kind, mine in kinds.items() if mine])
    return lines


def duels(ground: Ground, runs: Runs, pairs: Runs, base: str, layer: int, seeds: Sequence[int], edits: int) -> None:
    """TOP less ROME on the same facts, edit by edit, under a few pairs of settings."""
    for seed in seeds:
        for changes in zip(*FEW.values(), strict=True):
            which = {"base": base, "layer": layer, "settings": words(changes[0]), "seed": seed}
            if not pairs.of(**which):
                both = zip(FEW, changes, strict=True)
                rome, top = (point(ground, runs, base, layer, name, own, seed, edits) for name, own in both)
                lines = [{m: t[m] - r[m] for m in METRICS.values() if m in r} for t, r in zip(top, rome, strict=True)]
                pairs.add([{**which, **summary(lines)}])


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs that are missing; draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="almanac", help="the almanac, or a folder with a model of the same world")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 0, 1, 3], help="all settings on the first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--edits", type=int, default=70, help="of a seed")
    parser.add_argument("--subjects", type=int, default=14, help="of a seed, edited in sequence")
    parser.add_argument("--only", choices=("sweep", "duels", "sequence", "tables"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    args = parser.parse_args(arguments)
    quiet()
    torch.set_num_threads(1)
    runs, pairs, sequence = (
        Runs(args.out.with_name(f"{args.out.name}{tail}.csv")) for tail in ("", "_pairs", "_sequence")
    )
    if args.only != "tables":
        ground = Ground(args.base)
        if args.only in ("duels", None):
            duels(ground, runs, pairs, args.base, args.layers[0], args.seeds, args.edits)
        if args.only in ("sweep", None):
            sweep(ground, runs, args.base, args.layers, args.seeds, args.edits)
        if args.only in ("sequence", None):
            sequences(ground, sequence, args.base, args.layers[0], args.seeds, args.subjects)
    if runs.rows:
        draw(runs.rows, args.out.with_suffix(".png"))
        page(args.out.with_suffix(".md"), tables(runs.rows, pairs.rows, sequence.rows, [*map(words, SHARED)]))


if __name__ == "__main__":
    main()
