"""PMET: precise model editing in a transformer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors.checks import at_least
from kedit_lightning.editors.closed_form import Spread
from kedit_lightning.editors.memit import MEMIT
from kedit_lightning.editors.stages import Loss, Stage, below
from kedit_lightning.edits import Part, Site, Token
from kedit_lightning.models import LanguageModel


class PMET(MEMIT):
    """MEMIT with attention and MLP optimised together (Li et al., 2024, https://arxiv.org/abs/2308.08742).

    `locate`: the outputs of the last edited layer's MLP and attention at the subject's last token. `stages`: both δs in
    one stage. Where all target tokens are the likeliest in all rows, the next evaluation counts the NLL a tenth and the
    edit is done once the KL is at most 0.01. `write`: as MEMIT, the residual measured at the MLP's output and shared by
    square roots.

    As published only the MLP is written and the attention's δ, which keeps that of the MLP precise, is dropped;
    ``rewrite: both`` writes the attention's output projections too. Both keys of a layer are then read before either is
    written, as the released code means to for GPT-J (where it fails); ``preset: released`` does what that code does for
    other models and reads the MLP's keys after the attention is written.

    Args:
        base: The frozen base model.
        layers: Layers to edit, ascending.
        v_num_grad_steps: Loss evaluations at most.
        v_lr: Adam's learning rate.
        kl_factor: Factor of the essence KL.
        mom2_update_weight: λ, the weight of the second moment against the sum over the edits.
        nll_loss_factor: Factor of the NLL.
        rewrite: Weights to write: ``mlp``, or ``both`` for the attention too.
        spread: How the residual is shared over the layers.
        shared: ``stop`` of MEMIT, and the settings of every editor, see `Editor`.
    """

    def __init__(
        self,
        base: LanguageModel,
        layers: list[int],
        v_num_grad_steps: int = 30,
        v_lr: float = 0.2,
        kl_factor: float = 1.0,
        mom2_update_weight: float = 6000,
        nll_loss_factor: float = 1.0,
        rewrite: Literal["mlp", "both"] = "mlp",
        spread: Spread = "sqrt",
        **shared: Any,
    ) -> None:
        super().__init__(
            base,
            layers,
            v_num_grad_steps=v_num_grad_steps,
            v_lr=v_lr,
            kl_factor=kl_factor,
            mom2_update_weight=mom2_update_weight,
            spread=spread,
            **shared,
        )
        at_least(0, nll_loss_factor=nll_loss_factor)
        self.nll_loss_factor = nll_loss_factor
        self.rewrite: tuple[Part, ...] = ("mlp",) if rewrite == "mlp" else ("attn", "mlp")

    def sites(self) -> list[Site]:
        """The MLP of every layer, and with ``rewrite: both`` the attention."""
        return [Site(layer, part) for layer in self.layers for part in self.rewrite]

    def locate(self) -> None:
        """The MLP's and the attention's output in the last edited layer, at the subject's last token."""
        parts: tuple[Part, ...] = ("mlp", "attn")
        self.both = {part: self.value_delta(Site(self.layer, part), Token.SUBJECT_LAST) for part in parts}

    def stages(self) -> Iterator[Stage]:
        """Both values."""
        both = tuple(self.both.values())
        yield Stage("v", both, self._weighed_loss, self.v_num_grad_steps, self._stop, begin=self._count_fully)

    def _count_fully(self) -> None:
        self.factor = torch.full((len(self.edits),), float(self.nll_loss_factor))

    def _weighed_loss(self) -> Callable[[], Loss]:
        loss = self.edit_loss(*self.both.values())

        def weighed() -> Loss:
            found = loss()
            nll = found.terms["nll"]
            return replace(found, terms={**found.terms, "nll": self.factor[self.batch.index].to(nll) * nll})

        return weighed

    def _stop(self, loss: Loss) -> Tensor:
        """Below the threshold, or certain of the target with little KL; sets the factor of the next evaluation."""
        certain = loss.certain
        assert certain is not None
        self.factor[self.batch.index] = self.nll_loss_factor * torch.where(certain, 0.1, 1.0).cpu()
        return below(self.stop)(loss) | (certain & (loss.terms["kl"] <= 0.01))

    def write(self) -> Generator[WeightDelta, None, None]:
        """As MEMIT: every layer's least-squares update of each matrix."""
        deltas, together = {part: self.both[part] for part in self.rewrite}, self.preset == "paper"
        yield from self.spread(self.layers, deltas, self.rule, self.mom2_update_weight, together=together)
