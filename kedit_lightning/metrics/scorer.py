"""Score once, aggregate many: teacher-forced NLL of answers, from which every rewriting metric follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from kedit_lightning.edits import Token
from kedit_lightning.metrics.functional import PromptScores, prompt_scores
from kedit_lightning.metrics.stopwords import is_content
from kedit_lightning.models import LanguageModel, Row, buckets, collate


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

    def score(self, prompts: Sequence[str], targets: Sequence[str | int | Forced]) -> PromptScores:
        """Teacher-forced scores of answers.

        Args:
            prompts: b prompts; white space at their end is dropped.
            targets: The answer to each, joined to the prompt by one space, the id of one next token, or `Forced` ones.

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
        return self._score(rows)

    @torch.no_grad()
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
        for bucket in buckets([len(row.ids) for row in rows], self.max_tokens):
            batch = collate([rows[i] for i in bucket])
            last = self.base.logits(batch, (torch.arange(len(bucket)), batch.at[Token.PROMPT_LAST])).float()
            for i, ids in zip(bucket, last.topk(min(CANDIDATES, last.shape[1])).indices.tolist(), strict=True):
                decoded = (str(self.base.tokenizer.decode([token], skip_special_tokens=True)) for token in ids)
                content[i] = next((t for t, text in zip(ids, decoded, strict=True) if is_content(text)), ids[0])
                top[i] = ids[0]
        return content, top

    @torch.no_grad()
    def likeliest(self, asked: Sequence[tuple[str, str]]) -> list[list[int]]:
        """The likeliest token at each token of an answer that is read, as the reference of locality.

        Args:
            asked: Prompts, each with its answer.
        """
        rows = [self.base.encode(prompt.rstrip(), target.strip()) for prompt, target in asked]
        found: list[list[int]] = [[] for _ in rows]
        for bucket in buckets([len(row.ids) for row in rows], self.max_tokens):
            lengths = [len(rows[i].targets) for i in bucket]
            line = torch.arange(len(bucket)).repeat_interleave(torch.tensor(lengths))
            begin = [len(rows[i].ids) - length for i, length in zip(bucket, lengths, strict=True)]
            position = torch.cat([torch.arange(b, b + length) for b, length in zip(begin, lengths, strict=True)])
            logits = self.base.logits(collate([rows[i] for i in bucket]), (line, position))
            ids = iter(logits.argmax(dim=-1).tolist())
            for i, length in zip(bucket, lengths, strict=True):
                found[i] = list(islice(ids, length))
        return found

    @torch.no_grad()
    def _score(self, rows: Sequence[Row]) -> PromptScores:
        """Scores of encoded rows; one that is the beginning of another is read off the other's forward pass."""
        guests = _hosts([row.ids for row in rows])
        hosts = list(guests)
        parts: list[tuple[list[int], PromptScores]] = []
        for bucket in buckets([len(rows[host].ids) for host in hosts], self.max_tokens):
            batch = [hosts[j] for j in bucket]
            served = [(line, guest) for line, host in enumerate(batch) for guest in guests[host]]
            line, position, target, owner = torch.tensor(
                [
                    (line, len(rows[guest].ids) - len(rows[guest].targets) + j, token, k)
                    for k, (line, guest) in enumerate(served)
                    for j, token in enumerate(rows[guest].targets)
                ],
                dtype=torch.long,
            ).reshape(-1, 4).T  # fmt: skip
            logits = self.base.logits(collate([rows[host] for host in batch]), (line, position))
            scores = prompt_scores(logits, target.to(logits.device), owner.to(logits.device), len(served))
            parts.append(([guest for _, guest in served], scores))
        return _gather(parts)


def _hosts(ids: Sequence[list[int]]) -> dict[int, list[int]]:
    """For each row that begins no other, the rows that begin it (itself included); equal rows share one forward.

    >>> _hosts([[5, 6], [5], [5, 7], [5, 6]])
    {2: [2], 3: [3, 0, 1]}
    """
    guests: dict[int, list[int]] = {}
    host = -1
    # In lexicographic order a row stands right before the rows that it begins.
    for i in sorted(range(len(ids)), key=lambda i: (ids[i], i), reverse=True):
        if host < 0 or ids[host][: len(ids[i])] != ids[i]:
            host = i
        guests.setdefault(host, []).append(i)
    return guests


def _gather(parts: Sequence[tuple[list[int], PromptScores]]) -> PromptScores:
    """The parts' columns in the order of their row numbers, on the CPU."""
    order = torch.tensor([i for rows, _ in parts for i in rows], dtype=torch.long).argsort()
    names = ("nll_sum", "nll_max", "n_correct", "n_tok")
    empty = torch.zeros(0)
    columns = (torch.cat([empty, *(getattr(scores, name).cpu() for _, scores in parts)]) for name in names)
    sums, largest, correct, tokens = (column[order] for column in columns)
    return PromptScores(sums, largest, correct.long(), tokens.long())
