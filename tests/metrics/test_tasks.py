import math

import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef

from kedit_lightning.metrics.tasks import (
    ClozeAccuracy,
    ExactMatch,
    RougeMean,
    contains_answer,
    exact_match,
    rouge,
)


def measured(predictions, labels, classes=2):
    metric = ClozeAccuracy(classes)
    for prediction, label in zip(predictions, labels, strict=True):  # one by one: batches do not matter
        metric.update(torch.tensor([prediction]), torch.tensor([label]))
    return metric.compute()


def test_a_table_by_hand():
    """Class 0: 3 right, 1 as class 1, 1 invalid. Class 1: 2 right, 1 as class 0."""
    found = measured([0, 0, 0, 1, -1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1, 1])
    assert found["accuracy"] == 5 / 8
    assert found["answered"] == pytest.approx(5 / 7)
    assert found["invalid"] == 1 / 8
    first, second = 2 * 3 / (5 + 4), 2 * 2 / (3 + 3)
    assert found["f1"] == pytest.approx((5 * first + 3 * second) / 8)
    first, second = 2 * 3 / (4 + 4), 2 * 2 / (3 + 3)
    assert found["f1_answered"] == pytest.approx((4 * first + 3 * second) / 7)


@pytest.mark.parametrize("classes", [2, 4])
def test_as_scikit_learn_has_it_with_invalid_as_a_class(classes):
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(0, classes, (50,), generator=generator)
    predictions = torch.where(torch.rand(50, generator=generator) < 0.6, labels, -1)
    predictions[:10] = torch.randint(-1, classes, (10,), generator=generator)
    found = measured(predictions.tolist(), labels.tolist(), classes)
    assert found["f1"] == pytest.approx(f1_score(labels, predictions, average="weighted"))
    assert found["mcc"] == pytest.approx(matthews_corrcoef(labels, predictions))
    known = predictions >= 0
    assert found["f1_answered"] == pytest.approx(f1_score(labels[known], predictions[known], average="weighted"))


def test_a_model_that_answers_nothing():
    found = measured([-1, -1], [0, 1])
    assert (found["accuracy"], found["invalid"], found["f1"], found["mcc"]) == (0, 1, 0, 0)
    assert math.isnan(found["answered"])


@pytest.mark.parametrize(
    ("text", "answers", "strict", "contains"),
    [
        (" Wilhelm Röntgen.", ["Wilhelm Röntgen"], True, True),
        ("the U.S. Army", ["US army"], True, True),
        ("It was Wilhelm Röntgen, in 1901", ["Marie Curie", "wilhelm röntgen"], False, True),
        ("Wilhelm Conrad Röntgen", ["Wilhelm Röntgen"], False, False),
        ("manhattan", ["Man"], False, False),
        ("the a an", ["..."], True, False),  # nothing is left of either
        ("", ["x"], False, False),
    ],
)
def test_open_answers(text, answers, strict, contains):
    assert exact_match(text, answers) == strict
    assert contains_answer(text, answers) == contains


def test_exact_match_over_items():
    metric = ExactMatch()
    metric.update(torch.arange(3), torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0]))
    metric.update(torch.arange(3, 4), torch.tensor([1.0]), torch.tensor([1.0]))
    found = metric.compute()
    assert (found["strict"].mean, found["contains"].mean, found["strict"].n) == (0.5, 0.75, 4)


def test_rouge_by_hand():
    """5 words against 6, of which 4 match, 2 of 4 and 5 pairs, and 3 in order."""
    one, two, longest = rouge("Bob will bring a lamp!", "The lamp: Bob will bring one.")
    assert one == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))
    assert two == pytest.approx(2 * (2 / 4) * (2 / 5) / (2 / 4 + 2 / 5))
    assert longest == pytest.approx(2 * (3 / 5) * (3 / 6) / (3 / 5 + 3 / 6))
    assert rouge("lamp lamp lamp", "lamp")[0] == pytest.approx(0.5)  # clipped
    assert rouge("", "lamp") == (0, 0, 0)


def test_the_mean_of_rouges():
    metric = RougeMean()
    metric.update(torch.arange(2), torch.tensor([[1.0, 0.5, 0.75], [0.0, 0.0, 0.0]]))
    found = {name: summary.mean for name, summary in metric.compute().items()}
    assert found == {"rouge1": 0.5, "rouge2": 0.25, "rougeL": 0.375, "rouge": 0.375}
