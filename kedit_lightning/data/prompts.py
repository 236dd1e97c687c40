"""From edits to rows: context templates, subject positions, labels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from kedit_lightning.edits import SLOT, Edit
from kedit_lightning.errors import DataError
from kedit_lightning.models import Batch, LanguageModel, collate
from kedit_lightning.models.encoding import Row, buckets
from kedit_lightning.models.generation import sample
from kedit_lightning.models.processes import first

ESSENCE = "{} is a"
START_WORDS = ("The", "Therefore", "Because", "I", "You")


@dataclass(frozen=True)
class ContextTemplates:
    """Texts put before a prompt, so that an edit does not depend on standing at the start of the text.

    A template is ``prefix + ". {}"``; the bare ``{}`` always comes first. Prefixes are sampled from the unedited model.

    Args:
        scheme: ``rome``: one flat list, started from the start token alone; ``memit``: the bare template and a group of
            one prefix for each of five start words, ten tokens each; null: the editor's own.
        context_template_length_params: For ``rome``: pairs (total length in tokens, start token included; how many).
        templates: Templates to use instead, in groups; each holds one ``{}`` and the first is ``{}``.
        exclude: Prefixes that contain this word are dropped (TOP's released code: ``import``).
        seed: Seed of the sampling.

    Raises:
        DataError: A length leaves no token after the start token, or a number of prefixes is below 1.
    """

    scheme: Literal["rome", "memit"] | None = None
    context_template_length_params: list[tuple[int, int]] = field(default_factory=lambda: [(5, 10), (10, 10)])
    templates: list[list[str]] | None = None
    exclude: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse lengths and numbers that mean nothing."""
        for pair in self.context_template_length_params:
            if pair[0] < 2 or pair[1] < 1:
                msg = (
                    "context_template_length_params: expected pairs of a length ≥ 2 (start token included) and a "
                    f"number ≥ 1, got {list(pair)}"
                )
                raise DataError(msg)

    def __call__(self, base: LanguageModel) -> list[list[str]]:
        """The templates in groups, the first group being ``["{}"]`` or starting with ``{}``.

        Raises:
            DataError: A given template has not exactly one ``{}``, or the first is not the bare one.
        """
        if self.templates is not None:
            flat = [template for group in self.templates for template in group]
            if not flat or flat[0] != "{}" or any(template.count("{}") != 1 for template in flat):
                msg = f"context templates: expected exactly one {{}} in each and the bare '{{}}' first, got {flat}"
                raise DataError(msg)
            return [list(group) for group in self.templates if group]
        if self.scheme == "memit":
            starts: list[tuple[str | None, int, int]] = [(word, 1, 10) for word in START_WORDS]
        else:
            starts = [(None, n, length) for length, n in self.context_template_length_params]
        sampled = first(  # of several processes, which must have the same
            lambda: [text for i, start in enumerate(starts) for text in sample(base, *start, seed=self.seed + i)]
        )
        prefixes = [prefix.replace("{", " ").replace("}", " ") for prefix in sampled]
        contexts = [f"{prefix}. {{}}" for prefix in prefixes if self.exclude is None or self.exclude not in prefix]
        return [["{}"], contexts] if self.scheme == "memit" and contexts else [["{}", *contexts]]


@dataclass(frozen=True)
class EditBatch:
    """Edits and their rows: for each edit its prompt in every context template, then "{subject} is a".

    Args:
        edits: The n edits.
        rows: The b rows.
        edit: The edit of each row, shape ``(b,)``.
        essence: Which rows are "{subject} is a", shape ``(b,)``.
        weight: Weight of each row in its edit's key: mean over groups of the mean in the group; 0 for essence rows.
        index: Place of each edit among all that are solved together, shape ``(n,)``.
    """

    edits: Sequence[Edit]
    rows: Batch
    edit: Tensor
    essence: Tensor
    weight: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.edits)

    @property
    def bare(self) -> Tensor:
        """Index of each edit's bare prompt among the rows, shape ``(n,)``."""
        first = torch.ones_like(self.edit, dtype=torch.bool)
        first[1:] = self.edit[1:] != self.edit[:-1]
        return torch.nonzero(first)[:, 0]

    @cached_property
    def bare_rows(self) -> Batch:
        """Each edit's bare prompt, n rows."""
        return self.rows.select(self.bare)

    def select(self, edits: Tensor) -> EditBatch:
        """The rows of some of the edits, in ascending order."""
        number = torch.full((len(self),), -1, device=self.edit.device)
        number[edits] = torch.arange(len(edits), device=self.edit.device)
        rows = torch.nonzero(number[self.edit] >= 0)[:, 0]
        return EditBatch(
            [self.edits[i] for i in edits.tolist()],
            self.rows.select(rows),
            number[self.edit[rows]],
            self.essence[rows],
            self.weight[rows],
            self.index[edits.cpu()],
        )

    def placed(self, places: Sequence[int]) -> EditBatch:
        """The same batch where what `index` counts are these edits of a larger number."""
        index = torch.tensor(places)[self.index]
        return replace(self, index=index, rows=replace(self.rows, owner=index.to(self.edit.device)[self.edit]))

    @property
    def tokens(self) -> int:
        """How many tokens the rows take, padding included."""
        return self.rows.input_ids.numel()

    def to(self, device: torch.device | str) -> EditBatch:
        """The same batch on another device; `index` stays on the CPU."""
        return EditBatch(
            self.edits,
            self.rows.to(device),
            self.edit.to(device),
            self.essence.to(device),
            self.weight.to(device),
            self.index,
        )


def edit_batches(
    base: LanguageModel,
    edits: Sequence[Edit],
    templates: Sequence[Sequence[str]],
    *,
    max_tokens: int,
    separate: bool = False,
) -> list[EditBatch]:
    """Tokenise edits in their context templates and share them out to batches; no edit is divided.

    Args:
        base: The model that will read the rows.
        edits: n edits.
        templates: Context templates in groups, the bare one first.
        max_tokens: Tokens of a batch at most, padding included; an edit beyond it has a batch of its own.
        separate: Tokenise targets on their own, as the released codes do.

    Raises:
        DataError: A prompt is longer than the model's context; the case is named.
    """
    rows = [_rows(base, request, templates, separate=separate) for request in edits]
    n_rows = sum(map(len, templates)) + 1
    lengths = [n_rows * max(len(row.ids) for row in mine) for mine in rows]
    weight = torch.tensor([1 / len(group) / len(templates) for group in templates for _ in group] + [0.0])
    batches = []
    for chosen in map(sorted, buckets(lengths, max_tokens)):
        edit = torch.arange(len(chosen)).repeat_interleave(n_rows)
        weights = weight.repeat(len(chosen))
        together = collate([row for i in chosen for row in rows[i]])
        batches.append(
            EditBatch([edits[i] for i in chosen], together, edit, weights == 0, weights, torch.tensor(chosen))
        )
    return batches


def edit_batch(
    base: LanguageModel, edits: Sequence[Edit], templates: Sequence[Sequence[str]], *, separate: bool = False
) -> EditBatch:
    """Tokenise edits in their context templates: all in one batch; see `edit_batches`."""
    (batch,) = edit_batches(base, edits, templates, max_tokens=sys.maxsize, separate=separate)
    return batch


def _rows(base: LanguageModel, edit: Edit, templates: Sequence[Sequence[str]], *, separate: bool) -> list[Row]:
    """An edit's prompt in every context template, then "{subject} is a"."""
    rows = []
    try:
        for template in (template for group in templates for template in group):
            start = template.index(SLOT) + edit.prompt.index(SLOT)
            span = (start, start + len(edit.subject))
            rows.append(base.encode(edit.fill(template), edit.target_new, span, separate=separate))
        rows.append(base.encode(ESSENCE.format(edit.subject), None, (0, len(edit.subject))))
    except DataError as error:
        msg = f"case {edit.case_id}: {error}"
        raise DataError(msg) from error
    return rows
