"""All metrics of one evaluation, by the names they are reported under."""

from __future__ import annotations

import math
import warnings
from collections.abc import Container, Mapping
from typing import cast

import torch
from torchmetrics import MetricCollection

from kedit_lightning.metrics.functional import Summary
from kedit_lightning.metrics.generation import GeneratedAccuracy, NGramEntropy, TfidfConsistency
from kedit_lightning.metrics.per_case import PerCaseMetric
from kedit_lightning.metrics.rewrite import (
    Agreement,
    HarmonicScore,
    PairwiseSuccess,
    RelationSpecificity,
    TargetAccuracy,
    Unchanged,
)

REWRITE = ("efficacy", "generalization", "s_specificity")


class EditMetrics(MetricCollection):
    """The metrics of one evaluation (before, or after), empty at first.

    Names carry the protocol: ``efficacy``, ``generalization``, ``s_specificity`` and ``r_specificity`` are pairwise
    success; with ``_magnitude`` the difference of probabilities, with ``_accuracy`` and ``_exact`` teacher-forced
    arg-max accuracy over tokens and whole answers. ``efficacy_generated`` is free greedy generation,
    ``r_specificity_unchanged`` the share of unchanged arg-maxes, ``locality`` (EAC) that over the tokens of the
    neighborhood's answers. ``score3`` and ``score4`` are harmonic means of the success triple and of all four,
    ``mean3`` and ``mean4`` arithmetic, ``score3_accuracy`` and ``mean3_accuracy`` of the accuracy triple (zsRE).
    """

    def __init__(self) -> None:
        metrics: dict[str, PerCaseMetric] = {
            "efficacy": PairwiseSuccess("new"),
            "generalization": PairwiseSuccess("new"),
            "s_specificity": PairwiseSuccess("true"),
            "r_specificity": RelationSpecificity(),
            "r_specificity/unchanged": Unchanged(),
            "locality": Agreement(),
            "efficacy/generated": GeneratedAccuracy(),
            "fluency": NGramEntropy(),
            "consistency": TfidfConsistency(),
        }
        metrics |= {f"{name}/target": TargetAccuracy() for name in REWRITE}
        super().__init__(metrics, compute_groups=False)  # type: ignore[arg-type]

    def metric(self, key: str) -> PerCaseMetric:
        """One metric; keys are a reported name, with ``/target`` for accuracies, ``/generated``, ``/unchanged``."""
        return cast(PerCaseMetric, self[key])

    def latest(self) -> dict[int, dict[str, float]]:
        """Per-case values of the last update under the reported names: case → name → value; missing ones left out."""
        found: dict[int, dict[str, float]] = {}
        for key in self.keys(keep_base=True):
            metric = self.metric(str(key))
            if len(metric.case_id) == 0:
                continue
            for case, values in metric.latest().items():
                known = {_name(str(key), column): value for column, value in values.items() if value == value}
                found.setdefault(case, {}).update(known)
        return {case: {name: values[name] for name in REPORTED if name in values} for case, values in found.items()}

    def add(self, lines: Mapping[int, Mapping[str, float]]) -> None:
        """Add cases by the values that `latest` gave of them, bit for bit: case → name → value."""
        cases = torch.tensor(list(lines), dtype=torch.long)
        for key in self.keys(keep_base=True):
            metric = self.metric(str(key))
            names = [_name(str(key), column) for column in metric.columns]
            columns = (torch.tensor([line.get(name, math.nan) for line in lines.values()]) for name in names)
            metric.append(cases, *columns)

    def compute(self) -> dict[str, Summary]:
        """Summaries on the raw scale by reported name; those of which no case has anything are left out.

        A collective call: with several processes every one must make it.
        """
        with warnings.catch_warnings():
            # A process without cases takes part all the same.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            found = {
                _name(str(key), column): summary
                for key in self.keys(keep_base=True)
                for column, summary in self.metric(str(key)).compute().items()
            }
            four = [self.metric(name) for name in (*REWRITE, "r_specificity")]
            accuracies = [self.metric(f"{name}/target") for name in REWRITE]
            for size, suffix, score in (
                (3, "", HarmonicScore(four[:3])),
                (4, "", HarmonicScore(four)),
                (3, "_accuracy", HarmonicScore(accuracies, "accuracy")),
            ):
                means = score.compute()
                found[f"score{size}{suffix}"], found[f"mean{size}{suffix}"] = means["harmonic"], means["arithmetic"]
        return {name: found[name] for name in REPORTED if found[name].n > 0}


REPORTED = (
    *(f"{name}{suffix}" for name in REWRITE for suffix in ("", "_magnitude", "_accuracy", "_exact")),
    *("r_specificity", "r_specificity_magnitude", "r_specificity_unchanged", "locality"),
    *("score3", "mean3", "score4", "mean4", "score3_accuracy", "mean3_accuracy"),
    *("efficacy_generated", "fluency", "consistency"),
)
"""Every name an evaluation may report, in the order of its report."""


def paper_names(reported: Container[str]) -> dict[str, str]:
    """JEEP's ES, GS, LS and Score under the names that they are reported by.

    They are pairwise success where edits have a present answer to compare with (CounterFact, MCF, the almanac), else
    per-token accuracy (zsRE; its questions on other subjects are Natural Questions with their gold answers).

    Args:
        reported: The names reported.

    >>> paper_names({"efficacy_accuracy"})["GS"], paper_names({"efficacy", "efficacy_accuracy"})["Score"]
    ('generalization_accuracy', 'score3')
    """
    suffix = "" if "efficacy" in reported else "_accuracy"
    names = zip(("ES", "GS", "LS", "Score"), (*REWRITE, "score3"), strict=True)
    return {name: f"{metric}{suffix}" for name, metric in names}


def eac_names() -> dict[str, str]:
    """The measures of EAC (Xu et al., 2024), all shares of tokens, under the names that they are reported by."""
    return {
        "reliability": "efficacy_accuracy",
        "generalization": "generalization_accuracy",
        "locality": "locality",
    }


def _name(key: str, column: str) -> str:
    """The reported name of a metric's column."""
    name = key.partition("/")[0]
    return name if column in ("success", "value") else f"{name}_{column}"
