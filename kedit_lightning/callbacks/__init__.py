"""Callbacks: the weight update, the terminal, TensorBoard figures, the collapse watch."""

from kedit_lightning.callbacks.base import EditCallback
from kedit_lightning.callbacks.tasks import TaskCurves
from kedit_lightning.callbacks.thresholds import Thresholds
from kedit_lightning.callbacks.watch import CollapseWatch
from kedit_lightning.callbacks.weight_update import WeightUpdate

__all__ = ["CollapseWatch", "EditCallback", "TaskCurves", "Thresholds", "WeightUpdate"]
