import math

import pytest
import torch

from kedit_lightning.metrics import GeneratedAccuracy, TfidfConsistency
from kedit_lightning.metrics.functional import words
from kedit_lightning.metrics.generation import says, text_entropies


@pytest.mark.parametrize(
    ("answer", "target", "expected"),
    [
        (" Dutch", "Dutch", True),
        ("Dutch.", "Dutch", True),
        ("\nTree  Hill is", "Tree Hill", True),
        (" Dutchman", "Dutch", False),
        (" not Dutch", "Dutch", False),
        (" dutch", "Dutch", False),
        ("", "Dutch", False),
    ],
)
def test_an_answer_begins_with_the_target_as_whole_words(answer, target, expected):
    assert says(answer, target) is expected


def test_words_need_no_download():
    assert words("Don't stop — well-known, 3 times!") == ["Don't", "stop", "—", "well-known", ",", "3", "times", "!"]


def test_text_entropy_is_the_fluency_of_its_words():
    assert text_entropies(["a b a b a b"]).item() == pytest.approx(0.9903169)
    assert math.isnan(text_entropies([]).mean())


def test_missing_references_are_counted():
    metric = TfidfConsistency()
    metric.update(torch.tensor([1, 2]), torch.tensor([0.25, math.nan]))
    summary = metric.compute()["value"]
    assert (summary.mean, summary.n, summary.skipped) == (0.25, 1, 1)


def test_generated_accuracy():
    metric = GeneratedAccuracy()
    metric.update(torch.tensor([1, 2]), torch.tensor([True, False]))
    assert metric.compute()["generated"].mean == 0.5
