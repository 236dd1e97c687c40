"""Score once, aggregate many: teacher-forced NLL of answers, from which every rewriting metric follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kedit_lightning.metrics.functional import PromptScores, gather_scores, token_scores
from kedit_lightning.metrics.stopwords import is_content
from kedit_lightning.models import LanguageModel, Row
from kedit_lightning.models.prefixes import answers


@dataclass(frozen=True)
class Forced:
    """Tokens that are asked for while another answer is read.

    Args:
        text: The answer that is read.
        ids: A token for each token of it.
    """

    text: str
    ids: tuple[int, ...]


CANDIDATES = 20
"""Likeliest next tokens among which a content word is looked for."""


class Scorer:
    """Asks the model, as its weights are now, how likely answers are.

    Args:
        base: The model.
        max_tokens: Budget of a batch in tokens, padding included. It changes speed and memory, never a number beyond
            rounding.
    """

    def __init__(self, base: LanguageModel, max_tokens: int = 8192) -> None:
        self.base = base
        self.max_tokens = max_tokens

    def score(
        self, prompts: Sequence[str], targets: Sequence[str | int | Forced], owners: Sequence[int] | None = None
    ) -> PromptScores:
        """Teacher-forced scores of answers.

        Args:
            prompts: b prompts; white space at their end is dropped.
            targets: The answer to each, joined to the prompt by one space, the id of one next token, or `Forced` ones.
            owners: The edit that each is asked of, where edits are side by side (`Row.owner`).

        Returns:
            Columns of shape ``(b,)`` on the CPU, in the order given.

        Raises:
            DataError: A prompt and its answer are longer than the model's context.
        """
        rows = []
        for prompt, target in zip(prompts, targets, strict=True):
            if isinstance(target, str):
                rows.append(self.base.encode(prompt.rstrip(), target.strip()))
            elif isinstance(target, Forced):
                rows.append(Row(self.base.encode(prompt.rstrip(), target.text.strip()).ids, list(target.ids), {}))
            else:
                rows.append(Row(self.base.encode(prompt.rstrip()).ids, [target], {}))
        if owners is not None:
            rows = [replace(row, owner=owner) for row, owner in zip(rows, owners, strict=True)]
        return self._score(rows)

    def next_token(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What the model would say next, as the reference of relation specificity.

        Args:
            prompts: b prompts.

        Returns:
            The likeliest content token (the first of the 20 likeliest that is neither empty nor a function word, else
            the likeliest) and the likeliest token, both of shape ``(b,)`` on the CPU.
        """
        rows = [self.base.encode(prompt.rstrip()) for prompt in prompts]
        content, top = torch.zeros(len(rows), dtype=torch.long), torch.zeros(len(rows), dtype=torch.long)
        for part in answers(self.base, rows, self.max_tokens):
            likely = part.logits.float().topk(min(CANDIDATES, part.logits.shape[1])).indices.tolist()
            for i, line in zip(part.row.tolist(), part.line.tolist(), strict=True):
                ids = likely[line]
                decoded = (str(self.base.tokenizer.decode([token], skip_special_tokens=True)) for token in ids)
                content[i] = next((t for t, text in zip(ids, decoded, strict=True) if is_content(text)), ids[0])
                top[i] = ids[0]
        return content, top

    def likeliest(self, asked: Sequence[tuple[str, str]]) -> list[list[int]]:
        """The likeliest token at each token of an answer that is read, as the reference of locality.

        Args:
            asked: Prompts, each with its answer.
        """
        rows = [self.base.encode(prompt.rstrip(), target.strip()) for prompt, target in asked]
        found = [[0] * len(row.targets) for row in rows]
        for part in answers(self.base, rows, self.max_tokens):
            ids = part.logits.argmax(dim=-1).cpu()[part.line]
            for i, j, token in zip(part.row.tolist(), part.index.tolist(), ids.tolist(), strict=True):
                found[i][j] = token
        return found

    def _score(self, rows: Sequence[Row]) -> PromptScores:
        """Scores of encoded rows."""
        first = torch.tensor([0, *(len(row.targets) for row in rows)]).cumsum(dim=0)
        targets = torch.tensor([token for row in rows for token in row.targets], dtype=torch.long)
        nll, hit = torch.zeros(len(targets)), torch.zeros(len(targets), dtype=torch.long)
        for part in answers(self.base, rows, self.max_tokens):
            at = first[part.row] + part.index
            found = token_scores(part.logits, part.line.to(part.logits.device), targets[at].to(part.logits.device))
            nll[at], hit[at] = (column.cpu() for column in found)
        row = torch.arange(len(rows)).repeat_interleave(first.diff())
        return gather_scores(nll, hit, row, len(rows))
