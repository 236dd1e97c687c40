"""Editors: locate · stages · write."""

from kedit_lightning.editors.base import Editor
from kedit_lightning.editors.rome import ROME
from kedit_lightning.editors.stages import Outcome, Stage, ValueDelta
from kedit_lightning.editors.top import TOP

__all__ = ["ROME", "TOP", "Editor", "Outcome", "Stage", "ValueDelta"]
