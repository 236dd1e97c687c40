"""Whether the edited value acts through the relation feature alone: the assumption behind TOP's two stages (Eq. 12)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kedit_lightning import objectives
from kedit_lightning.callbacks.figures import AFTER, INK, STYLE, band, blank, headline
from kedit_lightning.editors.checks import ascending, at_least
from kedit_lightning.edits import Edit, Site, Token
from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record
from kedit_lightning.metrics.functional import summarize
from kedit_lightning.models import Batch, LanguageModel, buckets, collate
from kedit_lightning.models.memory import token_budget
from kedit_lightning.probes.base import Finding, Probe, Study
from kedit_lightning.probes.token_classes import classes_of
from kedit_lightning.report import count

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ConditionalIndependence(Probe):
    """``P[o*|h_r, v]`` against ``P[o*|h_r]``, which TOP takes to be the same (section 4.1, Eqs. 11 and 12).

    Every edit is made by itself. ``P[o*|h_r, v]`` is the new target's probability in the edited model, whose MLP puts
    out v at the subject's last token and whose block l_a then puts out h_r at the prompt's last. ``P[o*|h_r]`` is that
    in the unedited model in which nothing but h_r is put in its place. What of v the layers above l_a still read at
    other tokens makes the difference; of a target of several tokens, whose probabilities are multiplied, also what its
    own tokens read. The paper gives no procedure for it.

    Args:
        edits: How many edits, by chance of those there are.
        layers: The l_a, ascending; null: from the lowest edited layer to the last, where a target of one token has no
            difference.
        seed: Of the choice of edits.

    Raises:
        KeditError: A setting is out of range.
    """

    def __init__(self, edits: int = 100, layers: list[int] | None = None, seed: int = 0) -> None:
        at_least(1, edits=edits)
        self.edits, self.layers, self.seed = edits, None if layers is None else ascending(layers=layers), seed

    def look(self, study: Study) -> Iterator[Finding]:
        """``conditional_independence``, a row an edit and layer; ``conditional_independence_layers``, a row a layer.

        ``p_both`` is ``P[o*|h_r, v]``, ``p_h_r`` is ``P[o*|h_r]``, ``p_unedited`` that of the unedited model.

        Raises:
            KeditError: All edits are rejected, or the model has no such layer.
        """
        base, edits, rows, rejected = study.base, study.sample(self.edits, self.seed), list[Record](), 0
        lowest = min(site.layer for site in study.editor.sites())
        layers = [base.check_layer(layer) for layer in self.layers or range(lowest, base.num_layers)]
        with study.singles.ready():
            for block, owners in study.singles.blocks(edits):
                made = [i for i, owner in enumerate(owners) if owner >= 0]
                rejected += len(block) - len(made)
                lengths = [len(base.encode(block[i].text, block[i].target_new).ids) for i in made]
                for part in buckets(lengths, token_budget(base)):
                    some = [made[i] for i in part]
                    rows += probabilities(base, [block[i] for i in some], [owners[i] for i in some], layers)
        if not rows:
            msg = f"ConditionalIndependence: all {count(len(edits))} were rejected; give other edits"
            raise KeditError(msg)
        name, of_layers = type(study.editor).__name__, [agreement(rows, layer) for layer in layers]
        own = sorted(set(getattr(study.editor, "l_a", {}).values()))
        notes = {
            "editor": name,
            "edits": len(edits),
            "edits_rejected": rejected,
            "prompts_that_end_in_their_subject": sum("lr" not in classes_of(base, edit) for edit in edits),
            "l_a_of_the_editor": own,
        }
        figure = draw(rows, of_layers, own, f"{name}, {count(len(edits) - rejected)}: what v adds when h_r is known")
        yield Finding("conditional_independence", rows, figure, notes)
        yield Finding("conditional_independence_layers", of_layers, None, notes)


@torch.no_grad()
def probabilities(
    base: LanguageModel, edits: Sequence[Edit], owners: Sequence[int], layers: Sequence[int]
) -> list[Record]:
    """The probabilities of the new targets of edits, while the model holds these edits.

    Args:
        base: The model.
        edits: n edits.
        owners: The owner of each, see `SingleEdits.blocks`.
        layers: The l_a.

    Returns:
        A record a layer and edit.
    """
    rows = collate([base.encode(edit.text, edit.target_new) for edit in edits]).to(base.device)
    edited = replace(rows, owner=torch.tensor(owners, device=base.device))
    at, every = rows.at[Token.PROMPT_LAST], torch.arange(len(rows), device=base.device)
    sites = [Site(layer, "block") for layer in layers]
    with base.tap(dict.fromkeys(sites, at)) as found:
        given_both = of_target(base, edited)
    h_r, given_h_r = dict(found), list[Tensor]()
    with base.unedited():
        unedited = of_target(base, rows)
        for site in sites:
            with base.add(site, at, h_r[site], instead=every):
                given_h_r.append(of_target(base, rows))
    return [
        {
            "case_id": edit.case_id,
            "l_a": layer,
            "p_both": float(given_both[i]),
            "p_h_r": float(of_layer[i]),
            "p_unedited": float(unedited[i]),
        }
        for layer, of_layer in zip(layers, given_h_r, strict=True)
        for i, edit in enumerate(edits)
    ]


def of_target(base: LanguageModel, rows: Batch) -> Tensor:
    """The probability of each row's continuation, all its tokens; shape ``(b,)``."""
    line, position = torch.nonzero(rows.labels >= 0, as_tuple=True)
    nll = objectives.nll(base.logits(rows, (line, position)), rows.labels[line, position])
    return (-objectives.sum_over_rows(nll, line, len(rows))).exp()


def agreement(rows: Sequence[Record], layer: int) -> Record:
    """How near the two probabilities are at one l_a: their mean absolute difference and Pearson's correlation.

    Args:
        rows: Records of `probabilities`.
        layer: l_a.

    Returns:
        Both with their 95 % intervals (``low``, ``high``: of the correlation, by Fisher's z); None where there is none.

    >>> rows = [{"l_a": 3, "p_both": p, "p_h_r": p - 0.1} for p in (0.9, 0.5, 0.7, 0.8)]
    >>> {name: value and round(value, 3) for name, value in agreement(rows, 3).items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'l_a': 3, 'edits': 4, 'p_both': 0.725, 'p_h_r': 0.625, 'difference': 0.1, 'ci95': 0.0,
     'correlation': 1.0, 'low': 1.0, 'high': 1.0}
    """
    mine = [(row["p_both"], row["p_h_r"]) for row in rows if row["l_a"] == layer]
    pairs, n = torch.tensor(mine, dtype=torch.float64).T, len(mine)
    gap = summarize((pairs[0] - pairs[1]).abs())
    r = float(torch.corrcoef(pairs)[0, 1]) if n > 1 and bool((pairs.std(dim=1) > 0).all()) else None
    low = high = None
    if r is not None and n > 3:
        z, half = math.atanh(max(-1 + 1e-12, min(r, 1 - 1e-12))), 1.96 / math.sqrt(n - 3)
        low, high = math.tanh(z - half), math.tanh(z + half)
    return {
        "l_a": layer,
        "edits": n,
        "p_both": float(pairs[0].mean()),
        "p_h_r": float(pairs[1].mean()),
        "difference": gap.mean,
        "ci95": gap.ci95,
        "correlation": r,
        "low": low,
        "high": high,
    }


def draw(rows: Sequence[Record], of_layers: Sequence[Record], own: Sequence[int], title: str) -> Figure:
    """Both probabilities of every edit, coloured by l_a, and their mean absolute difference over l_a.

    Args:
        rows: Records of `probabilities`.
        of_layers: Records of `agreement`.
        own: The editor's own l_a, which are marked.
        title: The headline.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = blank(9.4, 4.2)
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=":", zorder=1)
        pairs = torch.tensor([[row["p_both"], row["p_h_r"], row["l_a"]] for row in rows]).T.numpy()
        points = left.scatter(pairs[0], pairs[1], c=pairs[2], cmap="viridis", s=12, alpha=0.7, lw=0, zorder=2)
        figure.colorbar(points, ax=left, label="layer l_a of h_r", ticks=[row["l_a"] for row in of_layers])
        left.set_xlabel("P[o*|h_r, v]: edited model")
        left.set_ylabel("P[o*|h_r]: unedited model with h_r")
        means = [{"edits": row["l_a"], "mean": row["difference"], "ci95": row["ci95"]} for row in of_layers]
        band(right, means, AFTER, "mean over the edits", ends=(0, 1))
        for layer in own:
            right.axvline(layer, color=INK, lw=0.8, ls=":", label="the editor's own l_a")
        right.set_ylim(bottom=0)
        right.xaxis.get_major_locator().set_params(integer=True)
        right.set_xlabel("layer l_a of h_r")
        right.set_ylabel("|P[o*|h_r, v] − P[o*|h_r]|")
        right.grid(axis="y", zorder=0)
        right.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2, fontsize=8.5)
        headline(figure, title)
    return figure
