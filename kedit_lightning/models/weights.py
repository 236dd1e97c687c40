"""Weights that can be edited and always be given back their pristine bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kedit_lightning.errors import ModelError
from kedit_lightning.models.offloading import settle, value_of

HALVES = (torch.bfloat16, torch.float16)
"""Types of weights that keep a float32 master of each edited matrix."""


class EditableWeights:
    """The weight matrices of a model by name, with what they were before any edit.

    One that a device map has offloaded stays on the device that computes with it from the first time it is asked for.

    Args:
        model: The model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._pristine: dict[str, Tensor] = {}
        self._masters: dict[str, Tensor] = {}

    def weight(self, name: str) -> Tensor:
        """View of a weight matrix in math orientation, shape ``(out, in)``; of a bias or a norm, ``(out, 1)``.

        Raises:
            ModelError: The model has no such weight.
        """
        settle(self._owner(name))
        return self._value(name)

    def as_parameter(self, name: str, value: Tensor) -> Tensor:
        """A value of a weight as the model holds that weight: its orientation, type and device; differentiable.

        Args:
            name: The weight's name among the model's parameters.
            value: In math orientation, shape ``(out, in)`` or ``(out, 1)``.
        """
        owner = self._owner(name)
        settle(owner)
        own = self.model.get_parameter(name)
        return (value[:, 0] if own.ndim == 1 else math_view(value, owner)).to(own)

    def _owner(self, name: str) -> nn.Module:
        """The module whose parameter a weight is."""
        try:
            self.model.get_parameter(name)
            return self.model.get_submodule(name.rpartition(".")[0])
        except AttributeError as error:
            msg = f"expected the name of a weight matrix of this model, got {name!r}: {error}"
            raise ModelError(msg) from error

    def _value(self, name: str) -> Tensor:
        """A weight as it is, in math orientation; read for the moment where it is offloaded."""
        owner = self._owner(name)
        return math_view(value_of(owner, name.rpartition(".")[2]), owner)

    def pristine(self, name: str) -> Tensor:
        """A weight as it was before any edit, in its own type; shape ``(out, in)`` or ``(out, 1)``."""
        edited = self._pristine.get(name)
        return self._value(name) if edited is None else edited

    def master(self, name: str) -> Tensor:
        """A weight in float32, with all updates so far at full precision; shape ``(out, in)`` or ``(out, 1)``."""
        return self._masters.get(name, self.weight(name)).float()

    @torch.no_grad()
    def write(self, name: str, update: Tensor) -> None:
        """Add an update to a weight.

        Args:
            name: The weight's name among the model's parameters.
            update: float32, math orientation, shape ``(out, in)``; for a bias ``(out, 1)``.

        Raises:
            ModelError: There is no such weight, or it has another shape.
        """
        weight = self.weight(name)
        if weight.shape != update.shape:
            msg = f"expected an update of shape {tuple(weight.shape)} for {name}, got {tuple(update.shape)}"
            raise ModelError(msg)
        if name not in self._pristine:
            self._pristine[name] = weight.detach().clone()
        if weight.dtype not in HALVES:
            weight.add_(update.to(weight.device))
            return
        self._masters[name] = self.master(name) + update.to(weight.device)
        weight.copy_(self._masters[name])

    @torch.no_grad()
    def restore(self) -> None:
        """Give every edited matrix its pristine bits back."""
        self._masters.clear()
        for name, pristine in self._pristine.items():
            self.weight(name).copy_(pristine)

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Give the edited matrices their pristine values inside the context."""
        put_back = self._snapshot()
        try:
            self.restore()
            yield
        finally:
            put_back()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Keep the writes inside the context only if it ends without an exception (an interrupt counts as one)."""
        put_back = self._snapshot()
        try:
            yield
        except BaseException:
            put_back()
            raise

    def _snapshot(self) -> Callable[[], None]:
        """What gives all matrices the values that they have now."""
        before = {name: self.weight(name).detach().clone() for name in self._pristine}
        masters = dict(self._masters)

        @torch.no_grad()
        def put_back() -> None:
            for name, pristine in self._pristine.items():
                self.weight(name).copy_(before.get(name, pristine))
            self._masters = masters

        return put_back


def math_view(parameter: Tensor, owner: nn.Module) -> Tensor:
    """View of a module's weight as ``(out, in)``; GPT-2's ``Conv1D`` is told by its type, never by its shape."""
    if parameter.ndim == 1:
        return parameter[:, None]
    return parameter.T if isinstance(owner, Conv1D) else parameter
