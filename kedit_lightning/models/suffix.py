"""Forward passes with vectors added, reduced to what the vectors can change.

A vector added at (layer l, token s) changes, by causality, nothing below layer l and nothing before token s. So
`SuffixForward` runs the whole rows once without gradient, keeps what does not change, and then repeats the rest alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from operator import is_

import torch
from torch import Tensor, nn

from kedit_lightning.edits import Site
from kedit_lightning.models.encoding import Batch
from kedit_lightning.models.full import FullForward
from kedit_lightning.models.language_model import LanguageModel
from kedit_lightning.models.suffix_group import SuffixGroup, first_layer, start_of

GROUP_COSTS = {"cpu": 64}
"""How many more tokens take as long as one more group of rows, for which all weights are read; by type of device."""
ELSEWHERE = 1024
"""The same on other devices (not measured)."""


class _Picked(Exception):
    """Raised by a hook to end a forward pass before the head."""


class SuffixForward(FullForward):
    """Only the layers and tokens that can change; holds for the weights as they are at construction.

    Rows run in groups of similar length, then the head over all of them at once. Rows that are not read do not run.

    Args:
        base: The model.
        rows: b rows.
        sites: Where vectors will be added: for each site the position in every row, shape ``(b,)``. A row's start is
            the first of its positions.
        last: The last layer that will be read; None: up to the head.

    Raises:
        ModelError: The model keeps no keys and values that a suffix could attend to.
    """

    def __init__(self, base: LanguageModel, rows: Batch, sites: Mapping[Site, Tensor], last: int | None = None) -> None:
        rows = rows.to(base.device)
        super().__init__(base, rows, {site: at.to(base.device) for site, at in sites.items()}, last)
        self._start, self._end = start_of(self.sites), rows.attention_mask.sum(dim=1)
        self._first = min(map(first_layer, sites))
        costs = GROUP_COSTS.get(base.device.type, ELSEWHERE)
        groups = [
            torch.tensor(group, device=base.device) for group in similar((self._end - self._start).tolist(), costs)
        ]
        self._groups = [
            (
                group,
                SuffixGroup(base, rows.select(group), {site: at[group] for site, at in self.sites.items()}, self.last),
            )
            for group in groups
        ]
        self._forget_what_was_asked()

    def _forget_what_was_asked(self) -> None:
        self._asked: tuple[int, tuple[Site, ...]] | None = None
        self._asked_at: tuple[Tensor, ...] = ()
        self._runs: list[_Run] = []

    def narrowed(self, rows: Batch, sites: Mapping[Site, Tensor], last: int | None) -> SuffixForward | None:
        """The same for some of its rows, from what it has kept; None where there are others.

        Rows are known by their tokens, their owners and where vectors are added.
        """
        if not self.is_between(sites, last):
            return None
        there = {row: i for i, row in enumerate(_described(self.rows, self.sites))}
        which = [there.get(row, -1) for row in _described(rows, sites)]
        if -1 in which:
            return None
        some, chosen = copy(self), torch.tensor(which, device=self._start.device)
        some.rows = rows.to(self.base.device)
        some.sites = {site: at.to(self.base.device) for site, at in sites.items()}
        some._start, some._end, some._groups = self._start[chosen], self._end[chosen], []
        for group, suffix in self._groups:
            mine, line = torch.nonzero(chosen[:, None] == group, as_tuple=True)
            if len(mine):
                some._groups.append((mine, suffix.select(line)))
        some._forget_what_was_asked()
        return some

    def logits(self, added: Mapping[Site, Tensor], at: tuple[Tensor, Tensor]) -> Tensor:
        """As `FullForward.logits`.

        Raises:
            ValueError: A position is outside its row's suffix, or the layers end below the head.
        """
        if self.last < self.base.num_layers - 1:
            msg = f"expected sites up to layer {self.last} to be read, as was said at construction, got logits"
            raise ValueError(msg)
        runs, found = self._share_out(*at, self.last, (), at), list[Tensor]()
        order = torch.cat([run.place for run in runs]).argsort()

        def pick(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            found.append(args[0][run.line.to(args[0].device), run.position.to(args[0].device)])
            if run is not runs[-1]:
                raise _Picked
            return torch.cat(found)[order.to(args[0].device)][None]

        hook = self.base.model.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            for run in runs:
                with suppress(_Picked), run.suffix.adding(run.vectors(added)):
                    logits = self.base.logits(run.suffix.rows)[0]
        finally:
            hook.remove()
        return logits

    def read(self, added: Mapping[Site, Tensor], wanted: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """As `FullForward.read`.

        Raises:
            ValueError: A position is outside its row's suffix, or a site outside the layers that are run.
        """
        for site in wanted:
            if first_layer(site) < self._first or site.layer > self.last:
                msg = f"expected sites from where vectors are added up to layer {self.last}, got {site}"
                raise ValueError(msg)
        every = torch.arange(len(self.rows), device=self._start.device)
        position = torch.cat([at.to(every.device) for at in wanted.values()])
        last = max(site.layer for site in wanted)
        runs = self._share_out(every.repeat(len(wanted)), position, last, tuple(wanted), tuple(wanted.values()))
        found = [
            run.suffix.read(run.vectors(added), dict(zip(wanted, run.position.view(len(wanted), -1), strict=True)))
            for run in runs
        ]
        order = torch.cat([run.rows for run in runs]).argsort()
        return {site: torch.cat([one[site] for one in found])[order.to(found[0][site].device)] for site in wanted}

    def _share_out(
        self, row: Tensor, position: Tensor, layer: int, sites: tuple[Site, ...], at: tuple[Tensor, ...]
    ) -> list[_Run]:
        """What each group runs to read p tokens up to a layer; once for what is asked in every step."""
        what, before = (layer, sites), self._asked_at
        if what == self._asked and len(at) == len(before) and all(map(is_, at, before)):
            return self._runs
        row = row.to(self._start.device)
        position, number, runs = self._shift(row, position), torch.empty_like(self._start), []
        for group, suffix in self._groups:
            number.fill_(-1)[group] = torch.arange(len(group), device=group.device)
            place = torch.nonzero(number[row] >= 0)[:, 0]
            if len(place):
                lines, line = number[row[place]].unique(return_inverse=True)  # type: ignore[no-untyped-call]
                suffix = suffix.cut(lines, line, position[place], layer)
                runs.append(_Run(suffix, group[lines], line, position[place], place))
        self._asked, self._asked_at, self._runs = what, at, runs
        return runs

    def _shift(self, row: Tensor, position: Tensor) -> Tensor:
        """Positions counted from their rows' starts."""
        position, start, end = position.to(row.device), self._start[row], self._end[row]
        if len(outside := ((position < start) | (position >= end)).nonzero()):
            i = int(outside[0])
            where = f"from {int(start[i])}, where a vector is added first, to its last, {int(end[i]) - 1}"
            msg = f"expected positions of row {int(row[i])} {where}; got {int(position[i])}"
            raise ValueError(msg)
        return position - start


def _described(rows: Batch, sites: Mapping[Site, Tensor]) -> list[tuple[int, ...]]:
    """What a forward pass depends on, a row."""
    at = torch.stack([*sites.values(), rows.owner.to(rows.input_ids.device)], dim=1).tolist()
    lengths = rows.attention_mask.sum(dim=1).tolist()
    return [(*at, *ids[:n]) for at, ids, n in zip(at, rows.input_ids.tolist(), lengths, strict=True)]


@dataclass(frozen=True)
class _Run:
    """What a group runs where tokens are read.

    Args:
        suffix: Its rows that are read.
        rows: Which they are of all rows, shape ``(n,)``.
        line: Of each token that is read its row among these, shape ``(p,)``.
        position: Its position in the suffix, shape ``(p,)``.
        place: Which it is of all tokens that are read, shape ``(p,)``.
    """

    suffix: SuffixGroup
    rows: Tensor
    line: Tensor
    position: Tensor
    place: Tensor

    def vectors(self, added: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """Those of its rows."""
        return {site: vectors[self.rows.to(vectors.device)] for site, vectors in added.items()}


def similar(lengths: Sequence[int], costs: int) -> list[list[int]]:
    """Share rows out to groups, each padded to its longest, at the least cost.

    Args:
        lengths: Tokens of each row.
        costs: What a group costs beside its tokens, in tokens.

    Returns:
        Indices of the rows of each group, ascending.

    >>> similar([2, 9, 3, 8, 2], costs=3)
    [[0, 2, 4], [1, 3]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ends = [i + 1 for i, n in enumerate(order) if i + 1 == len(order) or lengths[order[i + 1]] > lengths[n]]
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}  # by how many of the shortest rows are shared out
    for end in ends:
        longest = lengths[order[end - 1]]
        cost, start = min((cost + costs + (end - start) * longest, start) for start, (cost, _) in best.items())
        best[end] = cost, [*best[start][1], end]
    cuts = [0, *best[len(order)][1]]
    return [sorted(order[start:end]) for start, end in pairwise(cuts)]
