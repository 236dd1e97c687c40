"""How much of an answer comes back where a part of the clean run is restored in a corrupted one (ROME, section 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kedit_lightning.edits import Edit, Part, Token
from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record
from kedit_lightning.models import LanguageModel, Row, buckets, collate
from kedit_lightning.models.memory import token_budget
from kedit_lightning.models.restoring import Cell, CorruptedRun
from kedit_lightning.probes.base import Study, usable
from kedit_lightning.probes.token_classes import CLASSES, classes_of

Corrupt = Literal["subject", "relation"]
CORRUPTED: Mapping[Corrupt, Sequence[str]] = MappingProxyType(
    {"subject": ("fs", "ms", "ls"), "relation": ("rp", "fr", "mr", "lr")}
)
"""Which token classes get noise: the subject's, or all others; a start token never does."""
SEED = 1
"""Of numpy's generator, as in ROME's code; every run draws anew, so that all cells and models see the same noise."""
TOKENS = 4096
"""Tokens that are embedded together."""
Kind = tuple[Part, int]
"""What is restored: the outputs of a part, in a window of so many layers."""


class Asked(NamedTuple):
    """A prompt that is answered as expected.

    Attributes:
        edit: Whose prompt.
        owner: The edit that it sees, where edits are side by side; -1: none.
        answer: The token that answers it; None: the model's likeliest next one.
    """

    edit: Edit
    owner: int = -1
    answer: int | None = None


@dataclass(frozen=True)
class Trace:
    """What came of one prompt.

    Args:
        edit: Whose prompt.
        tokens: The t tokens as text, with a star where there was noise.
        classes: Their classes.
        answer: The token that was asked for.
        high: Its probability in the clean run.
        low: Its mean probability over the corrupted copies.
        effects: The indirect effect of every token and layer, by kind; shape ``(t, layers)``, float64.
    """

    edit: Edit
    tokens: list[str]
    classes: list[str]
    answer: str
    high: float
    low: float
    effects: dict[Kind, Tensor]


@dataclass(frozen=True)
class Tracer:
    """Traces prompts.

    Args:
        base: The model.
        level: Standard deviation of the noise, as `noise_level` gives it.
        copies: Corrupted copies of a prompt.
        kinds: What is restored.
    """

    base: LanguageModel
    level: float
    copies: int
    kinds: Sequence[Kind]

    @torch.no_grad()
    def __call__(self, asked: Asked, corrupt: Corrupt) -> Trace | None:
        """Trace the answer that the model gives to an edit's prompt.

        Args:
            asked: The prompt, and which answer.
            corrupt: Which tokens get noise.

        Returns:
            The trace; None: the prompt has no such tokens.
        """
        base, edit, row = self.base, asked.edit, prompt_of(self.base, asked.edit, asked.owner)
        classes, layers = classes_of(base, edit), base.num_layers
        where = [name in CORRUPTED[corrupt] for name in classes]
        if not any(where):
            return None
        width = embedded(base, row.ids[:1]).shape[-1]
        noise, parts = noise_on(where, self.copies, width, self.level), [part for part, _ in self.kinds]
        run = CorruptedRun(base, row, noise, parts, asked.answer)
        cells = [cell for kind in self.kinds for cell in cells_of(kind, len(row.ids), layers)]
        effects = (run.scores(cells) - run.low).view(len(self.kinds), len(row.ids), layers)
        words = [str(base.tokenizer.decode([token])) + "*" * yes for token, yes in zip(row.ids, where, strict=True)]
        answer = str(base.tokenizer.decode([run.answer])).strip()
        found = dict(zip(self.kinds, effects, strict=True))
        return Trace(edit, words, classes, answer, run.high, run.low, found)


def prompt_of(base: LanguageModel, edit: Edit, owner: int = -1) -> Row:
    """An edit's prompt, as a row that sees an edit."""
    return replace(base.encode(edit.text), owner=owner)


@torch.no_grad()
def answered(
    base: LanguageModel, edits: Sequence[Edit], field: str, owners: Sequence[int] | None = None
) -> list[Asked | None]:
    """The prompts whose likeliest next token is the edit's whole answer, but for white space; None for the others.

    Args:
        base: The model.
        edits: n edits.
        field: The edit's answer: ``target_true`` or ``target_new``.
        owners: The edit that each prompt is to see, where edits are side by side.
    """
    owners, found = owners or [-1] * len(edits), list[Asked | None]([None] * len(edits))
    rows = [prompt_of(base, *each) for each in zip(edits, owners, strict=True)]
    for places in buckets([len(row.ids) for row in rows], token_budget(base)):
        batch = collate([rows[i] for i in places])
        likeliest = base.logits(batch, (torch.arange(len(batch)), batch.at[Token.PROMPT_LAST])).argmax(dim=-1)
        for i, token in zip(places, likeliest.tolist(), strict=True):
            if str(base.tokenizer.decode([token])).strip() == getattr(edits[i], field):
                found[i] = Asked(edits[i], owners[i], token)
    return found


def of_original(study: Study, n: int, seed: int) -> tuple[list[Asked], Record]:
    """Prompts of n edits by chance that the unedited model answers rightly, and how many it does not.

    Raises:
        KeditError: There is none.
    """
    sample = study.sample(n, seed)
    found = answered(study.base, sample, "target_true")
    edits = usable(sample, [one is not None for one in found], "the model's next token to be the whole target_true")
    return [one for one in found if one], {"edits": len(sample), "unanswered": len(sample) - len(edits)}


def of_edited(study: Study, edits: Sequence[Edit]) -> Iterator[Asked | None]:
    """The prompts of edits, each while the model holds its own edit; None: it is not answered by the new target.

    To be taken one by one, inside `SingleEdits.ready`.

    Raises:
        KeditError: None is answered so.
    """
    right = list[bool]()
    for block, owners in study.singles.blocks(edits):
        found = answered(study.base, block, "target_new", owners)
        right += [one is not None for one in found]
        yield from found
    usable(edits, right, "an edited model's next token to be the whole target_new")


def cells_of(kind: Kind, length: int, layers: int) -> list[Cell]:
    """Every cell of a prompt, token by token, each with its window of layers, clipped at both ends.

    >>> [(cell.first, cell.last) for cell in cells_of(("mlp", 3), 1, 4)]
    [(0, 1), (0, 2), (1, 3), (2, 3)]
    >>> [(cell.first, cell.last) for cell in cells_of(("attn", 10), 1, 12)][4:7]
    [(0, 8), (0, 9), (1, 10)]
    """
    part, window = kind
    starts = [layer - window // 2 for layer in range(layers)]
    spans = [(max(0, start), min(layers, start + window) - 1) for start in starts]
    return [Cell(position, part, *span) for position in range(length) for span in spans]


@torch.no_grad()
def noise_level(base: LanguageModel, subjects: Sequence[str], noise: float) -> float:
    """Standard deviation of the noise: so many times that of all entries of the embeddings of all subjects' tokens.

    Args:
        base: The model, unedited.
        subjects: All subjects of the data set, each once.
        noise: How many times.
    """
    ids = base.tokenizer(list(subjects), add_special_tokens=False)["input_ids"]
    tokens, counts = torch.unique(torch.tensor([token for line in ids for token in line]), return_counts=True)
    n, total, squares = 0, 0.0, 0.0
    for some, times in zip(tokens.split(TOKENS), counts.split(TOKENS), strict=True):
        vectors, weights = embedded(base, some.tolist()).double(), times.to(base.device).double()[:, None]
        n += int(times.sum()) * vectors.shape[1]
        total += float((weights * vectors).sum())
        squares += float((weights * vectors.square()).sum())
    return noise * math.sqrt(max(0.0, squares - total**2 / n) / (n - 1))


def embedded(base: LanguageModel, ids: Sequence[int]) -> Tensor:
    """What the token embedding puts out, shape ``(t, d)``."""
    found: Tensor = base.model.get_submodule(base.architecture.embed)(torch.tensor(ids, device=base.device))
    return found


def noise_on(where: Sequence[bool], copies: int, width: int, level: float) -> Tensor:
    """Noise on some tokens of a prompt, drawn span by span from the left; 0 elsewhere.

    Args:
        where: Which of t tokens.
        copies: n.
        width: d.
        level: Its standard deviation.

    Returns:
        Shape ``(n, t, d)``, the same at every call.
    """
    generator, found = np.random.RandomState(SEED), torch.zeros(copies, len(where), width)
    ends = [i for i in range(len(where) + 1) if (i < len(where) and where[i]) != (i > 0 and where[i - 1])]
    for start, end in zip(ends[::2], ends[1::2], strict=True):
        found[:, start:end] = level * torch.from_numpy(generator.randn(copies, end - start, width))
    return found


def by_class(effects: Tensor, classes: Sequence[str]) -> Tensor:
    """Means over the tokens of each class.

    Args:
        effects: Shape ``(t, …)``; nan counts as missing.
        classes: The class of each token.

    Returns:
        Shape ``(7, …)``, in the order of `CLASSES`; nan where there is none.

    >>> by_class(torch.tensor([1.0, 3.0, 5.0]), ["fs", "ls", "ls"])[1:4]
    tensor([1., nan, 4.])
    """
    kinds = [[i for i, name in enumerate(classes) if name == kind] for kind in CLASSES]
    return torch.stack([effects[places].nanmean(dim=0) for places in kinds])


def check(edits: int, noise: float, copies: int, windows: Sequence[int]) -> None:
    """Refuse settings out of range.

    Raises:
        KeditError: One is.
    """
    if min(edits, copies, *windows, 1) < 1 or not windows or not noise > 0:
        msg = (
            "expected at least one edit, one copy, windows of at least one layer and a noise above 0, got "
            f"edits {edits}, copies {copies}, windows {list(windows)}, noise {noise:g}"
        )
        raise KeditError(msg)
