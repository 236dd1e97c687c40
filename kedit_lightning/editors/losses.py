"""The loss that seven editors share, over the rows of an edit batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from kedit_lightning import objectives
from kedit_lightning.data.prompts import EditBatch
from kedit_lightning.editors.stages import Loss, ValueDelta
from kedit_lightning.edits import Site
from kedit_lightning.models.encoding import Batch
from kedit_lightning.models.suffix import FullForward

KLPrompt = Literal["essence", "edit"]


def edit_loss(
    forward: Callable[[Batch, Mapping[Site, Tensor]], FullForward],
    batch: EditBatch,
    deltas: Sequence[ValueDelta],
    *,
    kl_factor: float,
    kl_prompt: KLPrompt = "essence",
    slip: Tensor | None = None,
    kl_reference: Mapping[Site, Tensor] | None = None,
) -> Callable[[], Loss]:
    """What evaluates ``nll + kl_factor · essence_kl + v_weight_decay · ‖δ‖/‖v₀‖²`` of m edits at their δs of that time.

    Every δ is added in every row at the row's own token. The KL is taken at the first δ's token, against the model as
    it stands before this edit (Eqs. 4 of ROME, 5 of TOP, 11 of JEEP).

    Args:
        forward: Gives the model on rows in which vectors are added at positions of sites.
        batch: The m edits.
        deltas: Their δs.
        kl_factor: Factor of the KL.
        kl_prompt: On which prompt the KL is taken: ``essence``, "{subject} is a", or ``edit``, the bare prompt.
        slip: How far to the left of that token of "{subject} is a" the first δ and the KL are, shape ``(m,)``.
        kl_reference: The δs, by their sites, with which the model is that the KL refers to, shape ``(m, d)``; by
            default none.
    """
    rows, edit, m = batch.rows, batch.edit, len(batch)
    at = {delta.site: rows.at[delta.token].clone() for delta in deltas}
    kl_row = batch.bare if kl_prompt == "edit" else torch.nonzero(batch.essence)[:, 0]
    kl_at = rows.at[deltas[0].token][kl_row]
    if slip is not None:
        kl_at = (kl_at - slip).clamp(min=0)
        at[deltas[0].site][kl_row] = kl_at
    line, position = torch.nonzero(rows.labels >= 0, as_tuple=True)
    targets = rows.labels[line, position]
    asking = torch.nonzero(~batch.essence)[:, 0]
    asked = torch.searchsorted(asking, line)
    # Where logits are needed: before every target token, then at the KL's place of every edit.
    read = torch.cat([line, kl_row]), torch.cat([position, kl_at])
    run = forward(rows, at)
    with torch.no_grad():
        added = {site: delta[edit] for site, delta in (kl_reference or {}).items()}
        reference = run.logits(added, (kl_row, kl_at)).float().log_softmax(-1)

    def loss() -> Loss:
        logits = run.logits({delta.site: delta.delta[edit] for delta in deltas}, read)
        answers, at_kl = logits[:-m], logits[-m:]
        nll = objectives.mean_over_rows(objectives.nll(answers, targets), asked, len(asking))
        terms = {
            "nll": objectives.mean_over_rows(nll, edit[asking], m),
            "kl": kl_factor * objectives.essence_kl(at_kl.float().log_softmax(-1), reference),
        }
        for delta in deltas:
            term = f"weight_decay_{delta.name}" if delta.name else "weight_decay"
            decay = delta.v_weight_decay * objectives.weight_decay(delta.delta, delta.origin)
            terms[term] = terms[term] + decay if term in terms else decay
        probability = objectives.mean_over_rows((-nll.detach()).exp(), edit[asking], m)
        likeliest = (answers.detach().argmax(dim=-1) == targets).float()
        return Loss(terms, probability, objectives.mean_over_rows(likeliest, edit[line], m) == 1)

    return loss
