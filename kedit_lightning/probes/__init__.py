"""Looking inside a model and its edits: the papers' analyses, a class each; `kedit probe` runs them."""

from kedit_lightning.probes.base import Finding, Probe, Study

__all__ = ["Finding", "Probe", "Study"]
