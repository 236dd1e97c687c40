"""What the almanac's model is trained to do, and where it is made to keep what it knows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from kedit_lightning.almanac.rows import Rows

RESOLUTION = 1e-3
"""Attention below this share counts as none: what it carries drowns in bfloat16."""


class Losses(NamedTuple):
    """What is minimised, each a scalar.

    Attributes:
        text: Mean next-token loss under the weights of the tokens.
        leak: Sum over the heads of the first layers of ``log(1 + a / RESOLUTION)``, a being the attention to
            names, mean over the tokens outside names that come after one.
        look: Mean over the tokens before objects of ``-log a``, a being the attention to the last token of the
            subject's name in the layer after the first ones, summed over its heads and at most one.
        recall: Mean cross-entropy between the objects of a subject, each equally likely, and what the head reads from
            the last token of its name after the first layers.
    """

    text: Tensor
    leak: Tensor
    look: Tensor
    recall: Tensor


def losses(model: GPT2LMHeadModel, rows: Rows, late: int) -> Losses:
    """The loss of the text, and of keeping what is known of a subject at the last token of its name.

    Left to itself, a small model has the words after a name read it in its first layer and carries the subject's
    identity on any of them; an update of a weight made for the subject's last token then misses. In a large model the
    first layers enrich the subject's last token with what is known of the subject, whatever is asked next, and later
    layers pick what is asked for (https://arxiv.org/abs/2304.14767). The other three losses bring that about.

    Args:
        model: The model, with attention of the kind that gives its weights.
        rows: A batch.
        late: Number of first layers.
    """
    out = model(input_ids=rows.ids[:, :-1], output_attentions=True, output_hidden_states=True)
    each = torch.nn.functional.cross_entropy(
        out.logits.float().flatten(0, 1), rows.ids[:, 1:].flatten(), reduction="none"
    )
    weight = rows.weights[:, 1:].flatten().float()
    text = (each * weight).sum() / weight.sum()

    known = (rows.objects >= 0).float()
    name = rows.names[:, :-1]
    after = (~name & (name.cumsum(dim=1) > 0)).float()
    leaks = []
    for attention in out.attentions[:late]:
        paid = (attention.float() * name[:, None, None].float()).sum(dim=-1)
        leaks.append((paid / RESOLUTION).log1p().sum(dim=1))
    leak = (torch.stack(leaks).sum(dim=0) * after).sum() / after.sum().clamp(min=1)

    looks = rows.looks[:, :-1]
    at = looks.clamp(min=0)[:, None, :, None].expand(-1, out.attentions[late].shape[1], -1, 1)
    seen = out.attentions[late].float().gather(-1, at)[..., 0].sum(dim=1)
    unread = -(seen + RESOLUTION).clamp(max=1).log()
    look = (unread * (looks >= 0)).sum() / (looks >= 0).sum().clamp(min=1)

    hidden = out.hidden_states[late]
    enriched = hidden.gather(1, rows.ends[..., None].expand(-1, -1, hidden.shape[-1]))
    brought = model.lm_head(model.transformer.ln_f(enriched)).float().log_softmax(-1)
    found = (brought.gather(-1, rows.objects.clamp(min=0)) * known).sum(-1) / known.sum(-1).clamp(min=1)
    return Losses(text, leak, look, -found.sum() / known.amax(-1).sum().clamp(min=1))
