"""MEMIT: mass-editing memory in a transformer."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors.base import Editor
from kedit_lightning.editors.checks import at_least
from kedit_lightning.editors.closed_form import Spread
from kedit_lightning.editors.stages import Stage, below
from kedit_lightning.edits import Site, Token
from kedit_lightning.models import LanguageModel


class MEMIT(Editor):
    """Batch editing of several MLPs (Meng et al., 2022, https://arxiv.org/abs/2210.07229).

    `locate`: the last edited block's output at the subject's last token. `stages`: z makes the target likely.
    `write`: layer by layer the least-squares update for all edits at once (Eq. 14), each layer taking an even share of
    what z still lacks on the model edited so far.

    As in the released code λ multiplies the mean second moment, a key is the mean over groups of templates (the bare
    prompt counts a half), the KL sits at the subject's last token, and the loss has a clamp, a weight decay and an
    early stop at 0.05. ``preset: released`` also tokenises targets on their own.

    Args:
        base: The frozen base model.
        layers: Layers to edit, ascending.
        mom2_update_weight: λ, the weight of the second moment against the sum over the edits.
        spread: How the residual is shared over the layers: ``even``, or ``sqrt`` for more in the lower ones.
        stop: The stage ends for an edit when its loss is below this.
        shared: The settings of every editor, see `Editor`.
    """

    scheme = "memit"

    def __init__(
        self,
        base: LanguageModel,
        layers: list[int],
        mom2_update_weight: float = 15000,
        spread: Spread = "even",
        stop: float = 5e-2,
        **shared: Any,
    ) -> None:
        super().__init__(base, layers, **shared)
        at_least(1e-12, mom2_update_weight=mom2_update_weight)
        self.mom2_update_weight, self.rule, self.stop = mom2_update_weight, spread, stop

    def locate(self) -> None:
        """z: the last edited block's output at the subject's last token."""
        self.z = self.value_delta(Site(self.layer, "block"), Token.SUBJECT_LAST)

    def stages(self) -> Iterator[Stage]:
        """The values z."""
        yield Stage("z", (self.z,), lambda: self.edit_loss(self.z), self.v_num_grad_steps, below(self.stop))

    def write(self) -> Generator[WeightDelta, None, None]:
        """Every layer's least-squares update, keys and residuals read on the model edited below."""
        yield from self.spread(self.layers, {"mlp": self.z}, self.rule, self.mom2_update_weight)
