"""Text to tensors: one tokenisation of a prompt with its continuation, and token positions from offsets.

Everything that differs between tokenizers is dealt with here and only here: the beginning-of-sequence token is counted
because the tokenizer itself puts it in, the leading space belongs to the joint string ``prompt + " " + target``, and
rows are padded on the right by their lengths, never by a token id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kedit_lightning.edits import Token
from kedit_lightning.errors import DataError, ModelError

IGNORE = -100


@dataclass(frozen=True)
class Row:
    """One prompt as token ids.

    Args:
        ids: Token ids of the prompt, then of the continuation without its last token; length t.
        targets: Token ids of the continuation, empty where there is none; length m.
        positions: Index of each token rule in ``ids``.
        owner: The edit that the prompt is of, where edits are side by side (`SideBySide`); -1: of none.
    """

    ids: list[int]
    targets: list[int]
    positions: dict[Token, int]
    owner: int = -1


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right.

    Args:
        input_ids: Token ids, shape ``(b, t)``.
        attention_mask: 1 at real tokens, shape ``(b, t)``.
        labels: At each position the target token it predicts, -100 elsewhere; shape ``(b, t)``. No shift is needed.
        at: For each token rule the position in every row, shape ``(b,)``.
        owner: The edit of each row, where edits are side by side; -1: of none; shape ``(b,)``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    at: dict[Token, Tensor]
    owner: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def position_ids(self) -> Tensor:
        """Position of every token in its row, shape ``(b, t)``."""
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device).expand_as(self.input_ids)

    def until(self, t: int) -> Batch:
        """The rows cut after their first t tokens; positions beyond are still in ``at``."""
        return Batch(self.input_ids[:, :t], self.attention_mask[:, :t], self.labels[:, :t], self.at, self.owner)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        at = {token: index.to(device) for token, index in values.pop("at").items()}
        return Batch(**{name: value.to(device) for name, value in values.items()}, at=at)

    def select(self, rows: Tensor) -> Batch:
        """The given rows, cut to their longest.

        Args:
            rows: Indices or a boolean mask over rows.
        """
        mask = self.attention_mask[rows]
        t = int(mask.sum(dim=1).max()) if len(mask) else 0
        return Batch(
            self.input_ids[rows][:, :t],
            mask[:, :t],
            self.labels[rows][:, :t],
            {token: index[rows] for token, index in self.at.items()},
            self.owner[rows],
        )


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    target: str | None = None,
    subject: tuple[int, int] | None = None,
    *,
    max_length: int,
    separate: bool = False,
) -> Row:
    """Tokenise a prompt, its continuation and the place of the subject in it.

    Args:
        tokenizer: A fast tokenizer.
        prompt: The prompt, not ending in white space.
        target: The continuation, joined to the prompt by one space.
        subject: Character span of the subject in ``prompt``; its token rules are left out without it.
        max_length: Longest row the model can read, in tokens.
        separate: Tokenise the continuation on its own, and put the text of all its tokens but the last behind the
            prompt, as the released codes do. It differs from the joint tokenisation (the default) only where a
            tokenizer gives a leading space a token of its own.

    Returns:
        The row: ids with the continuation (less its last token), target ids, positions.

    Raises:
        ModelError: The tokenizer gives no offsets.
        DataError: The row is empty or longer than the model's context.
    """
    if not tokenizer.is_fast:
        msg = f"expected a fast tokenizer (one that gives character offsets), got {type(tokenizer).__name__}"
        raise ModelError(msg)
    targets: list[int] = []
    if target is None:
        text = prompt
    elif separate:
        targets = tokenizer(f" {target}", add_special_tokens=False)["input_ids"]
        text = prompt + str(tokenizer.decode(targets[:-1]))
    else:
        text = f"{prompt} {target}"
    ids, spans = _tokens(tokenizer, text)
    # Special tokens have empty spans; a continuation starts at the first token that ends beyond the prompt.
    length = next((i for i, (_, end) in enumerate(spans) if end > len(prompt)), len(ids))
    if separate and target is not None:
        # The released codes find the subject in the prompt alone, and count the rest from the row's end.
        length, spans = len(ids) - len(targets) + 1, _tokens(tokenizer, prompt)[1]
    elif target is not None:
        targets, ids, spans = ids[length:], ids[: max(len(ids) - 1, length)], spans[:length]
    if length == 0:
        msg = f"expected a prompt of at least one token, got {prompt!r}"
        raise DataError(msg)
    if len(ids) > max_length:
        begin = repr(prompt[:60])
        msg = f"the prompt takes {len(ids)} tokens with its target, the model reads {max_length}: shorten {begin}…"
        raise DataError(msg)
    positions = {Token.PROMPT_LAST: length - 1}
    if subject is not None:
        start, stop = subject
        inside = [i for i, (a, b) in enumerate(spans) if max(a, start) < min(b, stop)]
        if not inside:
            msg = f"no token of {prompt!r} lies in the subject {prompt[start:stop]!r}"
            raise DataError(msg)
        positions[Token.SUBJECT_FIRST] = inside[0]
        positions[Token.SUBJECT_LAST] = inside[-1]
        positions[Token.SUBJECT_AFTER_LAST] = min(inside[-1] + 1, length - 1)
    return Row(ids, targets, positions)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text and their character spans, less the EOS with which a tokenizer may close every text."""
    encoding = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, spans, special = encoding["input_ids"], encoding["offset_mapping"], encoding["special_tokens_mask"]
    n = len(ids)
    while n and special[n - 1] and spans[n - 1] == (0, 0):
        n -= 1
    return ids[:n], spans[:n]


def collate(rows: Sequence[Row]) -> Batch:
    """Pad rows on the right into one batch.

    Args:
        rows: At least one row.

    Returns:
        The batch, on the CPU. Only the token rules that every row has are kept.
    """
    b, t = len(rows), max(len(row.ids) for row in rows)
    input_ids = torch.zeros(b, t, dtype=torch.long)
    mask = torch.zeros(b, t, dtype=torch.long)
    labels = torch.full((b, t), IGNORE)
    for i, row in enumerate(rows):
        n = len(row.ids)
        input_ids[i, :n] = torch.tensor(row.ids)
        mask[i, :n] = 1
        if row.targets:
            labels[i, n - len(row.targets) : n] = torch.tensor(row.targets)
    shared = [token for token in Token if all(token in row.positions for row in rows)]
    at = {token: torch.tensor([row.positions[token] for row in rows]) for token in shared}
    return Batch(input_ids, mask, labels, at, torch.tensor([row.owner for row in rows]))


def buckets(lengths: Sequence[int], max_tokens: int, extra: int = 0) -> list[list[int]]:
    """Share rows out to batches of similar length.

    Args:
        lengths: Tokens of each row.
        max_tokens: Budget of a batch, its padding included; a row beyond it has a batch of its own.
        extra: Tokens that every row will grow by.

    Returns:
        Indices of the rows of each batch, longest first.

    >>> buckets([2, 9, 3, 8], max_tokens=18)
    [[1, 3], [2, 0]]
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * (lengths[batches[-1][0]] + extra) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
