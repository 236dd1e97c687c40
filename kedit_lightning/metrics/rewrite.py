"""Whether an edit took, and what it left alone: metrics over teacher-forced scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torchmetrics.wrappers.abstract import WrapperMetric

from kedit_lightning.metrics.functional import Summary, arithmetic_mean, harmonic_mean, magnitude, success
from kedit_lightning.metrics.per_case import PerCaseMetric


class PairwiseSuccess(PerCaseMetric):
    """Share of prompts on which one answer is strictly likelier than the other, by mean NLL over their tokens.

    Efficacy and generalization (the new answer is better) and specificity on other subjects (the true one is), with
    the difference of the two probabilities as magnitude.

    Args:
        better: Which answer should be likelier.

    >>> import torch
    >>> metric = PairwiseSuccess("new")
    >>> metric.update(torch.tensor([3, 3]), torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0]))
    >>> metric.compute()["success"].mean
    0.5
    """

    def __init__(self, better: Literal["new", "true"]) -> None:
        super().__init__("success", "magnitude")
        self.better = better

    def update(self, case_ids: Tensor, nll_new: Tensor, nll_true: Tensor) -> None:
        """Add prompts.

        Args:
            case_ids: The case of each prompt, shape ``(b,)``.
            nll_new: Mean NLL of the new answer, shape ``(b,)``.
            nll_true: Mean NLL of the true answer, shape ``(b,)``.
        """
        pair = (nll_new, nll_true) if self.better == "new" else (nll_true, nll_new)
        self.append(case_ids, success(*pair), magnitude(*pair))


class RelationSpecificity(PerCaseMetric):
    """Share of prompts on the same subject in other relations on which the unedited model's answer stays likelier.

    The unedited model's answer is one token; it is compared with the *least likely* token of the new target (TOP).
    """

    def __init__(self) -> None:
        super().__init__("success", "magnitude")

    def update(self, case_ids: Tensor, nll_reference: Tensor, nll_max_new: Tensor) -> None:
        """Add prompts.

        Args:
            case_ids: The case of each prompt, shape ``(b,)``.
            nll_reference: NLL of the unedited model's answer, shape ``(b,)``.
            nll_max_new: Largest NLL among the tokens of the new target, shape ``(b,)``.
        """
        self.append(case_ids, success(nll_reference, nll_max_new), magnitude(nll_reference, nll_max_new))


class TargetAccuracy(PerCaseMetric):
    """Teacher-forced arg-max accuracy of an answer: the share of its tokens, and whether all of them are right."""

    def __init__(self) -> None:
        super().__init__("accuracy", "exact")

    def update(self, case_ids: Tensor, n_correct: Tensor, n_tok: Tensor) -> None:
        """Add prompts.

        Args:
            case_ids: The case of each prompt, shape ``(b,)``.
            n_correct: Tokens of the answer that are the arg-max, shape ``(b,)``.
            n_tok: Tokens of the answer, shape ``(b,)``; nan where there is no answer.
        """
        exact = (n_correct == n_tok).float().masked_fill(n_tok.isnan(), float("nan"))
        self.append(case_ids, n_correct / n_tok, exact)


class Unchanged(PerCaseMetric):
    """Share of prompts on the same subject in other relations whose likeliest next token is what it was."""

    def __init__(self) -> None:
        super().__init__("unchanged")

    def update(self, case_ids: Tensor, same: Tensor) -> None:
        """Add prompts.

        Args:
            case_ids: The case of each prompt, shape ``(b,)``.
            same: 1 where the token is the same, shape ``(b,)``.
        """
        self.append(case_ids, same)


class Agreement(PerCaseMetric):
    """Share of an answer's tokens, read on prompts of other subjects, whose arg-max is the unedited model's: locality.

    As EAC's code and EasyEdit have it; EAC's formula compares with the model before the last edit instead.
    """

    def __init__(self) -> None:
        super().__init__("value")

    def update(self, case_ids: Tensor, n_same: Tensor, n_tok: Tensor) -> None:
        """Add prompts.

        Args:
            case_ids: The case of each prompt, shape ``(b,)``.
            n_same: Tokens whose arg-max is the unedited model's, shape ``(b,)``.
            n_tok: Tokens of the answer, shape ``(b,)``; nan where there is no answer.
        """
        self.append(case_ids, n_same / n_tok)


class HarmonicScore(WrapperMetric):
    """One number for an editor: the harmonic mean of several metrics' means over cases, and the arithmetic one.

    It is computed from the children's own (synchronised) means, never averaged over cases or processes. 0 if a child
    is 0, nan if one is missing.

    Args:
        children: The metrics.
        column: Which of their columns counts.
    """

    def __init__(self, children: Sequence[PerCaseMetric], column: str = "success") -> None:
        super().__init__()
        self.parts = list(children)
        self.column = column

    def update(self) -> None:
        """Nothing: the children are updated by themselves."""

    def compute(self) -> dict[str, Summary]:
        """The harmonic and the arithmetic mean; n is the smallest of the children's, spread is not defined."""
        parts = [child.compute()[self.column] for child in self.parts]
        means, n, nan = [part.mean for part in parts], min(part.n for part in parts), float("nan")
        return {
            "harmonic": Summary(harmonic_mean(means), nan, nan, n),
            "arithmetic": Summary(arithmetic_mean(means), nan, nan, n),
        }
