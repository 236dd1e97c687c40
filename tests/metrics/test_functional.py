import math

import pytest
import torch

from kedit_lightning.metrics import functional as F

NAN = math.nan


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((98.4, 91.5, 26.9), 51.488),  # JEEP Table 2, GPT-J
        ((99.8, 90.9, 73.1), 86.453),  # JEEP Table 3, GPT-J
        ((98.7, 76.5, 72.2, 78.3), 80.280),  # TOP Table 1, GPT2-XL, TOP
        ((99.8, 75.4, 45.7, 88.5), 70.842),  # TOP Table 1, GPT2-XL, ROME
        ((1.0, 0.0, 1.0), 0.0),
    ],
)
def test_harmonic_mean_gives_the_scores_of_the_papers(parts, expected):
    assert F.harmonic_mean(parts) == pytest.approx(expected, abs=5e-4)


def test_a_mean_with_a_missing_part_is_missing():
    assert math.isnan(F.harmonic_mean([1.0, NAN, 0.0]))
    assert math.isnan(F.arithmetic_mean([1.0, NAN]))
    assert math.isnan(F.harmonic_mean([]))
    assert F.arithmetic_mean([99.8, 75.4, 45.7, 88.5]) == pytest.approx(77.35)


@pytest.mark.parametrize(
    ("text", "h2", "h3", "weighted"),
    [
        ("a b a b a b", 0.9709506, 1.0, 0.9903169),
        ("the cat sat on the mat and the cat ran", 2.9477028, 3.0, 2.9825676),
        ("one two", 0.0, 0.0, 0.0),
        ("", 0.0, 0.0, 0.0),
    ],
)
def test_fluency_is_the_weighted_entropy_of_bigrams_and_trigrams(text, h2, h3, weighted):
    tokens = text.split()
    assert F.ngram_entropy(tokens, 2) == pytest.approx(h2, abs=1e-7)
    assert F.ngram_entropy(tokens, 3) == pytest.approx(h3, abs=1e-7)
    assert F.fluency(tokens) == pytest.approx(weighted, abs=1e-7)


def test_a_tie_is_no_success_and_a_missing_answer_none_either_way():
    tie = torch.tensor([1.5])
    assert F.success(tie, tie).item() == 0
    result = F.success(torch.tensor([NAN, 1.0]), torch.tensor([1.0, NAN]))
    assert result.isnan().all()


def test_columns_of_a_prompt_and_mean_versus_sum():
    # Two answers over 3 tokens of vocabulary: one with one token at p = 0.5, one with two at p = 0.6 each.
    # The mean prefers the longer answer, the sum the shorter.
    rows = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.2, 0.2], [0.6, 0.3, 0.1]]).log()
    scores = F.prompt_scores(rows, torch.tensor([0, 0, 0]), torch.tensor([0, 1, 1]), 2)
    assert scores.nll_sum[0] < scores.nll_sum[1]
    assert scores.nll_mean[1] < scores.nll_mean[0]
    assert F.success(scores.nll_mean[1:], scores.nll_mean[:1]).item() == 1
    torch.testing.assert_close(scores.nll_mean, -torch.tensor([0.5, 0.6]).log())
    assert scores.n_tok.tolist() == [1, 2]


def test_max_and_accuracy_columns():
    rows = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]).log()
    scores = F.prompt_scores(rows, torch.tensor([0, 2, 2]), torch.tensor([0, 0, 0]), 1)
    assert scores.nll_max.item() == pytest.approx(-math.log(0.1), abs=1e-6)
    assert scores.token_accuracy.item() == pytest.approx(2 / 3)


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    scores = F.prompt_scores(logits, torch.arange(5), torch.arange(5), 5)
    expected = -logits.float().log_softmax(-1)[torch.arange(5), torch.arange(5)]
    assert scores.nll_sum.dtype == torch.float32
    torch.testing.assert_close(scores.nll_sum, expected)


def test_cases_count_alike_however_many_prompts_they_have():
    case, values = torch.tensor([5, 5, 5, 2]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    ids, means = F.per_case_mean(case, values)
    assert ids.tolist() == [2, 5]
    assert F.summarize(means).mean == 0.5  # pooled over prompts it would be 0.75


def test_summary_has_population_spread_and_counts_what_is_missing():
    summary = F.summarize(torch.tensor([0.0, 1.0, 1.0, NAN]))
    assert summary.mean == pytest.approx(2 / 3)
    assert summary.std == pytest.approx(math.sqrt(2 / 9))
    assert summary.ci95 == pytest.approx(1.96 * math.sqrt(2 / 9) / math.sqrt(3))
    assert (summary.n, summary.skipped) == (3, 1)
    assert F.summarize(torch.tensor([NAN])).as_dict() == {"n": 0, "skipped": 1}


def test_consistency_is_the_cosine_of_smooth_tfidf_vectors():
    corpus = ["dutch ships sail", "greek ships sail", "greek temples"]
    vectorizer = F.fit_tfidf(corpus)

    def vector(text):
        idf = {w: math.log(4 / (1 + sum(w in c.split() for c in corpus))) + 1 for c in corpus for w in c.split()}
        raw = {w: text.split().count(w) * idf[w] for w in idf}
        norm = math.sqrt(sum(v * v for v in raw.values()))
        return {w: v / norm for w, v in raw.items()}

    generated, references = ["dutch ships", "dutch temples"], ["dutch ships sail"]
    a, b = vector(" ".join(generated)), vector(" ".join(references))
    expected = sum(a[w] * b[w] for w in a)
    assert F.tfidf_consistency(vectorizer, generated, references) == pytest.approx(expected)
    assert F.tfidf_consistency(vectorizer, references, references) == pytest.approx(1.0)
    assert F.tfidf_consistency(vectorizer, ["zzz yyy"], references) == 0.0
