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
    """

    ids: list[int]
    targets: list[int]
    positions: dict[Token, int]


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right.

    Args:
        input_ids: Token ids, shape ``(b, t)``.
        attention_mask: 1 at real tokens, shape ``(b, t)``.
        labels: At each position the target token it predicts, -100 elsewhere; shape ``(b, t)``. No shift is needed.
        at: For each token rule the position in every row, shape ``(b,)``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    at: dict[Token, Tensor]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def position_ids(self) -> Tensor:
        """Position of every token in its row, shape ``(b, t)``."""
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device).expand_as(self.input_ids)

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
        separate: Tokenise the continuation on its own, as the released codes do. It differs from the joint
            tokenisation (the default) only where a tokenizer gives a leading space a token of its own.

    Returns:
        The row: ids with the continuation (less its last token), target ids, positions.

    Raises:
        ModelError: The tokenizer gives no offsets.
        DataError: The row is empty or longer than the model's context.
    """
    if not tokenizer.is_fast:
        msg = f"expected a fast tokenizer (one that gives character offsets), got {type(tokenizer).__name__}"
        raise ModelError(msg)
    joint = prompt if target is None or separate else f"{prompt} {target}"
    encoding = tokenizer(joint, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids: list[int] = encoding["input_ids"]
    spans: list[tuple[int, int]] = encoding["offset_mapping"]
    # A tokenizer may close every text with EOS, which is neither prompt nor target.
    while ids and encoding["special_tokens_mask"][len(ids) - 1] and spans[len(ids) - 1] == (0, 0):
        ids = ids[:-1]
    spans = spans[: len(ids)]
    # Special tokens have empty spans; a continuation starts at the first token that ends beyond the prompt.
    length = next((i for i, (_, end) in enumerate(spans) if end > len(prompt)), len(ids))
    targets = ids[length:]
    if separate and target is not None:
        targets = tokenizer(f" {target}", add_special_tokens=False)["input_ids"]
        ids = ids + targets
    if target is None:
        length, targets = len(ids), []
    if length == 0:
        msg = f"expected a prompt of at least one token, got {prompt!r}"
        raise DataError(msg)
    ids = ids[: length + max(len(targets) - 1, 0)]
    if len(ids) > max_length:
        begin = repr(prompt[:60])
        msg = f"the prompt takes {len(ids)} tokens with its target, the model reads {max_length}: shorten {begin}…"
        raise DataError(msg)
    positions = {Token.PROMPT_LAST: length - 1}
    if subject is not None:
        start, stop = subject
        inside = [i for i, (a, b) in enumerate(spans[:length]) if max(a, start) < min(b, stop)]
        if not inside:
            msg = f"no token of {prompt!r} lies in the subject {prompt[start:stop]!r}"
            raise DataError(msg)
        positions[Token.SUBJECT_FIRST] = inside[0]
        positions[Token.SUBJECT_LAST] = inside[-1]
        positions[Token.SUBJECT_AFTER_LAST] = min(inside[-1] + 1, length - 1)
    return Row(ids, targets, positions)


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
    return Batch(input_ids, mask, labels, {k: torch.tensor([row.positions[k] for row in rows]) for k in shared})
