"""What a model's head reads in the hidden states between its blocks: probabilities and ranks of tokens."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from kedit_lightning.edits import Site, Token
from kedit_lightning.models import Batch, LanguageModel, collate
from kedit_lightning.models.encoding import Row
from kedit_lightning.probes.word_sets import SETS, over_sets

ANSWERS = ("original", "target")
POSITIONS = (Token.SUBJECT_LAST, Token.PROMPT_LAST)
"""The two tokens of a prompt that are read: the subject's last, and that at which the answer is predicted."""


@torch.no_grad()
def states(base: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """What the first block is given, and what every block puts out, at the two `POSITIONS`.

    Args:
        base: The model, of l blocks.
        batch: b prompts with the place of their subject.

    Returns:
        Hidden states in float32, shape ``(b, 2, l + 1, d)``, and the likeliest next token of each prompt, ``(b,)``;
        both on the first block's device.
    """
    embedded: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        embedded.extend(hidden[rows.to(hidden.device), batch.at[token].to(hidden.device)] for token in POSITIONS)

    rows = torch.arange(len(batch))
    blocks = [Site(layer, "block") for layer in range(base.num_layers)]
    with ExitStack() as stack:
        stack.callback(base.layers[0].register_forward_pre_hook(keep, with_kwargs=True).remove)
        taps = [stack.enter_context(base.tap(dict.fromkeys(blocks, batch.at[token]))) for token in POSITIONS]
        likeliest = base.logits(batch, (rows, batch.at[Token.PROMPT_LAST])).argmax(dim=-1)
    by_layer = [[start, *(tap[site] for site in blocks)] for start, tap in zip(embedded, taps, strict=True)]
    found = [torch.stack([hidden.to(base.device).float() for hidden in layers], dim=1) for layers in by_layer]
    return torch.stack(found, dim=1), likeliest.to(base.device)


@torch.no_grad()
def unembedded(base: LanguageModel, hidden: Tensor, *, final_norm: bool) -> Tensor:
    """Logits of hidden states in float32, computed in the type of the weights; without the final norm not in float16.

    Args:
        base: The model.
        hidden: Shape ``(p, d)``.
        final_norm: Take all that the model does behind its last block, soft-caps and scales included, so that the last
            block's output gives the model's own logits; else the head's linear map alone: ``W h + b``.

    Returns:
        Shape ``(p, vocabulary)``.
    """
    head: nn.Module = base.model.get_output_embeddings()
    if not final_norm:
        given = next(head.parameters())
        if given.dtype == torch.float16:  # what no norm has made small may be beyond it
            wide = {name: weight.float() for name, weight in head.named_parameters()}
            return torch.func.functional_call(head, wide, hidden.to(given.device))  # type: ignore[no-any-return]
        logits: Tensor = head(hidden.to(given))
        return logits.float()

    def put(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        first = output[0] if isinstance(output, tuple) else output
        instead = hidden[:, None].to(first)
        return (instead, *output[1:]) if isinstance(output, tuple) else instead

    hook = base.layers[-1].register_forward_hook(put)
    try:
        return base.logits(collate([Row([0], [], {})]))[:, 0].float()
    finally:
        hook.remove()


def measured(logits: Tensor, answers: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Probability and rank of answers and sets of words, and the entropy.

    Args:
        logits: Shape ``(b, 2, l + 1, vocabulary)``.
        answers: The first token of each of the `ANSWERS`, shape ``(2, b)``.
        mask: The tokens of the `SETS`, shape ``(b, sets, vocabulary)``.

    Returns:
        By name, each of shape ``(b, 2, l + 1)``, on the CPU; nan for a set without words.
    """
    log_p = logits.log_softmax(dim=-1)
    p = log_p.exp()
    found = {"entropy": -(p * log_p).sum(dim=-1)}
    for name, tokens in zip(ANSWERS, answers, strict=True):
        found[f"{name}_probability"], found[f"{name}_rank"] = taken(p, tokens), ranks_of(logits, tokens).float()
    if mask is not None:
        size = mask.sum(dim=-1)[..., None, None]
        total = over_sets(p, mask).where(size > 0, math.nan)
        rank = over_sets(all_ranks(logits), mask) / size
        for i, name in enumerate(SETS):
            found[f"{name}_probability"], found[f"{name}_rank"] = total[:, i], rank[:, i]
    return {name: values.cpu() for name, values in found.items()}


def ranks_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """How many tokens are strictly likelier than each of some tokens: 0 for the likeliest (JEEP, Eq. 6).

    Args:
        logits: Shape ``(b, …, vocabulary)``.
        tokens: A token for each of the b rows, shape ``(b,)``.

    Returns:
        Shape ``(b, …)``.

    >>> ranks_of(torch.tensor([[3.0, 1.0, 2.0, 1.0]]), torch.tensor([1])).tolist()
    [2]
    """
    return (logits > taken(logits, tokens)[..., None]).sum(dim=-1)


def taken(values: Tensor, tokens: Tensor) -> Tensor:
    """Each row's values at a token of its own, shape ``(b, …)`` of ``(b, …, vocabulary)``."""
    index = tokens.reshape(-1, *[1] * (values.ndim - 1)).expand(*values.shape[:-1], 1)
    return values.gather(-1, index)[..., 0]


def all_ranks(logits: Tensor) -> Tensor:
    """The rank of every token, as in `ranks_of`; float32, shape ``(…, vocabulary)``.

    >>> all_ranks(torch.tensor([3.0, 1.0, 2.0, 1.0])).tolist()
    [0.0, 2.0, 1.0, 2.0]
    """
    ordered = logits.sort(dim=-1).values
    return (logits.shape[-1] - torch.searchsorted(ordered, logits.contiguous(), right=True)).float()
