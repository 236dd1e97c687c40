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
from kedit_lightning.models.full import FullForward
from kedit_lightning.models.processes import once, share

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
    it stands before this edit (Eqs. 4 of ROME, 5 of TOP, 11 of JEEP). Several processes share the rows out.

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
    at = {delta.site: batch.rows.at[delta.token].clone() for delta in deltas}
    kl_row = batch.bare if kl_prompt == "edit" else torch.nonzero(batch.essence)[:, 0]
    kl_at = batch.rows.at[deltas[0].token][kl_row]
    if slip is not None:
        kl_at = (kl_at - slip).clamp(min=0)
        at[deltas[0].site][kl_row] = kl_at
    m, prompts = len(batch), torch.bincount(batch.edit[~batch.essence], minlength=len(batch))
    # From here on the rows of this process, of whatever edit they are.
    mine = share(len(batch.rows)).to(batch.edit.device)
    rows, edit = batch.rows.select(mine), batch.edit[mine]
    at = {site: position[mine] for site, position in at.items()}
    kl_edit = torch.nonzero(torch.isin(kl_row, mine))[:, 0]
    if not kl_factor:  # then its rows do not run
        kl_edit = kl_edit[:0]
    kl_row, kl_at = torch.searchsorted(mine, kl_row[kl_edit]), kl_at[kl_edit]
    line, position = torch.nonzero(rows.labels >= 0, as_tuple=True)
    targets = rows.labels[line, position]
    asking = torch.nonzero(~batch.essence[mine])[:, 0]
    asked = torch.searchsorted(asking, line)
    # Where logits are needed: before every target token, then at the KL's places.
    read = torch.cat([line, kl_row]), torch.cat([position, kl_at])
    run = forward(rows, at) if len(read[0]) else None  # rows of which nothing is read do not run
    nothing = torch.zeros(0, 1, device=mine.device)
    with torch.no_grad():
        added = {site: delta[edit] for site, delta in (kl_reference or {}).items()}
        # In the very pass of the loss, so that at δ = 0 the KL is exactly 0: Adam makes steps of the rounding of two.
        reference = run.logits(added, read)[len(line) :].float().log_softmax(-1) if run and len(kl_row) else nothing

    def loss() -> Loss:
        logits = run.logits({delta.site: delta.delta[edit] for delta in deltas}, read) if run else nothing
        answers, at_kl = logits[: len(line)], logits[len(line) :]
        nll = objectives.mean_over_rows(objectives.nll(answers, targets), asked, len(asking))
        kl = objectives.essence_kl(at_kl.float().log_softmax(-1), reference)
        terms = {
            "nll": objectives.sum_over_rows(nll, edit[asking], m) / prompts,
            "kl": kl_factor * objectives.sum_over_rows(kl, kl_edit, m),
        }
        for delta in deltas:
            term = f"weight_decay_{delta.name}" if delta.name else "weight_decay"
            decay = once(delta.v_weight_decay * objectives.weight_decay(delta.delta, delta.origin))
            terms[term] = terms[term] + decay if term in terms else decay
        probability = objectives.sum_over_rows((-nll.detach()).exp(), edit[asking], m) / prompts
        missed = (answers.detach().argmax(dim=-1) != targets).float()
        return Loss(terms, probability, objectives.sum_over_rows(missed, edit[line], m))

    return loss
