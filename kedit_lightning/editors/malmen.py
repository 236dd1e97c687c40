"""MALMEN: a network says what each edit wants to change, least squares writes it for all of them."""

from __future__ import annotations

from kedit_lightning.editors.learned import LearnedEditor
from kedit_lightning.hypernetworks.malmen import MALMENNetwork
from kedit_lightning.models import LanguageModel


class MALMEN(LearnedEditor):
    """Massive editing by meta-learning (Tan et al., 2023, https://arxiv.org/abs/2311.04661).

    `kedit fit` of a `MALMENTraining` trains it beforehand. A network as MEND's gives for each token of an
    answer the change ``d = −η (k·k̃) g̃`` that its value wants; ``Δ = Dᵀ K (KᵀK + e^λ I)⁻¹`` reconciles those of all
    edits, solved in float64. η and λ are learned a matrix. Any number of edits, in one batch.

    Args:
        base: The frozen base model.
        hypernetwork: The file that the training leaves, its folder, or that of its versions (the newest).
        max_tokens: Tokens that go through the model together, padding included, as in `Editor`.

    Raises:
        KeditError: The hypernetwork cannot be used with this model.
    """

    kind = MALMENNetwork

    def __init__(self, base: LanguageModel, hypernetwork: str, max_tokens: int | None = None) -> None:
        super().__init__(base, hypernetwork, scale=1.0, max_tokens=max_tokens)
