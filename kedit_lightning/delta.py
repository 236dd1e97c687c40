"""Weight updates as small files: save, load, merge, apply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kedit_lightning.errors import DeltaError, ModelError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.fingerprint import fingerprint
from kedit_lightning.models.processes import of_first
from kedit_lightning.solvers import times
from kedit_lightning.tensor_files import TensorFile

FILE = TensorFile(
    "kedit-delta-1",
    "delta file",
    "a run keeps them in its folder as delta.safetensors and deltas/",
    "take another copy, or edit again",
    DeltaError,
)
MEMORY = "memory/"
"""Begins the names of tensors that are no updates."""


@dataclass(frozen=True)
class WeightDelta:
    """Update Δ of one weight matrix: low-rank factors, or dense.

    Args:
        name: The weight's name among the model's parameters.
        left: Left factor, shape ``(out, r)``.
        right: Right factor, shape ``(in, r)``; ``Δ = left rightᵀ``.
        dense: Δ itself, shape ``(out, in)``, instead of the factors.
        edit: Which edit of its batch it writes; None: all of them.
    """

    name: str
    left: Tensor | None = None
    right: Tensor | None = None
    dense: Tensor | None = None
    edit: int | None = None

    @classmethod
    def low_rank(cls, name: str, left: Tensor, right: Tensor, edit: int | None = None) -> WeightDelta:
        """Update from factors of shapes ``(out, r)`` and ``(in, r)``; kept dense where that is smaller."""
        (out, r), inner = left.shape, right.shape[0]
        if r > out * inner / (out + inner):
            return cls(name, dense=times(left, right).float().cpu().contiguous(), edit=edit)
        return cls(name, left.float().cpu().contiguous(), right.float().cpu().contiguous(), edit=edit)

    @property
    def update(self) -> Tensor:
        """Δ in float32, shape ``(out, in)``; the product is taken in float64."""
        if self.dense is not None:
            return self.dense
        left, right = self.factors
        return (left.double() @ right.double().T).float()

    def of_first_process(self) -> WeightDelta:
        """The same as the first process has solved it, in all of them."""
        if self.dense is not None:
            return replace(self, dense=of_first(self.dense))
        left, right = map(of_first, self.factors)
        return replace(self, left=left, right=right)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Left and right factor, shapes ``(out, r)`` and ``(in, r)``; of a dense update itself and the identity."""
        if self.dense is not None:
            return self.dense, torch.eye(self.dense.shape[1])
        assert self.left is not None
        assert self.right is not None
        return self.left, self.right

    @property
    def norm(self) -> float:
        """‖Δ‖ (Frobenius), in float64; of factors without their product."""
        if self.dense is not None:
            return float(self.dense.double().norm())
        grams = [factor.double().T @ factor.double() for factor in self.factors]
        return float((grams[0] * grams[1]).sum().clamp(min=0).sqrt())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are saved."""
        named = {"left": self.left, "right": self.right, "dense": self.dense}
        return {key: value for key, value in named.items() if value is not None}

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(out, in)`` of the matrix."""
        if self.dense is not None:
            return self.dense.shape[0], self.dense.shape[1]
        return self.factors[0].shape[0], self.factors[1].shape[0]


def save(
    path: Path,
    deltas: Sequence[WeightDelta],
    metadata: dict[str, Any],
    memory: Mapping[str, Tensor] | None = None,
) -> None:
    """Save updates in the order in which they are added.

    Args:
        path: A ``.safetensors`` file.
        deltas: The updates.
        metadata: JSON-able: editor, configuration, case ids, fingerprint of the base model.
        memory: What the editor remembers of this commit, by name.

    Raises:
        KeditError: The file cannot be written; nothing is left of it.
    """
    # Cloned, because an update's factors may share their memory with others'.
    tensors = {
        f"{i:06d}/{delta.name}/{kind}": tensor.clone(memory_format=torch.contiguous_format)
        for i, delta in enumerate(deltas)
        for kind, tensor in delta.tensors.items()
    }
    FILE.write(path, tensors | {f"{MEMORY}{name}": tensor for name, tensor in (memory or {}).items()}, metadata)


def load(path: Path) -> tuple[list[WeightDelta], dict[str, Any]]:
    """Load updates and their metadata.

    Args:
        path: A file that `save` wrote.

    Returns:
        The updates in the order in which they are added, and the metadata.

    Raises:
        DeltaError: The file is missing, corrupt, truncated or of another kind.
    """
    metadata, tensors, _ = FILE.read(path)
    found: dict[str, dict[str, Any]] = {}
    for key in sorted(key for key in tensors if not key.startswith(MEMORY)):
        where, _, kind = key.rpartition("/")
        found.setdefault(where, {})[kind] = tensors[key]
    return [WeightDelta(where.split("/", 1)[1], **kinds) for where, kinds in found.items()], metadata


def load_memory(path: Path) -> dict[str, Tensor]:
    """What the editor remembered of a commit, by name; empty for most editors.

    Raises:
        DeltaError: The file is missing, corrupt, truncated or of another kind.
    """
    tensors = FILE.read(path).tensors
    return {key.removeprefix(MEMORY): tensor for key, tensor in tensors.items() if key.startswith(MEMORY)}


def load_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a file that `save` wrote, without its tensors.

    Raises:
        DeltaError: The file is missing, corrupt, truncated or of another kind.
    """
    return FILE.read(path, with_tensors=False).metadata


def merge(deltas: Iterable[WeightDelta]) -> list[WeightDelta]:
    """One update a matrix, in the order of first appearance; equal to the sequence up to rounding."""
    by_name: dict[str, list[WeightDelta]] = {}
    for delta in deltas:
        by_name.setdefault(delta.name, []).append(delta)
    return [parts[0] if len(parts) == 1 else _sum(parts) for parts in by_name.values()]


def _sum(parts: Sequence[WeightDelta]) -> WeightDelta:
    lefts = [part.left for part in parts if part.left is not None]
    rights = [part.right for part in parts if part.right is not None]
    if len(lefts) == len(parts):
        return WeightDelta.low_rank(parts[0].name, torch.cat(lefts, dim=1), torch.cat(rights, dim=1))
    total = parts[0].update.double()
    for part in parts[1:]:
        total += part.update
    return WeightDelta(parts[0].name, dense=total.float())


def check(base: LanguageModel, deltas: Sequence[WeightDelta], metadata: dict[str, Any], path: Path) -> None:
    """Refuse updates that were not made for this model.

    Raises:
        DeltaError: A matrix is missing or of another shape, or the fingerprint differs.
    """
    for delta in deltas:
        try:
            shape = tuple(base.weight(delta.name).shape)
        except ModelError:
            shape = None
        if shape != delta.shape:
            msg = (
                f"{path}: the delta is of another model: it updates {delta.name} of shape {delta.shape}, this model "
                f"has {shape or 'no such matrix'}; it was made for {metadata.get('base', 'an unknown model')}"
            )
            raise DeltaError(msg)
    made_on = metadata.get("fingerprint")
    if made_on is not None and fingerprint(base, made_on["names"]) != made_on["value"]:
        msg = (
            f"{path}: the delta is of another model: configuration, tokenizer or edited matrices differ from those of "
            f"{metadata.get('base', 'its base model')}; apply it to the model it was made on"
        )
        raise DeltaError(msg)
