"""What the benchmarks about TOP share: single edits of the almanac side by side, and the runs that are kept of them."""

from __future__ import annotations

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
from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.edits import Edit, Site
from kedit_lightning.metrics import Evaluation, Evaluator
from kedit_lightning.metrics.questions import identity
from kedit_lightning.models import LanguageModel
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
        self._referred: dict[int, Edit] = {}  # what the evaluator knows the unedited model's answers to
        self.templates = cache(lambda seed: ContextTemplates(templates=ContextTemplates("memit", seed=seed)(self.base)))

    def settings(self, layer: int, changes: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Those of an editor at a layer, ``l_a`` counted from the last layer."""
        found = {"layers": [layer], "context_templates": self.templates(seed), "max_tokens": 8192, **changes}
        if "l_a" in found:
            found["rel_feat_layer"] = self.base.num_layers + found.pop("l_a") - layer
        return found

    @contextmanager
    def singles(self, name: str, edits: Sequence[Edit], **settings: Any) -> Iterator[SingleEdits]:
        """What makes the edits of an editor side by side."""
        if unknown := [edit for edit in edits if self._referred.get(identity(edit)) != edit]:
            self.evaluator.references(unknown)
            self._referred |= {identity(edit): edit for edit in unknown}
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
                lines = self.evaluator.update(metrics, block, owners=owners)
                outcomes = singles.editor.outcomes
                for i, line in zip(owners, lines, strict=True):
                    stages = {o.stage: o.final(i) for o in outcomes} if i >= 0 else {}
                    line |= {f"{stage}/{name}": value for stage, each in stages.items() for name, value in each.items()}
                found += lines
        return found

    def in_a_batch(self, name: str, edits: Sequence[Edit], **settings: Any) -> list[dict[str, float]]:
        """The metrics of edits that are solved together."""
        with self.singles(name, edits, **settings) as singles:
            singles.editor.side_by_side = False
            singles.trainer.weight_update.edit(singles.editor, singles.datamodule, list(edits), singles.fit)
            return self.evaluator.update(self.evaluator.new(), edits)

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
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list[Row]()
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
