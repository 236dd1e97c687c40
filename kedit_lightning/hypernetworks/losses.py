"""What edited weights make of triples: the loss that hypernetworks are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_lightning import objectives
from kedit_lightning.hypernetworks.capture import Tokens, answers, counted
from kedit_lightning.hypernetworks.data import Triple
from kedit_lightning.models import Batch, LanguageModel, collate
from kedit_lightning.models.encoding import buckets

Asked = list[tuple[str, str]]
"""Prompts and answers."""


@dataclass
class MetaLoss:
    """``cedit · NLL(paraphrases) + cloc · KL(before ‖ after, unrelated prompts)``, the mean over triples.

    Args:
        base: The model.
        cedit: Weight of the paraphrases' loss.
        cloc: Weight of the unrelated prompts' KL.
        kl_tokens: At which tokens of an unrelated prompt the KL is taken; a prompt's is the mean over them.
        budget: Tokens that go through the model together.
    """

    base: LanguageModel
    cedit: float
    cloc: float
    kl_tokens: Tokens
    budget: int = 0

    def __call__(
        self, batch: Sequence[Triple], weights: dict[str, Tensor], *, backward: bool = False
    ) -> dict[str, float]:
        """What an edited model makes of triples: means over them.

        Args:
            batch: The triples.
            weights: What takes the place of weights, by their names.
            backward: Whether to add up the loss's gradient in the weights; else the edits themselves are asked too.
        """
        n = len(batch)
        found = dict.fromkeys(("loss", "nll", "kl", "generalization", "locality"), 0.0)
        for rows in self.rows([(triple.paraphrase, triple.edit.target_new) for triple in batch]):
            nll, missed = answers(self.base, rows.to(self.base.device), weights)
            if backward:
                (self.cedit * nll.sum() / n).backward()  # type: ignore[no-untyped-call]
            found["nll"] += float(nll.detach().sum()) / n
            found["generalization"] += float((missed == 0).sum()) / n
        for rows in self.rows([(triple.unrelated, triple.answer) for triple in batch]):
            kl, kept = self.kl(rows.to(self.base.device), weights)
            if backward:
                (self.cloc * kl.sum() / n).backward()  # type: ignore[no-untyped-call]
            found["kl"] += float(kl.detach().sum()) / n
            found["locality"] += float(kept.sum()) / n
        if not backward:
            for rows in self.rows([(triple.edit.text, triple.edit.target_new) for triple in batch]):
                missed = answers(self.base, rows.to(self.base.device), weights)[1]
                found["efficacy"] = found.get("efficacy", 0.0) + float((missed == 0).sum()) / n
        found["loss"] = self.cedit * found["nll"] + self.cloc * found["kl"]
        return found

    def kl(self, rows: Batch, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """KL(before ‖ after) of each row, and whether the likeliest tokens of its answer stay; both ``(b,)``."""
        line, position = torch.nonzero(counted(rows, self.kl_tokens), as_tuple=True)
        with torch.no_grad():
            before = self.base.logits(rows, (line, position)).float().log_softmax(dim=-1)
        after = self.base.logits(rows, (line, position), weights).float().log_softmax(dim=-1)
        kl = objectives.mean_over_rows(objectives.essence_kl(before, after), line, len(rows))
        changed = (after.detach().argmax(dim=-1) != before.argmax(dim=-1)) & (rows.labels[line, position] >= 0)
        return kl, objectives.sum_over_rows(changed.float(), line, len(rows)) == 0

    def rows(self, asked: Asked) -> Iterator[Batch]:
        """Prompts with their answers, in batches that fit into memory."""
        rows = [self.base.encode(prompt, answer) for prompt, answer in asked]
        for chosen in buckets([len(row.ids) for row in rows], self.budget):
            yield collate([rows[i] for i in chosen])
