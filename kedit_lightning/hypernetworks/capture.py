"""Keys and gradients of edits, read from the model as it stands."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from kedit_lightning import objectives
from kedit_lightning.edits import Site
from kedit_lightning.errors import KeditError
from kedit_lightning.hypernetworks.network import Factors
from kedit_lightning.models import Batch, LanguageModel
from kedit_lightning.models.devices import free_memory

Tokens = Literal["answer", "all"]
"""At which tokens: those that predict the answer, or all."""


class Capture:
    """One forward and backward pass over edits, whose factors it keeps.

    A row's loss is its own mean over its answer's tokens, so that how rows are shared out does not matter.

    Args:
        base: The model.
        rows: b prompts with their answers.
        sites: Of which weight matrices.
        tokens: At which tokens.
    """

    def __init__(self, base: LanguageModel, rows: Batch, sites: Sequence[Site], tokens: Tokens) -> None:
        self.base, self.sites, self.rows = base, sites, rows.to(base.device)
        self.where = counted(self.rows, tokens)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of each row's answer, and how many of its tokens are not the likeliest; ``(b,)``."""
        if not len(self.rows):
            return torch.zeros(0, requires_grad=True), torch.zeros(0)
        with self.base.factors(self.sites, len(self.rows)) as self._found:
            return answers(self.base, self.rows)

    def factors(self) -> dict[Site, Factors]:
        """Of each matrix what its gradient is made of, token by token, in float32, after a backward pass."""
        found = {}
        for site, (keys, zeros) in self._found.items():
            where = self.where.to(keys.device)
            assert zeros.grad is not None
            found[site] = Factors(keys[where].float(), zeros.grad[where].float())
        return found


def captured(
    base: LanguageModel, batches: Iterable[Batch], sites: Sequence[Site], tokens: Tokens
) -> dict[Site, Factors]:
    """What `Capture` keeps of batches of rows, in main memory, without tokens that add nothing to a gradient."""
    found: dict[Site, list[Factors]] = {site: [] for site in sites}
    for rows in batches:
        capture = Capture(base, rows, sites, tokens)
        capture.forward()[0].sum().backward()  # type: ignore[no-untyped-call]
        for site, each in capture.factors().items():
            found[site].append(Factors(*(part.cpu() for part in without_zeros(each))))
    return {site: Factors(*map(torch.cat, zip(*found.pop(site), strict=True))) for site in sites}


def counted(rows: Batch, tokens: Tokens) -> Tensor:
    """At which tokens of rows factors are kept, booleans of shape ``(b, t)``."""
    return rows.labels >= 0 if tokens == "answer" else rows.attention_mask > 0


def check_dtype(base: LanguageModel) -> None:
    """Refuse float16, in which gradients as small as those of one fact among many are 0.

    Raises:
        KeditError: It is the model's.
    """
    if base.dtype == "float16":
        msg = "base.dtype: expected float32 or bfloat16 for MEND and MALMEN, got float16, in which gradients become 0"
        raise KeditError(msg)


def memory(shapes: Collection[Sequence[int]], tokens: int) -> int:
    """Bytes that factors of tokens take in main memory, with a copy of the largest matrix's, and the solve.

    Args:
        shapes: ``(d, k)`` of the matrices.
        tokens: How many.
    """
    widths, k = [sum(shape) for shape in shapes], max(shape[1] for shape in shapes)
    return 4 * tokens * (sum(widths) + 3 * max(widths)) + 8 * 3 * min(k, tokens) ** 2


def require(shapes: Collection[Sequence[int]], n: int, tokens: int) -> None:
    """Refuse, before anything is done, more edits than main memory holds keys and gradients of.

    Args:
        shapes: ``(d, k)`` of the matrices.
        n: Edits of a batch.
        tokens: Tokens of all of them.

    Raises:
        KeditError: It takes more than is free; the message says for how many edits there is room.
    """
    needed, free = memory(shapes, tokens), free_memory(torch.device("cpu"))
    if needed > free:
        msg = (
            f"{n:,} edits together need about {needed / 2**30:.1f} GiB for keys and gradients of {tokens:,} tokens, "
            f"{free / 2**30:.1f} GiB are free: set data.batch_size to at most {max(1, n * free // needed):,}"
        )
        raise KeditError(msg)


def without_zeros(factors: Factors) -> Factors:
    """The tokens whose keys and gradients are not all zero: the others add nothing to a gradient."""
    there = factors.keys.any(dim=1) & factors.grads.any(dim=1)
    return Factors(factors.keys[there], factors.grads[there])


def answers(base: LanguageModel, rows: Batch, weights: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """How a model answers rows.

    Args:
        base: The model.
        rows: b prompts with their answers.
        weights: By name, in math orientation, what it takes in place of its own weights.

    Returns:
        Negative log-likelihood of each answer, the mean over its tokens, and how many of them are not the likeliest;
        both of shape ``(b,)``.
    """
    line, position = torch.nonzero(rows.labels >= 0, as_tuple=True)
    targets = rows.labels[line, position]
    logits = base.logits(rows, (line, position), weights)
    missed = (logits.detach().argmax(dim=-1) != targets).float()
    nll = objectives.mean_over_rows(objectives.nll(logits, targets), line, len(rows))
    return nll, objectives.sum_over_rows(missed, line, len(rows))
