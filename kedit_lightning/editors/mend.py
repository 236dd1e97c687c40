"""MEND: a network turns the gradient of an edit into a better one."""

from __future__ import annotations

from kedit_lightning.editors.learned import LearnedEditor
from kedit_lightning.hypernetworks.mend import MENDNetwork
from kedit_lightning.models import LanguageModel


class MEND(LearnedEditor):
    """Editing by transformed gradients (Mitchell et al., 2022, https://arxiv.org/abs/2110.11309).

    `kedit fit` of a `MENDTraining` trains it beforehand. Keys and output gradients of the last layers' MLPs
    are standardised by what they were in training, transformed by a small network a weight shape, and each matrix
    takes the sum of rank-one pseudo-gradients over all tokens of all edits: ``Δ = α Σ g̃ k̃ᵀ``, α learned a matrix.
    Many edits are many terms of one sum, with nothing that keeps them apart.

    Args:
        base: The frozen base model.
        hypernetwork: The file that the training leaves, its folder, or that of its versions (the newest).
        lr_scale: Factor of the learned step sizes.
        max_tokens: Tokens that go through the model together, padding included, as in `Editor`.

    Raises:
        KeditError: The hypernetwork cannot be used with this model.
    """

    kind = MENDNetwork

    def __init__(
        self, base: LanguageModel, hypernetwork: str, lr_scale: float = 1.0, max_tokens: int | None = None
    ) -> None:
        super().__init__(base, hypernetwork, scale=lr_scale, max_tokens=max_tokens)
