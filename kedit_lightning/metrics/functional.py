"""What is measured: pure functions of tensors and texts, with the definitions of the papers.

NLL is in nats and, where nothing else is said, the mean over the target's tokens. A missing value is nan and stays nan.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kedit_lightning.solvers import double

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

WORD = r"\w+(?:['’-]\w+)*|[^\w\s]"
"""A word of the n-gram entropy: letters and digits, with inner apostrophes and hyphens, or one other character."""


@dataclass(frozen=True)
class PromptScores:
    """What teacher forcing tells about b prompts and their targets; every metric follows from these columns.

    Args:
        nll_sum: Sum over the target's tokens of -log p, shape ``(b,)``.
        nll_max: The largest of them, shape ``(b,)``.
        n_correct: Target tokens that are the arg-max, shape ``(b,)``.
        n_tok: Target tokens, shape ``(b,)``.
    """

    nll_sum: Tensor
    nll_max: Tensor
    n_correct: Tensor
    n_tok: Tensor

    def __len__(self) -> int:
        return len(self.n_tok)

    def __getitem__(self, rows: Tensor | slice | list[int]) -> PromptScores:
        return PromptScores(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def nll_mean(self) -> Tensor:
        """Mean NLL over the target's tokens, shape ``(b,)``."""
        return self.nll_sum / self.n_tok

    @property
    def token_accuracy(self) -> Tensor:
        """Share of target tokens that are the arg-max, shape ``(b,)``."""
        return self.n_correct / self.n_tok


def prompt_scores(logits: Tensor, targets: Tensor, row: Tensor, n: int) -> PromptScores:
    """Columns of n prompts from the logits at their target positions, in float32.

    Args:
        logits: Logits that predict each target token, shape ``(m, vocabulary)``.
        targets: The target tokens, shape ``(m,)``.
        row: The prompt of each target token, shape ``(m,)``.
        n: Number of prompts.
    """
    return gather_scores(*token_scores(logits, torch.arange(len(targets), device=row.device), targets), row, n)


def token_scores(logits: Tensor, line: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of m target tokens in float32, and 1 where one is the arg-max; both of shape ``(m,)``.

    Args:
        logits: Logits, shape ``(p, vocabulary)``.
        line: The line of logits that predicts each target token, shape ``(m,)``.
        targets: The target tokens, shape ``(m,)``.
    """
    logits = logits.float()
    return logits.logsumexp(dim=-1)[line] - logits[line, targets], (logits.argmax(dim=-1)[line] == targets).long()


def gather_scores(nll: Tensor, hit: Tensor, row: Tensor, n: int) -> PromptScores:
    """Columns of n prompts from `token_scores`.

    Args:
        nll: -log p of m target tokens, shape ``(m,)``.
        hit: 1 where one is the arg-max, shape ``(m,)``.
        row: The prompt of each, shape ``(m,)``.
        n: Number of prompts.
    """
    return PromptScores(
        nll.new_zeros(n).index_add(0, row, nll),
        nll.new_full((n,), -math.inf).scatter_reduce(0, row, nll, "amax"),
        hit.new_zeros(n).index_add(0, row, hit),
        torch.bincount(row, minlength=n),
    )


def success(better: Tensor, other: Tensor) -> Tensor:
    """1 where the better answer is strictly likelier; a tie fails.

    Args:
        better: NLL of the answer that should be likelier, shape ``(b,)``.
        other: NLL of the other answer, shape ``(b,)``.

    >>> success(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 2.0]))
    tensor([1., 0., 0.])
    """
    known = ~(better.isnan() | other.isnan())
    return torch.where(known, (better < other).to(better.dtype), math.nan)


def magnitude(better: Tensor, other: Tensor) -> Tensor:
    """Difference of the geometric-mean token probabilities of two answers, from their NLLs; shape ``(b,)``.

    >>> magnitude(torch.tensor([0.0]), torch.tensor([0.6931472]))
    tensor([0.5000])
    """
    return (-better).exp() - (-other).exp()


def per_case_mean(case: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the prompts of each case, so that cases count alike however many prompts they have.

    Args:
        case: The case of each prompt, shape ``(b,)``.
        values: One value a prompt, shape ``(b,)``.

    Returns:
        The cases in ascending order and their means, both of shape ``(n,)``.

    >>> per_case_mean(torch.tensor([7, 7, 3]), torch.tensor([1.0, 0.0, 1.0]))
    (tensor([3, 7]), tensor([1.0000, 0.5000]))
    """
    ids, inverse, count = torch.unique(case, return_inverse=True, return_counts=True)
    return ids, values.new_zeros(len(ids)).index_add(0, inverse, values) / count


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean; 0 if any value is 0, nan if any is missing.

    >>> round(harmonic_mean([98.4, 91.5, 26.9]), 3)
    51.488
    """
    if any(math.isnan(value) for value in values) or not values:
        return math.nan
    return 0.0 if 0 in values else len(values) / sum(1 / value for value in values)


def arithmetic_mean(values: Sequence[float]) -> float:
    """Arithmetic mean; nan if any value is missing."""
    return sum(values) / len(values) if values else math.nan


def words(text: str) -> list[str]:
    """Words and punctuation marks.

    >>> words("Ann's well-known friend, Bob.")
    ["Ann's", 'well-known', 'friend', ',', 'Bob', '.']
    """
    return re.findall(WORD, text)


def ngram_entropy(tokens: Sequence[str], n: int) -> float:
    """Entropy in bits of a text's n-grams; 0 where it has none.

    >>> round(ngram_entropy("a b a b a b".split(), 2), 7)
    0.9709506
    """
    counts = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    total = counts.total()
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if len(counts) > 1 else 0.0


def fluency(tokens: Sequence[str]) -> float:
    """Weighted n-gram entropy in bits, ``(H₂ + 2 H₃) / 3``; the papers print it times 100.

    >>> round(fluency("a b a b a b".split()), 7)
    0.9903169
    """
    return (ngram_entropy(tokens, 2) + 2 * ngram_entropy(tokens, 3)) / 3


def fit_tfidf(texts: Sequence[str]) -> TfidfVectorizer:
    """Vocabulary and document frequencies of all reference texts, with scikit-learn's defaults.

    Raises:
        ValueError: The texts hold no word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer().fit(texts)


def tfidf_consistency(vectorizer: TfidfVectorizer, generated: Sequence[str], references: Sequence[str]) -> float:
    """TF-IDF cosine between what was generated on a subject and texts on subjects that have the new attribute.

    Args:
        vectorizer: From `fit_tfidf`.
        generated: All texts generated for one case.
        references: All reference texts of the case's relation and new target.
    """
    rows = vectorizer.transform([" ".join(generated), " ".join(references)])
    return float((rows[0] @ rows[1].T).sum())


class Summary(NamedTuple):
    """A metric over cases, on its raw scale.

    Attributes:
        mean: Mean over cases.
        std: Standard deviation over cases, ddof 0.
        ci95: Half the width of the 95 % interval of the mean, ``1.96 std / √n``.
        n: Cases counted.
        skipped: Cases that lack what the metric needs.
    """

    mean: float
    std: float
    ci95: float
    n: int
    skipped: int = 0

    def as_dict(self) -> dict[str, float | int]:
        """The fields that hold a number, ready for JSON."""
        return {name: value for name, value in self._asdict().items() if not math.isnan(value)}


def summarize(values: Tensor) -> Summary:
    """Mean, standard deviation, interval and count of per-case values; nan counts as skipped.

    Args:
        values: Shape ``(n,)``.

    >>> summarize(torch.tensor([1.0, 0.0, 1.0, 0.0, float("nan")]))
    Summary(mean=0.5, std=0.5, ci95=0.49, n=4, skipped=1)
    """
    known = double(values[~values.isnan()])
    n, skipped = len(known), len(values) - len(known)
    if n == 0:
        return Summary(math.nan, math.nan, math.nan, 0, skipped)
    std = float(known.std(correction=0))
    return Summary(float(known.mean()), std, 1.96 * std / math.sqrt(n), n, skipped)
