"""Metrics: one scorer, many metrics, and the evaluator that applies them to edits."""

from kedit_lightning.data.datasets import ReferenceTexts
from kedit_lightning.metrics.collection import REPORTED, EditMetrics, eac_names, paper_names
from kedit_lightning.metrics.evaluation import Evaluation
from kedit_lightning.metrics.evaluator import Evaluator
from kedit_lightning.metrics.functional import PromptScores, Summary
from kedit_lightning.metrics.generation import GeneratedAccuracy, NGramEntropy, TfidfConsistency
from kedit_lightning.metrics.per_case import PerCaseMetric
from kedit_lightning.metrics.questions import Reference
from kedit_lightning.metrics.rewrite import (
    Agreement,
    HarmonicScore,
    PairwiseSuccess,
    RelationSpecificity,
    TargetAccuracy,
    Unchanged,
)
from kedit_lightning.metrics.runs import curve, interval_over_runs
from kedit_lightning.metrics.scorer import Scorer

__all__ = [
    "REPORTED",
    "Agreement",
    "EditMetrics",
    "Evaluation",
    "Evaluator",
    "GeneratedAccuracy",
    "HarmonicScore",
    "NGramEntropy",
    "PairwiseSuccess",
    "PerCaseMetric",
    "PromptScores",
    "Reference",
    "ReferenceTexts",
    "RelationSpecificity",
    "Scorer",
    "Summary",
    "TargetAccuracy",
    "TfidfConsistency",
    "Unchanged",
    "curve",
    "eac_names",
    "interval_over_runs",
    "paper_names",
]
