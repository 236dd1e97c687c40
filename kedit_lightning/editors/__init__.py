"""Editors: locate · stages · write."""

from kedit_lightning.editors.alphaedit import AlphaEdit
from kedit_lightning.editors.base import Editor
from kedit_lightning.editors.ft import FT, ElasticNet
from kedit_lightning.editors.jeep import JEEP
from kedit_lightning.editors.malmen import MALMEN
from kedit_lightning.editors.memit import MEMIT
from kedit_lightning.editors.mend import MEND
from kedit_lightning.editors.pmet import PMET
from kedit_lightning.editors.rets import RETS
from kedit_lightning.editors.rome import ROME
from kedit_lightning.editors.stages import Loss, Outcome, Stage, ValueDelta
from kedit_lightning.editors.top import TOP

__all__ = [
    "FT",
    "JEEP",
    "MALMEN",
    "MEMIT",
    "MEND",
    "PMET",
    "RETS",
    "ROME",
    "TOP",
    "AlphaEdit",
    "Editor",
    "ElasticNet",
    "Loss",
    "Outcome",
    "Stage",
    "ValueDelta",
]
