"""Looking inside a model and its edits: the papers' analyses, a class each; `kedit probe` runs them."""

from kedit_lightning.probes.base import Finding, Probe, Study
from kedit_lightning.probes.contrast import ContrastProbe
from kedit_lightning.probes.drift import NormDrift
from kedit_lightning.probes.independence import ConditionalIndependence
from kedit_lightning.probes.indirect_effect import RelativeIndirectEffect
from kedit_lightning.probes.saliency import GradientSaliency
from kedit_lightning.probes.trace import CausalTrace
from kedit_lightning.probes.value_pca import ValuePCA

__all__ = [
    "CausalTrace",
    "ConditionalIndependence",
    "ContrastProbe",
    "Finding",
    "GradientSaliency",
    "NormDrift",
    "Probe",
    "RelativeIndirectEffect",
    "Study",
    "ValuePCA",
]
