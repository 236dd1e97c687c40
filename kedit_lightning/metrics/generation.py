"""What an edited model writes by itself: metrics over generated texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kedit_lightning.metrics.functional import fluency, words
from kedit_lightning.metrics.per_case import PerCaseMetric


class GeneratedAccuracy(PerCaseMetric):
    """Share of cases whose free greedy answer to the edit prompt is the new target; see `says`."""

    def __init__(self) -> None:
        super().__init__("generated")

    def update(self, case_ids: Tensor, hits: Tensor) -> None:
        """Add cases.

        Args:
            case_ids: Shape ``(n,)``.
            hits: 1 where the answer is the new target, shape ``(n,)``.
        """
        self.append(case_ids, hits)


class NGramEntropy(PerCaseMetric):
    """Fluency: weighted n-gram entropy of generated texts in bits (times 100 in the papers' tables)."""

    def __init__(self) -> None:
        super().__init__("value")

    def update(self, case_ids: Tensor, entropies: Tensor) -> None:
        """Add texts.

        Args:
            case_ids: The case of each text, shape ``(b,)``.
            entropies: From `text_entropies`, shape ``(b,)``.
        """
        self.append(case_ids, entropies)


class TfidfConsistency(PerCaseMetric):
    """Consistency: TF-IDF cosine of generated texts with reference texts, from `functional.tfidf_consistency`.

    A case without relation id or reference text is nan, and counted as skipped.
    """

    def __init__(self) -> None:
        super().__init__("value")

    def update(self, case_ids: Tensor, cosines: Tensor) -> None:
        """Add cases.

        Args:
            case_ids: Shape ``(n,)``.
            cosines: Shape ``(n,)``.
        """
        self.append(case_ids, cosines)


def text_entropies(texts: Sequence[str]) -> Tensor:
    """Fluency of each text, shape ``(b,)``."""
    return torch.tensor([fluency(words(text)) for text in texts])


def says(answer: str, target: str) -> bool:
    """Whether a greedy continuation begins with the target as whole words; white space counts as one space.

    >>> [says(" Dutch,", "Dutch"), says(" Dutchman", "Dutch"), says(" the Dutch", "Dutch")]
    [True, False, False]
    """
    answer, target = " ".join(answer.split()), " ".join(target.split())
    return answer.startswith(target) and not answer[len(target) : len(target) + 1].isalnum()
