"""How much memory there is, and how much a model takes of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kedit_lightning.edits import Site
from kedit_lightning.errors import KeditError
from kedit_lightning.models.devices import free_memory
from kedit_lightning.models.language_model import LanguageModel

CPU_TOKENS = 2048
"""Tokens of a batch on a CPU: enough to fill its cores; more of them only wait for each other's padding."""
SHARE = 0.5
"""Share of a GPU's free memory that activations may take; the rest is for the cache of keys and values, and solves."""


def token_budget(base: LanguageModel) -> int:
    """Tokens whose forward and backward pass through the model fits into memory, padding included.

    On a GPU from its free memory and what a token's activations take: in each layer about 16 vectors of the model's
    width and 4 of the key's, and the logits of a token in four. Elsewhere `CPU_TOKENS`.
    """
    if base.device.type != "cuda":
        return CPU_TOKENS
    weight, vocabulary = base.weight(Site(0, "mlp")), int(base.model.config.get_text_config().vocab_size)
    width, keys = weight.shape
    token = base.num_layers * (16 * width + 4 * keys) * weight.element_size() + vocabulary * 4
    return max(1, int(SHARE * free_memory(base.device) / token))


def require(base: LanguageModel, sites: Sequence[Site], n: int, kept: int = 0) -> None:
    """Refuse, before anything is done, more edits than main memory holds keys and values for.

    A layer is written with three k × k matrices and, an edit, three keys and four values, all in float64; ``kept`` more
    matrices of that size stay in memory for each.

    Raises:
        KeditError: It takes more than is free; the message says for how many edits there is room.
    """
    shapes = [base.weight(site).shape for site in sites]
    fixed = max(8 * 3 * k * k for _, k in shapes) + sum(8 * kept * k * k for _, k in shapes)
    each = max(8 * (3 * k + 4 * d) for d, k in shapes)
    free = free_memory(torch.device("cpu"))
    if fixed + n * each > free:
        room = max(0, (free - fixed) // each)
        msg = (
            f"{n:,} edits together need about {(fixed + n * each) / 2**30:.1f} GiB for their keys and values and the "
            f"solve, {free / 2**30:.1f} GiB are free: set data.batch_size to at most {room:,}"
        )
        raise KeditError(msg if room else msg.rpartition(":")[0] + ": a machine with more memory is needed")
