"""TOP's three open questions, tried on the almanac: the tables of top_open_questions.md.

    python -m benchmarks.top_open_questions
    python -m benchmarks.top_open_questions layers stopping --edits 4 --seeds 0 --out /tmp/try/questions

`layers`: l_a chosen for each edit; `stopping`: stages that end by what is reached; `questions`: prompts that end in
"?"; `mass`: many facts at once. Single edits are those of top_claim.py. Runs that the CSV file holds are not repeated;
tables stand below the page's line "## Tables".
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.top_claim import LONG, facts_of
from benchmarks.top_ground import (
    FOUR,
    METRICS,
    Ground,
    Row,
    Runs,
    harmonic,
    markdown,
    page,
    pooled,
    shown,
    summary,
    words,
)
from kedit_lightning import editors, objectives
from kedit_lightning.almanac.lexicon import RELATIONS
from kedit_lightning.callbacks.logs import quiet
from kedit_lightning.editors import TOP, Loss, Stage
from kedit_lightning.editors.stages import likely
from kedit_lightning.edits import Edit, Site, Token
from kedit_lightning.models.progress import steps

LAYER = 2
P1 = "stop1_probability"
L_A = (-4, -3, -2, -1)
ASKED = {r.id: next(p for p in r.train if p.endswith("? Answer:")).removesuffix(" Answer:") for r in RELATIONS}
"""The question about a relation, without its cue."""

Lines = Sequence[Mapping[str, float]]
Variants = Iterator[tuple[str, Callable[[], Lines]]]
"""What is compared by name, and what makes the edits and measures them."""


# ---------------------------------------------------------------------- variants of TOP


class Reaching(TOP):
    """TOP whose second stage ends by what it has reached.

    Args:
        ratio: It ends when this share of the way to h_r* is left.
        p2: It ends when the target is at least this likely on the bare prompt.
    """

    def __init__(self, *args: Any, ratio: float | None = None, p2: float | None = None, **shared: Any) -> None:
        super().__init__(*args, **shared)
        self.ratio, self.p2 = ratio, p2

    def stages(self) -> Iterator[Stage]:
        """Those of TOP."""
        first, second = super().stages()
        yield first
        if self.ratio is not None:
            second = replace(second, stop=self._near)
        yield second if self.p2 is None else replace(second, stop=likely(self.p2))

    def _near(self, loss: Loss) -> torch.Tensor:
        near: torch.Tensor = float(self.ratio or 0) * self.vec_loss_factor * self.h_r.delta.detach().norm(dim=1)
        return loss.terms["distance"] <= near

    def _vector_loss(self) -> Callable[[], Loss]:
        distance = super()._vector_loss()
        if self.p2 is None:
            return distance
        rows, v = self.batch.bare_rows, self.v
        line, position = torch.nonzero(rows.labels >= 0, as_tuple=True)
        forward = self.forward_from(rows, {v.site: rows.at[v.token]})

        def loss() -> Loss:
            with torch.no_grad():
                logits = forward.logits({v.site: v.delta}, (line, position))
                nll = objectives.mean_over_rows(objectives.nll(logits, rows.labels[line, position]), line, len(rows))
            return replace(distance(), probability=(-nll).exp())

        return loss


class AfterSubject(TOP):
    """TOP whose h_r is that of the first token after the subject."""

    def locate(self) -> None:
        """h_r there; v as ROME."""
        super().locate()
        self.h_r.token = Token.SUBJECT_AFTER_LAST


class Both(TOP):
    """TOP with a relation vector at the prompt's last token and one, a layer below, at the first after the subject."""

    def locate(self) -> None:
        """Both, and v as ROME."""
        super().locate()
        self.second = self.value_delta(Site(self.h_r.site.layer - 1, "block"), Token.SUBJECT_AFTER_LAST, "second")

    def stages(self) -> Iterator[Stage]:
        """Both in the first stage, both reached in the second."""
        first, then = super().stages()
        yield replace(first, deltas=(self.h_r, self.second), prepare=lambda: self.edit_loss(self.h_r, self.second))
        yield replace(then, prepare=self._both)

    def _both(self) -> Callable[[], Loss]:
        one = self._vector_loss()
        keep, self.h_r = self.h_r, self.second
        other, self.h_r = self._vector_loss(), keep

        def loss() -> Loss:
            first, second = one(), other()
            return Loss({**first.terms, "distance": (first.terms["distance"] + second.terms["distance"]) / 2})

        return loss


class Cued(TOP):
    """TOP that reads a question with the cue after which it is answered."""

    def request(self, edit: Edit) -> Edit:
        """The question and its cue."""
        return replace(edit, prompt=f"{edit.prompt} Answer:") if edit.prompt.endswith("?") else edit


class Rounds(TOP):
    """TOP's batch solver twice: the second time on the model so edited, where most edits need nothing any more."""

    def passes(self) -> Sequence[int]:
        """Two."""
        return [*super().passes()] * 2


def made(
    ground: Ground, kind: type[TOP] | str, edits: Sequence[Edit], seed: int, changes: Mapping[str, Any]
) -> list[dict[str, float]]:
    """Metrics of single edits by an editor, or by a variant of TOP."""
    name = kind if isinstance(kind, str) else "TOP"
    with mock.patch.object(editors, name, getattr(editors, name) if isinstance(kind, str) else kind):
        return ground.measured(name, edits, **ground.settings(LAYER, changes, seed))


# ---------------------------------------------------------------------- (a) l_a and stopping by itself


def layers(ground: Ground, seed: int, edits: int) -> Variants:
    """Published constants: every l_a for all edits, then l_a chosen edit by edit from four trials."""
    facts = facts_of(seed, edits)

    @cache
    def trial(l_a: int) -> Lines:
        return made(ground, "TOP", facts, seed, {"l_a": l_a})

    def chosen(rule: Callable[[Mapping[str, float]], float]) -> Lines:
        return [min(four, key=rule) for four in zip(*map(trial, L_A), strict=True)]

    for l_a in L_A:
        yield f"l_a {ground.base.num_layers + l_a}", partial(trial, l_a)
    rules: dict[str, Callable[[Mapping[str, float]], float]] = {
        "chosen by: smallest v": lambda line: line["v/delta/mlp"],
        "chosen by: smallest h_r": lambda line: line["h_r/delta/block"],
        "chosen by: stage 2 nearest": lambda line: line["v/distance"],
        "chosen by: likeliest target": lambda line: -line["p_new"],
        "oracle: the best by its own four metrics": lambda line: -harmonic([1e-3 + line[METRICS[m]] for m in FOUR]),
    }
    for name, rule in rules.items():
        yield name, partial(chosen, rule)


def stopping(ground: Ground, seed: int, edits: int) -> Variants:
    """Stages that end by what is reached, under the published constants and under small steps."""
    run = partial(made, ground, edits=facts_of(seed, edits), seed=seed)
    long = LONG["TOP"]
    yield "published", partial(run, "TOP", changes={})
    reached: list[dict[str, Any]] = [{P1: p} for p in (0.99, 0.9)] + [{"ratio": 0.3}]
    reached += [{"p2": p} for p in (0.5, 0.9)] + [{P1: 0.95, "p2": 0.9}]
    for rule in reached:
        yield f"published, {words(rule)}", partial(run, Reaching, changes=rule)
    yield "small steps", partial(run, "TOP", changes=long)
    for rule in ({P1: 0.99}, {"p2": 0.9}):
        yield f"small steps, {words(rule)}", partial(run, Reaching, changes={**long, **rule})


# ---------------------------------------------------------------------- (b) prompts that end in "?"


def questions(ground: Ground, seed: int, edits: int) -> Variants:
    """The same facts as statements, as questions with their cue, and as questions that end in "?"."""
    facts = facts_of(seed, edits)
    asked = [replace(edit, prompt=ASKED[str(edit.relation_id)]) for edit in facts]
    cued = [replace(edit, prompt=f"{edit.prompt} Answer:") for edit in asked]
    long = LONG["TOP"]
    far = {**long, "l_a": -4}
    for form, mine in (("statement", facts), ("? Answer:", cued), ("?", asked)):
        for name, editor, changes in (
            ("ROME", "ROME", LONG["ROME"]),
            ("TOP, published", "TOP", {}),
            ("TOP", "TOP", long),
            ("TOP, l_a 4", "TOP", far),
        ):
            yield f"{form} : {name}", partial(made, ground, editor, mine, seed, changes)
    for name, kind, changes in (
        ("TOP, l_a 4, h_r after the subject", AfterSubject, far),
        ("TOP, l_a 4, both tokens", Both, far),
        ("TOP, with the cue", Cued, long),
    ):
        yield f"? : {name}", partial(made, ground, kind, asked, seed, changes)


# ---------------------------------------------------------------------- (c) many facts at once


def mass(ground: Ground, seed: int, edits: int) -> Variants:
    """Facts in one batch, against the same facts one by one on the unedited model."""
    published: dict[str, Any] = {"solver": "least_squares"}
    long = {**LONG["TOP"], **published}
    several = {"layers": [0, 1, 2], "rel_feat_layer": 5, "spread": "sqrt"}
    facts = facts_of(seed, edits)
    yield "single edits, published", partial(made, ground, "TOP", facts, seed, {})
    yield "single edits, small steps", partial(made, ground, "TOP", facts, seed, LONG["TOP"])
    for weight in (100, 1000):
        changes = {**published, "mom2_update_weight": weight}
        yield f"published, λ {weight}", partial(together, ground, TOP, facts, seed, changes)
    for weight in (10, 100):
        changes = {**long, "mom2_update_weight": weight}
        yield f"small steps, λ {weight}", partial(together, ground, TOP, facts, seed, changes)
    one, three = ({**long, **more, "mom2_update_weight": 10} for more in ({}, several))
    yield "small steps, λ 10, two rounds", partial(together, ground, Rounds, facts, seed, one)
    yield "small steps, λ 10, layers 0 to 2", partial(together, ground, TOP, facts, seed, three)
    name = "small steps, λ 10, layers 0 to 2, two rounds"
    yield name, partial(together, ground, Rounds, facts, seed, three)


def together(
    ground: Ground, kind: type[TOP], edits: Sequence[Edit], seed: int, changes: Mapping[str, Any]
) -> list[dict[str, float]]:
    """Metrics of edits that are solved together."""
    with mock.patch.object(editors, "TOP", kind):
        return ground.in_a_batch("TOP", edits, **ground.settings(LAYER, changes, seed))


# ---------------------------------------------------------------------- the page


QUESTIONS: Mapping[str, Callable[[Ground, int, int], Variants]] = {
    "layers": layers,
    "stopping": stopping,
    "questions": questions,
    "mass": mass,
    "mass of 300": mass,
}
FACTS = {"mass": 100, "mass of 300": 300}
"""Facts of a seed, where it is not --edits."""


def table(rows: Sequence[Row]) -> str:
    """Means over the edits of all seeds with their 95 % intervals."""
    lines = []
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for variant in variants:
        mine = [row for row in rows if row["variant"] == variant]
        pairs = {name: pooled(mine, name) for name in METRICS}
        seeds = [harmonic([float(row[name]) for name in FOUR]) for row in mine]
        score = harmonic([pairs[name][0] for name in FOUR])
        spread = f"{score:.1f} ({min(seeds):.1f} to {max(seeds):.1f})"
        lines.append([variant, str(len(mine)), *map(shown, pairs.values()), spread])
    return markdown(["", "seeds", *METRICS, "Score4 (least to most of a seed)"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", help=f"of {', '.join(QUESTIONS)}; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--edits", type=int, default=70, help="single edits of a seed")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    args = parser.parse_args(arguments)
    quiet()
    torch.set_num_threads(1)
    runs = Runs(args.out.with_suffix(".csv"))
    ground = Ground("almanac")
    with steps("questions") as step:
        for seed in args.seeds:
            for name in args.which or QUESTIONS:
                done = {row["variant"] for row in runs.of(question=name, seed=seed)}
                for variant, lines in QUESTIONS[name](ground, seed, FACTS.get(name, args.edits)):
                    step(len(runs.rows), None, f"{name}: {variant}, seed {seed}")
                    if variant not in done:
                        runs.add([{"question": name, "variant": variant, "seed": seed, **summary(lines())}])
    parts = []
    for name in QUESTIONS:
        if mine := runs.of(question=name):
            parts += [f"### {name}", table(mine)]
    page(args.out.with_suffix(".md"), parts)


if __name__ == "__main__":
    main()
