"""TOP's claim in miniature: relation specificity against what an edit reaches, over the settings of TOP and ROME.

    python -m benchmarks.top_claim
    python -m benchmarks.top_claim --edits 10 --seeds 0 --layers 2 --only sweep

Single edits of the almanac side by side, 3 × 70 facts; a seed chooses facts, new objects and context templates (MEMIT's
five prefixes, a quarter of ROME's work). Every setting is a point of a trade-off curve; all layers from --layers are swept.
Then several relations of one subject in sequence. Runs that top_claim.csv and top_claim_sequence.csv hold are not
repeated; the picture and the tables of top_claim.md, below its line "## Tables", are made anew from them.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning import Trainer
from torch import Tensor

from benchmarks.measuring import almanac_edits, shipped, trainer
from kedit_lightning.callbacks.logs import quiet
from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.edits import Edit, Site
from kedit_lightning.metrics import Evaluation, Evaluator
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.progress import steps
from kedit_lightning.single_edits import SingleEdits
from kedit_lightning.writing import write_csv

METRICS = {
    "ES": "efficacy",
    "GS": "generalization",
    "S-spec": "s_specificity",
    "R-spec": "r_specificity",
    "ES exact": "efficacy_exact",
    "GS exact": "generalization_exact",
    "unchanged": "r_specificity_unchanged",
}
"""By column; *exact*: the new answer is the likeliest; *unchanged*: what is likeliest in other relations still is."""
FOUR = ("ES", "GS", "S-spec", "R-spec")
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
    {"kl_factor": 1},
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
        {"v_num_grad_steps1": 5},
        {"l_a": -3},
        {"vec_loss_factor": 0.3},
        LONG["TOP"],
        {**LONG["TOP"], "l_a": -3},
        {**LONG["TOP"], "l_a": -4},
        {**LONG["TOP"], "stop1": 0.5},
        {**LONG["TOP"], "stop1": 0.005},
    ),
}
"""``l_a``: the layer, counted from the last (-1)."""
FEW = {name: [grid[i] for i in (0, 2, 3, 5)] + [LONG[name]] for name, grid in GRID.items()}
"""Of layers beside the first that is swept."""
SEQUENCES = {f"{name}, {words}": (name, changes) for name in GRID for words, changes in (("published", {}), ("small steps", LONG[name]))}

Row = dict[str, Any]


# ---------------------------------------------------------------------- edits


class Ground:
    """The almanac's model, its facts and what is measured on them.

    Args:
        base: The model.
    """

    def __init__(self, base: str) -> None:
        self.base = LanguageModel(base)
        self.evaluator = Evaluator(self.base, Evaluation(generation=False))
        self.templates = cache(lambda seed: ContextTemplates(templates=ContextTemplates("memit", seed=seed)(self.base)))

    def settings(self, layer: int, changes: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Those of an editor at a layer, ``l_a`` counted from the last layer."""
        found = {"layers": [layer], "context_templates": self.templates(seed), "max_tokens": 8192, **changes}
        if "l_a" in found:
            found["rel_feat_layer"] = self.base.n_layers + found.pop("l_a") - layer
        return found

    @contextmanager
    def singles(self, name: str, edits: Sequence[Edit], **settings: Any) -> Iterator[SingleEdits]:
        """What makes the edits of an editor side by side."""
        self.evaluator.references(edits)
        editor, data = shipped(name, self.base, **settings), almanac_edits(0, 1, restore_every=1)
        with tempfile.TemporaryDirectory() as folder:
            made = trainer(folder, evaluate=False)
            made.logger = None
            singles = SingleEdits(made, editor, data, partial(Trainer.fit, made, editor, datamodule=data))
            with singles.ready():
                yield singles

    def measured(self, name: str, edits: Sequence[Edit], **settings: Any) -> list[dict[str, float]]:
        """The metrics of each edit, by their reported names."""
        found, metrics = list[dict[str, float]](), self.evaluator.new()
        with self.singles(name, edits, **settings) as singles:
            for block, owners in singles.blocks(edits):
                found += self.evaluator.update(metrics, block, owners=owners)
        return found

    def in_sequence(
        self, name: str, groups: Sequence[Sequence[Edit]], **settings: Any
    ) -> Iterator[list[dict[str, float]]]:
        """Edits one after another in each group, the groups side by side; after each edit the metrics of all so far.

        Relations of a subject that any of its edits is about are left out of its relation specificity.
        """
        edited = [{edit.relation_id for edit in group} for group in groups]
        asked = [[_without(edit, known) for edit in group] for group, known in zip(groups, edited, strict=True)]
        written: list[tuple[int, Tensor, Tensor]] = []
        unedited = self.base.project

        def project(site: Site, keys: Tensor) -> Tensor:
            values = unedited(site, keys)
            for i, left, right in written:  # what single edits know nothing of
                values[i] += keys[i].to(values) @ right.to(values) @ left.T.to(values)
            return values

        every = [edit for group in asked for edit in group]
        with self.singles(name, every, **settings) as singles, mock.patch.object(self.base, "project", project):
            for j in range(len(groups[0])):
                batch = [group[j] for group in groups]
                update = singles.trainer.weight_update
                for delta in update.edit(singles.editor, singles.datamodule, batch, singles.fit):
                    assert delta.edit is not None
                    written.append((delta.edit, *delta.factors))
                so_far = [(i, edit) for i, group in enumerate(asked) for edit in group[: j + 1]]
                owners, edits = zip(*so_far, strict=True)
                yield self.evaluator.update(self.evaluator.new(), edits, owners=owners)


def _without(edit: Edit, relations: set[str | None]) -> Edit:
    """An edit whose relation-specific prompts are about other relations."""
    pairs = zip(edit.relation_specific_prompts, edit.relation_specific_relations, strict=True)
    prompts, ids = zip(*[pair for pair in pairs if pair[1] not in relations], strict=True)
    return replace(edit, relation_specific_prompts=prompts, relation_specific_relations=ids)


# ---------------------------------------------------------------------- runs and what they say together


def words(changes: Mapping[str, Any]) -> str:
    """Settings that differ, in words."""
    return ", ".join(f"{key} {value}" for key, value in changes.items()) or "published"


def summary(lines: Sequence[Mapping[str, float]]) -> Row:
    """Means over edits in percent, and their deviations as ``NAME_std``; an edit without a metric is left out."""
    found: Row = {"edits": len(lines)}
    for column, metric in METRICS.items():
        values = 100 * torch.tensor([line[metric] for line in lines if metric in line], dtype=torch.float64)
        found[column] = round(float(values.mean()), 4)
        found[f"{column}_std"] = round(float(values.std(correction=0)), 4)
    return found


def pooled(rows: Sequence[Mapping[str, Any]], column: str) -> tuple[float, float]:
    """Mean over the edits of several runs, and half the width of its 95 % interval, normal."""
    n = torch.tensor([float(row["edits"]) for row in rows], dtype=torch.float64)
    mean = torch.tensor([float(row[column]) for row in rows], dtype=torch.float64)
    square = mean**2 + torch.tensor([float(row[f"{column}_std"]) for row in rows], dtype=torch.float64) ** 2
    middle = float((n * mean).sum() / n.sum())
    variance = max(float((n * square).sum() / n.sum()) - middle**2, 0.0)
    return middle, 1.96 * math.sqrt(variance / float(n.sum()))


def harmonic(values: Sequence[float]) -> float:
    """Their harmonic mean; 0 where one is 0."""
    return len(values) / sum(1 / value for value in values) if all(values) else 0.0


class Runs:
    """Runs that are kept in a CSV file: what it holds is not made again.

    Args:
        path: The file.
        key: The columns that say which run it is.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self.path, self.key, self.rows = path, key, list[Row]()
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))

    def of(self, **which: Any) -> list[Row]:
        """Those that are kept of some."""
        return [row for row in self.rows if all(str(row[name]) == str(value) for name, value in which.items())]

    def add(self, rows: Sequence[Row]) -> None:
        """Keep more."""
        self.rows += rows
        write_csv(self.path, self.rows)


def page(path: Path, tables: Sequence[str]) -> None:
    """Put tables into a page below its line "## Tables"; what stands above stays."""
    above = path.read_text(encoding="utf-8").partition("## Tables")[0] if path.is_file() else f"# {path.stem}\n\n"
    path.write_text(above + "\n\n".join(["## Tables", *tables]) + "\n", encoding="utf-8")


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def shown(pair: tuple[float, float]) -> str:
    """A mean and half the width of its interval."""
    return f"{pair[0]:.1f} ± {pair[1]:.1f}"
