import math

import pytest

from kedit_lightning.metrics import curve, interval_over_runs


@pytest.mark.parametrize(
    ("values", "mean", "half"),
    [
        # Student's t: 4.3027 for three runs, 2.7764 for five, by hand.
        ([0.97, 0.98, 0.99], 0.98, 4.3027 * 0.01 / math.sqrt(3)),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 3.0, 2.7764 * math.sqrt(2.5) / math.sqrt(5)),
        ([0.5, 0.5, 0.5], 0.5, 0.0),
        ([0.5, math.nan, 0.7], 0.6, 12.7062 * math.sqrt(0.02) / math.sqrt(2)),
    ],
)
def test_the_interval_over_runs_is_students(values, mean, half):
    assert interval_over_runs(values) == pytest.approx((mean, half), rel=1e-4)


def test_one_run_has_no_interval_and_none_no_mean():
    assert interval_over_runs([0.5])[0] == 0.5
    assert math.isnan(interval_over_runs([0.5])[1])
    assert all(math.isnan(value) for value in interval_over_runs([math.nan]))


def test_a_curve_is_sorted_and_leaves_out_the_unedited_model():
    points = [
        {"edits": edits, "seed": seed, "scores": {"ES": es, "R": None}}
        for edits, seed, es in ((10, 1, 0.8), (0, None, 0.1), (2, 0, 1.0), (10, 0, 1.0))
    ]
    rows = curve(points)
    assert [(row["edits"], row["runs"], row["ES"]) for row in rows] == [(2, 1, 1.0), (10, 2, pytest.approx(0.9))]
    assert math.isnan(rows[0]["ES_ci95"])
    assert math.isnan(rows[1]["R"])
