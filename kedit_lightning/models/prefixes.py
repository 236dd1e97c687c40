"""Next-token logits of many rows, in which what rows have in common at their beginning is computed once.

In lexicographic order rows share their beginnings with their neighbours. The first of them runs whole, the others from
where they part from it, against the keys and values that it has left: two answers to a prompt run the prompt once, and
prompts of one template the template. It is the model's own forward that runs, with what comes before padded on the
left and the rest on the right, so that positions, attention windows and scales stay the family's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kedit_lightning.models.encoding import Batch, Row
from kedit_lightning.models.language_model import LanguageModel

PASS = 64
"""What a forward pass costs for the weights that it reads, as a number of tokens."""
LEVELS = 3
"""Passes one after another in which a row may come about: a template, its subjects, their answers."""
SHARED = 3
"""Fewer tokens in common are run again."""


@dataclass(frozen=True)
class Answers:
    """Logits of some tokens that rows ask about: those that predict its targets, or its last where it has none.

    Args:
        row: Number of the row that asks about each of m tokens, shape ``(m,)``.
        index: Which of that row's targets it predicts, shape ``(m,)``.
        line: Its line of ``logits``, which rows that ask about the same token share; shape ``(m,)``.
        logits: Shape ``(p, vocabulary)``.
    """

    row: Tensor
    index: Tensor
    line: Tensor
    logits: Tensor


@torch.no_grad()
def answers(base: LanguageModel, rows: Sequence[Row], max_tokens: int, *, levels: int = LEVELS) -> Iterator[Answers]:
    """Logits of rows, in parts: every token that a row asks about is in one of them.

    Args:
        base: The model.
        rows: Rows; those of different owners share nothing.
        max_tokens: Budget in tokens of a batch, with its padding and what it attends to, and of what is remembered.
        levels: At most so many passes one after another. With 1, which also serves models without a plain cache of
            keys and values, only rows that begin another row run with it.
    """
    for segments in _plan(rows, max_tokens, levels):
        size = sum(segment.kept for segment in segments)
        memory = [_Memory(size) for _ in range(base.num_layers)] if size else []
        for level in range(levels):
            for batch in _batches([segment for segment in segments if segment.level == level], max_tokens):
                line, position, row, index = torch.tensor(
                    [
                        (line, position - segment.start, row, index)
                        for line, segment in enumerate(batch)
                        for position, row, index in segment.asked
                    ]
                ).T
                asked = torch.stack([line, position])
                at, which = asked.unique(dim=1, return_inverse=True)  # type: ignore[no-untyped-call]
                logits = _run(base, batch, memory, (at[0], at[1]))
                if not all(layer.states for layer in memory):
                    yield from answers(base, rows, max_tokens, levels=1)
                    return
                yield Answers(row, index, which, logits)


@dataclass
class _Segment:
    """The end of a row, from token `start` on. What is before it is in segments of earlier levels.

    Args:
        row: The row.
        start: How many tokens are before.
        path: The segments that hold these, in order, each with the position up to which.
        level: How many passes come before.
        kept: So many of its first tokens are remembered, for segments that begin with them.
        place: Where in the memory.
        asked: Position, row and index of each of `Answers`.
    """

    row: Row
    start: int
    path: list[tuple[_Segment, int]]
    level: int
    kept: int = 0
    place: int = 0
    asked: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Tokens that are run."""
        return len(self.row.ids) - self.start


def _plan(rows: Sequence[Row], max_tokens: int, levels: int) -> list[list[_Segment]]:
    """Segments in groups that share nothing, on as many levels as pay."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i].owner, rows[i].ids, i), reverse=True)
    common = [0] * (order != []) + [_common(rows[i], rows[j]) for i, j in pairwise(order)]
    plans = [_groups(rows, order, common, max_tokens, n) for n in range(1, levels + 1)]

    def cost(groups: list[list[_Segment]]) -> int:
        return sum(s.width for group in groups for s in group) + PASS * sum(len({s.level for s in g}) for g in groups)

    return min(plans, key=cost)


def _groups(
    rows: Sequence[Row], order: Sequence[int], common: Sequence[int], max_tokens: int, levels: int
) -> list[list[_Segment]]:
    """Segments on at most so many levels, in groups that remember at most `max_tokens`.

    Args:
        rows: The rows.
        order: Their numbers in descending order, so that a row stands right after those that it begins.
        common: Tokens that each row, in this order, has in common with the one before it.
        max_tokens: Tokens that are remembered.
        levels: Number of levels.
    """
    groups: list[list[_Segment]] = [[]]
    path: list[tuple[_Segment, int]] = []  # the segments that the last row was made of
    room = max_tokens
    for i, shared in zip(order, common, strict=True):
        row = rows[i]
        if shared == len(row.ids):
            path = _cut(path, shared)
        else:
            path = [piece for piece in _cut(path, shared) if piece[0].level < levels - 1]
            path = path if path and path[-1][1] >= SHARED else []
            needed = sum(max(0, end - segment.start - segment.kept) for segment, end in path)
            if needed > room:
                groups.append([])
                path, needed, room = [], 0, max_tokens
            room -= needed
            for segment, end in path:
                segment.kept = max(segment.kept, end - segment.start)
            start = path[-1][1] if path else 0
            segment = _Segment(row, start, path, path[-1][0].level + 1 if path else 0)
            groups[-1].append(segment)
            path = [*path, (segment, len(row.ids))]
        first = len(row.ids) - max(1, len(row.targets))
        for position in range(first, len(row.ids)):
            segment = next(segment for segment, end in path if position < end)
            segment.asked.append((position, i, position - first))
    for group in groups:
        place = 0
        for segment in group:
            segment.place, place = place, place + segment.kept
    return groups


def _cut(path: list[tuple[_Segment, int]], end: int) -> list[tuple[_Segment, int]]:
    """What holds the first tokens of a path, up to an end."""
    return [(segment, min(stop, end)) for segment, stop in path if segment.start < end]


def _common(one: Row, other: Row) -> int:
    """Tokens with which both rows begin; none if they are of different owners."""
    if one.owner != other.owner:
        return 0
    pairs = enumerate(zip(one.ids, other.ids, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one.ids), len(other.ids)))


def _batches(segments: Sequence[_Segment], max_tokens: int) -> Iterator[list[_Segment]]:
    """Segments of like width together; a batch ends also where padding begins to cost more than another pass."""
    batch: list[_Segment] = []
    start = padding = 0
    for segment in sorted(segments, key=lambda segment: (-segment.width, -segment.start)):
        if batch:
            start, padding = max(start, segment.start), padding + batch[0].width - segment.width
            if (len(batch) + 1) * (start + batch[0].width) > max_tokens or padding > PASS:
                yield batch
                batch = []
        if not batch:
            start, padding = segment.start, 0
        batch.append(segment)
    if batch:
        yield batch


@dataclass(frozen=True)
class _Rows:
    """A batch of segments, as `LanguageModel.logits` takes it; the mask also covers what comes before them."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    owner: Tensor

    def to(self, device: torch.device) -> _Rows:
        """The same on another device."""
        return _Rows(*(value.to(device) for value in vars(self).values()))


def _run(base: LanguageModel, segments: list[_Segment], memory: list[_Memory], at: tuple[Tensor, Tensor]) -> Tensor:
    """Logits of some tokens of segments."""
    ids = torch.zeros(len(segments), max(s.width for s in segments), dtype=torch.long)
    before = torch.full((len(segments), max(s.start for s in segments)), -1)
    for line, segment in enumerate(segments):
        ids[line, : segment.width] = torch.tensor(segment.row.ids[segment.start :])
        places = [range(s.place, s.place + end - s.start) for s, end in segment.path]
        before[line, before.shape[1] - segment.start :] = torch.tensor([p for some in places for p in some])
    start = torch.tensor([segment.start for segment in segments])
    position = (start[:, None] + torch.arange(ids.shape[1])).clamp(max=base.max_length - 1)
    # Padding on the right comes after all that is read: causality hides it.
    mask = torch.cat([before >= 0, torch.ones_like(ids)], dim=1)
    past = None
    if memory:
        kept = [(line, p, s.place + p) for line, s in enumerate(segments) for p in range(s.kept)]
        past = DynamicCache()
        past.layers = cast("list[Any]", memory)
        for layer in memory:
            layer.before, layer.kept = before.clamp(min=0), torch.tensor(kept, dtype=torch.long).reshape(-1, 3).T
    batch = _Rows(ids, mask, position, torch.tensor([segment.row.owner for segment in segments]))
    return base.logits(cast("Batch", batch), at, past=past)


class _Memory(DynamicLayer):
    """Keys and values of a layer's tokens that others begin with; attention is given those before each row.

    Args:
        size: How many tokens there will be.
    """

    before: Tensor
    """For each row the places of the tokens before it, shape ``(b, w)``."""
    kept: Tensor
    """Of each token to keep its row, its position in it, and its place, shape ``(3, n)``."""

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = size
        self.states: list[Tensor] = []

    def get_seq_length(self, *_: object) -> int:
        """Tokens that stand before, padding included."""
        return int(self.before.shape[1])

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Keep what is to be kept of new states, shape ``(b, h, q, d)``; returned with those before them."""
        device = key_states.device
        before, (line, position, place) = self.before.to(device), self.kept.to(device)
        keys, values = states = (key_states, value_states)
        if not self.states:
            self.states = [x.new_zeros(self.size, x.shape[1], x.shape[3]) for x in states]
        if before.shape[1]:
            old = (kept[before].transpose(1, 2) for kept in self.states)
            keys, values = (torch.cat(pair, dim=2) for pair in zip(old, states, strict=True))
        for kept, x in zip(self.states, states, strict=True):
            kept[place] = x.transpose(1, 2)[line, position]
        return keys, values
