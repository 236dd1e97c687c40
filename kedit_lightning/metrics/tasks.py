"""General abilities: metrics over what a model answers to tasks, and the pure functions behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.text.rouge import rouge_score

from kedit_lightning.almanac.tasks import normalise
from kedit_lightning.metrics.per_case import PerCaseMetric

ROUGES = ("rouge1", "rouge2", "rougeL")


class ClozeAccuracy(Metric):
    """Accuracy, weighted F1 and Matthews correlation of classifications, of which some are no class at all.

    Args:
        classes: Number of classes C.

    >>> metric = ClozeAccuracy(2)
    >>> metric.update(torch.tensor([0, 1, -1, 1]), torch.tensor([0, 1, 1, 0]))
    >>> {name: round(value, 3) for name, value in metric.compute().items()}
    {'accuracy': 0.5, 'answered': 0.667, 'invalid': 0.25, 'f1': 0.583, 'f1_answered': 0.667, 'mcc': 0.224}
    """

    full_state_update = False
    higher_is_better = True
    confusion: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.add_state("confusion", torch.zeros(classes, classes + 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add items.

        Args:
            predictions: Classes that were answered, -1 where the answer is none; shape ``(b,)``.
            labels: True classes, shape ``(b,)``.
        """
        predictions, labels = predictions.to(self.device), labels.to(self.device)
        column = torch.where(predictions < 0, self.classes, predictions)
        ones = torch.ones_like(labels)
        self.confusion.index_put_((labels, column), ones, accumulate=True)

    def compute(self) -> dict[str, float]:
        """The numbers; nan where there is nothing to divide by.

        ``accuracy`` counts over all items, ``answered`` over those with a class (the EAC script's "accuracy");
        ``invalid`` is the share without one. ``f1`` and ``mcc`` have invalid as a class of its own, as scikit-learn has
        it and AlphaEdit reports it; ``f1_answered`` leaves these items out.
        """
        table = self.confusion.double().cpu()
        right, total, answered = table.diagonal().sum(), table.sum(), table[:, :-1].sum()
        return {
            "accuracy": float(right / total),
            "answered": float(right / answered),
            "invalid": float(table[:, -1].sum() / total),
            "f1": weighted_f1(table),
            "f1_answered": weighted_f1(table[:, :-1]),
            "mcc": matthews(table),
        }


class ExactMatch(PerCaseMetric):
    """Open answers: ``strict``, the whole generation is an accepted answer; ``contains``, its words hold one."""

    def __init__(self) -> None:
        super().__init__("strict", "contains")

    def update(self, case_ids: Tensor, strict: Tensor, contains: Tensor) -> None:
        """Add items.

        Args:
            case_ids: The number of each item, shape ``(b,)``.
            strict: 1 where `exact_match`, shape ``(b,)``.
            contains: 1 where `contains_answer`, shape ``(b,)``.
        """
        self.append(case_ids, strict, contains)


class RougeMean(PerCaseMetric):
    """Summaries: F measures of ROUGE-1, ROUGE-2 and ROUGE-L, and their mean."""

    def __init__(self) -> None:
        super().__init__(*ROUGES, "rouge")

    def update(self, case_ids: Tensor, scores: Tensor) -> None:
        """Add items.

        Args:
            case_ids: The number of each item, shape ``(b,)``.
            scores: From `rouge`, shape ``(b, 3)``.
        """
        self.append(case_ids, *scores.T, scores.mean(dim=1))


def weighted_f1(confusion: Tensor) -> float:
    """F1 of each class, weighted by its items; a column more than classes holds invalid answers.

    Args:
        confusion: True class × answered class, shape ``(C, C)`` or ``(C, C + 1)``.
    """
    classes = len(confusion)
    support, answered = confusion.sum(dim=1), confusion.sum(dim=0)[:classes]
    f1 = 2 * confusion.diagonal() / (support + answered).clamp(min=1)
    return float((f1 * support).sum() / support.sum())


def matthews(confusion: Tensor) -> float:
    """Matthews correlation of several classes; 0 where answers or labels do not vary.

    Args:
        confusion: As in `weighted_f1`.
    """
    n, right = confusion.sum(), confusion.diagonal().sum()
    true, answered = confusion.sum(dim=1), confusion.sum(dim=0)
    spread = (n**2 - answered @ answered) * (n**2 - true @ true)
    covariance = right * n - true @ answered[: len(true)]
    return float(covariance / spread.sqrt()) if spread > 0 else (0.0 if n > 0 else math.nan)


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Whether a text is one of the answers, case, punctuation, articles and blanks aside.

    >>> exact_match(" The Beatles.", ["Beatles"]), exact_match("Beatles, I think", ["Beatles"])
    (True, False)
    """
    return normalise(text) in map(normalise, answers)


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether the words of one of the answers stand side by side in a text.

    >>> contains_answer("It was the Beatles, I think", ["Beatles"]), contains_answer("beatlesque", ["Beatles"])
    (True, False)
    """
    found = f" {normalise(text)} "
    return any(f" {wanted} " in found for wanted in map(normalise, answers) if wanted)


def rouge(text: str, reference: str) -> tuple[float, float, float]:
    """F measures of ROUGE-1, ROUGE-2 and ROUGE-L of a text, over lower-cased words without stemming.

    >>> [round(score, 4) for score in rouge("Ann goes to the park", "Ann will go to the park on Monday")]
    [0.6154, 0.3636, 0.6154]
    """
    scores = rouge_score(text, reference, rouge_keys=ROUGES)
    one, two, longest = (float(scores[f"{key}_fmeasure"]) for key in ROUGES)
    return one, two, longest
