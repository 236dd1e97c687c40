"""What an edited matrix recalls of prompts that have nothing to do with the edits (EAC, Fig. 3)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from kedit_lightning import delta as delta_files
from kedit_lightning.callbacks.figures import AFTER, BEFORE, INK, STYLE, blank, headline
from kedit_lightning.delta import merge
from kedit_lightning.edits import Site, Token
from kedit_lightning.errors import DataError, KeditError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.encoding import Row, buckets, collate
from kedit_lightning.models.memory import token_budget
from kedit_lightning.models.progress import steps
from kedit_lightning.probes.base import Finding, Probe, Study
from kedit_lightning.run import read_deltas
from kedit_lightning.solvers import double
from kedit_lightning.tasks.sources import records
from kedit_lightning.tasks.table import PERPLEXITY, TASKS, TaskName

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORIGINAL, EDITED = "original", "edited"
"""Names of the first and the last set."""

Mask = Literal["columns", "rows"]
Boundary = Any
"""scikit-learn's, which has no types."""
LEAST = 4
"""Prompts, half of which the boundary is fitted to."""


class ValuePCA(Probe):
    """Values that a task's prompts recall, before and after the edits of a run, on two principal components.

    EAC, Fig. 3: k is the input of the edited layer's down-projection at a prompt's last token, on the unedited model;
    v = W k (with the bias). Six sets of v: of W, of W + Δ with 80, 60, 40 and 20 % of Δ's columns set to zero, and of
    W + Δ. The components are fitted on the union of the sets, and a logistic regression separates the first from the
    last on half of the prompts. Findings: ``value_pca``, the points (``set``, ``zeroed`` per cent, ``x``, ``y``,
    ``held_out``), and ``value_pca_separability``: of each set, on the other half of the prompts, the share ``beyond``
    the boundary, and ``accuracy``, at which the boundary tells the set from the original (0.5: not at all).

    Args:
        run: A run directory or the folder of its versions, for the updates that the run ended with; or a delta file.
        task: The task, as of `kedit tasks`.
        source: Its records instead of its own; see `tasks.sources.records`.
        prompts: How many, the first ones.
        layer: Of the edited layers; by default the last.
        zeroed: Per cent of Δ that is set to zero.
        mask: What is set to zero: columns (dimensions of the key) or rows (of the value).
        choose: Which: evenly spaced ones, or by chance.
        seed: Of the chance, and of the halves.
    """

    def __init__(
        self,
        run: str,
        task: TaskName = "questions",
        source: str | None = None,
        prompts: int = 200,
        layer: int | None = None,
        zeroed: tuple[float, ...] = (80, 60, 40, 20),
        mask: Mask = "columns",
        choose: Literal["even", "random"] = "even",
        seed: int = 0,
    ) -> None:
        if task == PERPLEXITY or prompts < LEAST or not all(0 < share < 100 for share in zeroed):
            msg = (
                f"probe: expected a task with prompts, at least {LEAST} of them, zeroed between 0 and 100 per cent, "
                f"got {task}, {prompts} and {list(zeroed)}"
            )
            raise KeditError(msg)
        self.run, self.task, self.prompts, self.layer, self.zeroed = Path(run), TASKS[task], prompts, layer, zeroed
        self.source = source or self.task.source
        self.mask, self.choose, self.seed = mask, choose, seed

    def look(self, study: Study) -> Iterator[Finding]:
        """Read the keys, and project the values.

        Raises:
            KeditError: The run is missing, of another model or of other layers, or too few prompts can be read.
        """
        base = study.base
        site, update = self._update(base, study.editor.sites())
        rows, skipped = self._rows(base)
        keys = read_keys(base, rows, site)
        shares = {ORIGINAL: 100.0, **{f"{share:g} % zeroed": float(share) for share in self.zeroed}, EDITED: 0.0}
        chance = random.Random(self.seed) if self.choose == "random" else None
        before, keys = base.project(site, keys).cpu(), double(keys).cpu()
        sets = {name: before + keys @ masked(update, share, self.mask, chance).T for name, share in shares.items()}
        points, explained = components(sets)
        out = torch.zeros(len(rows), dtype=torch.bool)
        out[random.Random(self.seed).sample(range(len(rows)), len(rows) // 2)] = True
        line = boundary(points[ORIGINAL][~out], points[EDITED][~out])
        told = {name: {"zeroed": shares[name], **one} for name, one in separability(points, out, line).items()}
        notes = {"run": str(self.run), "layer": site.layer, "prompts": len(rows), "skipped": skipped}
        notes |= {"explained": explained}
        table = [
            {"set": name, "zeroed": shares[name], "x": x, "y": y, "held_out": held_out}
            for name, values in points.items()
            for (x, y), held_out in zip(values.tolist(), out.tolist(), strict=True)
        ]
        yield Finding("value_pca", table, draw(points, line, told), notes)
        yield Finding("value_pca_separability", [{"set": name, **one} for name, one in told.items()], None, notes)

    def _update(self, base: LanguageModel, sites: Sequence[Site]) -> tuple[Site, Tensor]:
        """The site that is looked at, and Δ of its matrix in float64, shape ``(out, in)``."""
        deltas, metadata = read_deltas(self.run)
        delta_files.check(base, deltas, metadata, self.run)
        of_name = {delta.name: delta for delta in merge(deltas)}
        edited = {site.layer: site for site in sites if base.name(site) in of_name}
        layer = max(edited, default=None) if self.layer is None else self.layer
        if layer not in edited:
            known = ", ".join(map(str, edited)) or "none of this editor's"
            msg = f"{self.run}: expected a run that edits layer {layer}, got one that edits {known}: see --probe.layer"
            raise KeditError(msg)
        return edited[layer], of_name[base.name(edited[layer])].update.double()

    def _rows(self, base: LanguageModel) -> tuple[list[Row], int]:
        """The prompts, and how many were skipped because they are too long for the model.

        Raises:
            DataError: The source or a record of it cannot be used, or fewer than 4 prompts can be read.
        """
        rows: list[Row] = []
        start = self.task.reserved
        texts = [self.task.item(one).prompt for _, one in islice(records(self.source), start, start + self.prompts)]
        for text in texts:
            with suppress(DataError):
                rows.append(base.encode(text))
        if len(rows) < LEAST:
            msg = f"expected at least {LEAST} prompts that the model can read, got {len(rows)} of {len(texts)}"
            raise DataError(msg, file=self.source)
        return rows, len(texts) - len(rows)


def read_keys(base: LanguageModel, rows: Sequence[Row], site: Site) -> Tensor:
    """The inputs of a site's linear map at the last token of prompts.

    Args:
        base: The model.
        rows: The prompts.
        site: The site.

    Returns:
        The keys in float32, shape ``(n, k)``.
    """
    keys: dict[int, Tensor] = {}
    with steps("values") as step:
        for places in buckets([len(row.ids) for row in rows], token_budget(base)):
            step(len(keys), len(rows), "")
            batch = collate([rows[i] for i in places]).to(base.device)
            found = base.keys(batch, {site: batch.at[Token.PROMPT_LAST]})[site]
            keys |= dict(zip(places, found, strict=True))
    return torch.stack([keys[i] for i in range(len(rows))])


def masked(update: Tensor, zeroed: float, mask: Mask = "columns", rng: random.Random | None = None) -> Tensor:
    """An update with a share of its columns set to zero.

    Args:
        update: Δ, shape ``(out, in)``.
        zeroed: Per cent of them.
        mask: ``columns`` (dimensions of the key), or ``rows`` (of the value).
        rng: They are chosen by chance; None: evenly spaced.

    Returns:
        Another tensor of the same shape.

    >>> masked(torch.ones(1, 4), 50), masked(torch.ones(1, 4), 75)
    (tensor([[0., 1., 0., 1.]]), tensor([[0., 0., 0., 1.]]))
    """
    n = update.shape[1 if mask == "columns" else 0]
    m = round(n * zeroed / 100)
    without = rng.sample(range(n), m) if rng else [i * n // m for i in range(m)]
    found = update.clone()
    found[(slice(None), without) if mask == "columns" else without] = 0
    return found


def components(sets: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[float]]:
    """Sets of vectors on the first two principal components of their union.

    Args:
        sets: By name vectors, each of shape ``(n, d)``.

    Returns:
        By name coordinates, each of shape ``(n, 2)``, and the share of the variance that each component explains.
    """
    from sklearn.decomposition import PCA

    fitted = PCA(2, svd_solver="full").fit(torch.cat(list(sets.values())).numpy())
    points = {name: torch.from_numpy(fitted.transform(values.numpy())) for name, values in sets.items()}
    return points, fitted.explained_variance_ratio_.tolist()


def boundary(one: Tensor, other: Tensor) -> Boundary:
    """A logistic regression that separates two sets of points, on standardised coordinates.

    Args:
        one: Points of shape ``(n, 2)``; below 0 of its ``decision_function``.
        other: Points of shape ``(m, 2)``; above.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sides = [0] * len(one) + [1] * len(other)
    return make_pipeline(StandardScaler(), LogisticRegression()).fit(torch.cat([one, other]).numpy(), sides)


def separability(points: Mapping[str, Tensor], held_out: Tensor, line: Boundary) -> dict[str, dict[str, float]]:
    """How well a boundary tells each set from the original one, on points it was not fitted to.

    Args:
        points: By name coordinates, each of shape ``(n, 2)``; `ORIGINAL` among them.
        held_out: Which points, shape ``(n,)``.
        line: From `boundary`.

    Returns:
        By name ``beyond``: the share of the set's points on the edited side; ``accuracy``: the mean of that share and
        of the share of the original's points on their own side.
    """
    beyond = {name: float(line.predict(values[held_out].numpy()).mean()) for name, values in points.items()}
    return {name: {"beyond": share, "accuracy": (share + 1 - beyond[ORIGINAL]) / 2} for name, share in beyond.items()}


def draw(points: Mapping[str, Tensor], line: Boundary, told: Mapping[str, Mapping[str, float]]) -> Figure:
    """The sets, the means of which an arrow leads through, and the boundary.

    Args:
        points: By name coordinates, each of shape ``(n, 2)``, from the original to the edited.
        line: From `boundary`.
        told: From `separability`.
    """
    from matplotlib import rc_context
    from matplotlib.colors import LinearSegmentedColormap

    with rc_context(STYLE):
        figure = blank(8.2, 5.2)
        axis = figure.subplots()
        colours = LinearSegmentedColormap.from_list("sets", [BEFORE, AFTER, INK])
        for i, (name, values) in enumerate(points.items()):
            label = name if name == ORIGINAL else f"{name}: {100 * told[name]['accuracy']:.0f} % told from the original"
            x, y = values.T
            axis.scatter(x, y, s=10, color=colours(i / (len(points) - 1)), label=label, lw=0, alpha=0.7, zorder=2)
        means = torch.stack([values.mean(dim=0) for values in points.values()])
        axis.plot(means[:, 0], means[:, 1], color=INK, lw=1, marker=".", zorder=3)
        x, y = (torch.linspace(*ends, 200) for ends in (axis.get_xlim(), axis.get_ylim()))
        grid = torch.cartesian_prod(x, y).double()
        heights = torch.from_numpy(line.decision_function(grid.numpy())).reshape(200, 200).T
        axis.contour(x, y, heights, levels=[0], colors=INK, linestyles="--", linewidths=1)
        axis.set_xlabel("first principal component")
        axis.set_ylabel("second principal component")
        figure.legend(loc="outside lower left", ncols=2, fontsize=8.5, markerscale=2)
        headline(figure, "What is recalled before and after the edits (line: the means, dashed: the boundary)")
    return figure
