"""Callbacks: the weight update, the terminal, TensorBoard figures."""

from kedit_lightning.callbacks.base import EditCallback
from kedit_lightning.callbacks.weight_update import WeightUpdate

__all__ = ["EditCallback", "WeightUpdate"]
