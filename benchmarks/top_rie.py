"""TOP's Figs. 3 and 7 on the almanac, many times over: does an edit make the subject's last token weigh more?

    python -m benchmarks.top_rie
    python -m benchmarks.top_rie --edits 4 --seeds 0 --layers 2 --out /tmp/try/top_rie

RIE of MLP outputs (`kedit probe --probe RelativeIndirectEffect`, windows of three layers) for ROME, MEMIT, and TOP at
several l_a, over edited layers, two levels of noise and three seeds: a seed chooses facts, new objects and context
templates. Runs that the CSV file holds are not repeated; tables stand below the page's line "## Tables".
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import almanac_edits
from benchmarks.top_claim import LONG, facts_of
from benchmarks.top_ground import Ground, Row, Runs, markdown, page, pooled, words
from kedit_lightning.callbacks.logs import quiet
from kedit_lightning.edits import Edit
from kedit_lightning.models.progress import steps
from kedit_lightning.probes.base import Study
from kedit_lightning.probes.indirect_effect import effects_of, largest, ratios
from kedit_lightning.probes.token_classes import CLASSES
from kedit_lightning.probes.tracing import Kind, Tracer, by_class, noise_level, of_edited, of_original

KIND: Kind = ("mlp", 3)
COPIES, FLOOR = 10, 1e-4
"""As the probe's defaults."""
NOISES = (3.0, 1.0)
"""In deviations of the subjects' embeddings: ROME's, and one that leaves more of the answer."""
MEMIT_LAYERS = "0 to 3"
"""As shipped."""
LS, LR = (list(CLASSES).index(name) for name in ("ls", "lr"))
COLUMNS = ("IE ls", "IE lr", "edited IE ls", "edited IE lr", "RIE ls", "RIE lr", "gap", "gap of maxima")
"""Of a prompt: its largest indirect effects at the last subject and the last relation token, before and after; TOP's
RIE of both; and how much more the subject's token has, of RIE, and of the ratio of the largest effects."""


Effects = tuple[list[str], dict[Kind, Tensor]]
"""The class of every token, and its indirect effects, as `effects_of` gives them."""


class Traced:
    """Traces facts before and after edits.

    Args:
        ground: The model.
    """

    def __init__(self, ground: Ground) -> None:
        self.ground, self.subjects = ground, almanac_edits(0, 1).subjects
        levels = [noise_level(ground.base, self.subjects, noise) for noise in NOISES]
        self.tracers = [Tracer(ground.base, level, COPIES, [KIND]) for level in levels]
        self.before: dict[int, list[tuple[Edit, list[Effects]]]] = {}

    def __call__(self, name: str, seed: int, n: int, settings: Mapping[str, Any]) -> list[Tensor]:
        """The `COLUMNS` of n facts' prompts under an editor, without those that lack one; a matrix for each noise."""
        facts = facts_of(seed, n)
        found: list[list[Tensor]] = [[] for _ in NOISES]
        with self.ground.singles(name, facts, **settings) as singles:
            study = Study(singles.editor, facts, singles, self.subjects)
            if seed not in self.before:
                asked, _ = of_original(study, n, 0)
                self.before[seed] = [(one.edit, [effects_of(tracer, one) for tracer in self.tracers]) for one in asked]
            edits, before = zip(*self.before[seed], strict=True)
            for old, one in zip(before, of_edited(study, edits), strict=True):
                if one:
                    for lines, tracer, effects in zip(found, self.tracers, old, strict=True):
                        lines.append(measured(effects, effects_of(tracer, one)))
        stacked = [torch.stack(lines) for lines in found]
        return [lines[~lines.isnan().any(dim=1)] for lines in stacked]


def measured(before: Effects, after: Effects) -> Tensor:
    """The `COLUMNS` of a prompt; nan: there is no such token, or nothing defined."""
    (classes, old), (_, new) = before, after
    rie = by_class(largest(ratios(old[KIND], new[KIND], FLOOR)), classes)
    most = largest(old[KIND]), largest(new[KIND])
    first, then, maxima = (by_class(each, classes) for each in (*most, ratios(*most, FLOOR)))
    pairs = torch.cat([each[[LS, LR]] for each in (first, then, rie)])
    return torch.cat([pairs, torch.stack([rie[LS] - rie[LR], maxima[LS] - maxima[LR]])])


def variants(layer: int, layers: int, *, every: bool) -> list[tuple[str, dict[str, Any]]]:
    """What edits a layer: ROME, and TOP at every l_a above it or only in the middle and at the last layer (-1)."""
    above = [place - layers for place in range(layer + 1, layers)]
    found: list[tuple[str, dict[str, Any]]] = [("ROME", {}), ("ROME", LONG["ROME"])]
    if not above:  # of the last layer
        return found
    l_as = above if every else [above[(len(above) - 1) // 2], -1]
    return [*found, *[("TOP", {"l_a": l_a}) for l_a in l_as], ("TOP", LONG["TOP"])]


def sweep(ground: Ground, runs: Runs, base: str, layers: Sequence[int], seeds: Sequence[int], edits: int) -> None:
    """All runs that are missing."""
    deep = ground.base.num_layers
    todo = [
        (seed, str(layer), *each)
        for seed in seeds
        for layer in layers
        for each in variants(layer, deep, every=layer == layers[0])
    ]
    todo += [(seed, MEMIT_LAYERS, "MEMIT", {}) for seed in seeds]
    traced = Traced(ground)
    with steps("sweep") as step:
        for done, (seed, layer, name, changes) in enumerate(todo):
            step(done, len(todo), f"layer {layer}, {name}: {words(changes)}")
            which: Row = {
                "base": base,
                "facts": edits,
                "layer": layer,
                "editor": name,
                "settings": words(changes),
                "seed": seed,
            }
            if runs.of(**which):
                continue
            if name == "MEMIT":
                settings = {"context_templates": ground.templates(seed), "max_tokens": 8192}
            else:
                last = {"l_a": -1} if name == "TOP" else {}
                settings = ground.settings(int(layer), {**last, **changes}, seed)
            found = traced(name, seed, edits, settings)
            runs.add([{**which, "noise": noise, **row_of(x)} for noise, x in zip(NOISES, found, strict=True)])


def row_of(lines: Tensor) -> Row:
    """Means over prompts, and their deviations as ``NAME_std``."""
    found: Row = {"edits": len(lines)}
    for name, values in zip(COLUMNS, lines.T, strict=True):
        found |= {name: round(float(values.mean()), 5), f"{name}_std": round(float(values.std(correction=0)), 5)}
    return found


def tables(rows: Sequence[Row]) -> list[str]:
    """Whether TOP evens out what ROME does, by variant; then every layer and editor, the seeds together."""
    names, parts, verdicts = ("layer", "editor", "settings"), list[str](), list[list[str]]()

    def place(row: Row) -> list[str]:
        return [row[name] for name in names]

    for noise in NOISES:
        mine = [row for row in rows if float(row["noise"]) == noise and int(row["edits"])]
        groups = {tuple(which): list(some) for which, some in groupby(sorted(mine, key=place), key=place)}
        lines = [
            [*which, str(sum(int(row["edits"]) for row in of)), *(shown(pooled(of, name)) for name in COLUMNS)]
            for which, of in groups.items()
        ]
        parts += [f"### Noise of {noise:g} deviations", markdown([*names, "prompts", *COLUMNS], lines)]
        for (layer, editor, settings), of in groups.items():
            steps = settings == words({})
            tops = {w[2]: t for w, t in groups.items() if w[:2] == (layer, "TOP") and ("l_a" in w[2]) == steps}
            if editor == "ROME" and tops:
                which = [f"{noise:g}", layer, "published" if steps else "small steps"]
                verdicts += [[*which, name, *_even(name, of, tops)] for name in COLUMNS[-2:]]
    head = ["noise", "layer", "settings", "measure", "ROME", "TOP, nearest to 0", "its l_a", "ROME above 0"]
    head += ["TOP nearer to 0"]
    return ["### What ROME does, and whether TOP evens it out", markdown(head, verdicts), *parts]


def _even(name: str, rome: Sequence[Row], tops: Mapping[str, Sequence[Row]]) -> list[str]:
    """A gap under ROME, under the settings of TOP whose gap is nearest to 0, and both verdicts."""
    there, of = pooled(rome, name), {settings: pooled(rows, name) for settings, rows in tops.items()}
    best = min(of, key=lambda settings: abs(of[settings][0]))
    apart = abs(there[0]) - abs(of[best][0])
    nearer = "yes" if apart > math.hypot(there[1], of[best][1]) else "within intervals" if apart > 0 else "no"
    return [
        shown(there),
        shown(of[best]),
        best if "l_a" in best else "l_a -1",
        "yes" if there[0] > there[1] else "no",
        nearer,
    ]


def shown(pair: tuple[float, float]) -> str:
    """A mean and half the width of its interval."""
    return f"{pair[0]:.2f} ± {pair[1]:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs that are missing; write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="almanac", help="the almanac, or a folder with a model of the same world")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 0, 1, 3], help="every l_a on the first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--edits", type=int, default=40, help="of a seed")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    args = parser.parse_args(arguments)
    quiet()
    torch.set_num_threads(1)
    runs = Runs(args.out.with_suffix(".csv"))
    sweep(Ground(args.base), runs, args.base, args.layers, args.seeds, args.edits)
    page(args.out.with_suffix(".md"), tables(runs.of(base=args.base, facts=args.edits)))


if __name__ == "__main__":
    main()
