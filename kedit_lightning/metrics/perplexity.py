"""How well the model writes plain text: the perplexity of texts that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import cross_entropy

from kedit_lightning.errors import DataError
from kedit_lightning.models import IGNORE, LanguageModel, Row, buckets, collate


@torch.no_grad()
def perplexity(
    base: LanguageModel,
    texts: Sequence[str],
    max_tokens: int = 2048,
    progress: Callable[[int], object] | None = None,
) -> float:
    """``exp`` of the mean NLL, in nats, of all tokens after the first of each text; every token counts alike.

    Args:
        base: The model, as its weights are now.
        texts: The texts, none longer than the model's context.
        max_tokens: Budget of a batch in tokens, padding included. It changes speed and memory, never the number beyond
            rounding.
        progress: Called after every batch with the number of texts that are read.

    Returns:
        The perplexity, computed in float32 and summed in float64; infinite or nan where the model's NLL is.

    Raises:
        DataError: No text has two tokens, or one is longer than the model's context.
    """
    ids = [base.encode(text).ids for text in texts]
    rows = [Row(row[:-1], row[1:], {}) for row in ids if len(row) > 1]
    if not rows:
        msg = f"perplexity needs a text of two tokens at least, got {len(texts)} texts without one"
        raise DataError(msg)
    total = torch.zeros((), dtype=torch.float64)
    done = len(ids) - len(rows)
    for bucket in buckets([len(row.ids) for row in rows], max_tokens):
        batch = collate([rows[i] for i in bucket])
        line, position = (batch.labels != IGNORE).nonzero(as_tuple=True)
        logits = base.logits(batch, (line, position)).float()
        nll = cross_entropy(logits, batch.labels[line, position].to(logits.device), reduction="none")
        total += nll.cpu().double().sum()
        done += len(bucket)
        if progress is not None:
            progress(done)
    return float((total / sum(len(row.targets) for row in rows)).exp())
