"""Edits side by side: each one's updates hold in its own rows alone, and no weight is touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


class SideBySide:
    """Low-rank updates of edits that know nothing of each other: ``y += (k · right) leftᵀ`` in an edit's own rows.

    The sum is taken in float32 and joins the output in its type: unlike `EditableWeights.write` it rounds no weight.

    Args:
        model: The model; its linear maps are hooked while it is used.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._rows: Tensor | None = None
        self.clear()

    def clear(self) -> None:
        """Forget all updates."""
        for hook in self._hooks:
            hook.remove()
        self._updates: dict[str, dict[int, list[tuple[Tensor, Tensor]]]] = {}
        self._stacks: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._hooks = []

    def write(self, edit: int, name: str, left: Tensor, right: Tensor) -> None:
        """Add to the updates of an edit.

        Args:
            edit: Its number, at least 0; `Batch.owner` says which rows are its own.
            name: The name of a weight matrix of a linear map among the model's parameters.
            left: Shape ``(out, r)``.
            right: Shape ``(in, r)``.
        """
        if name not in self._updates:
            linear = self._model.get_submodule(name.removesuffix(".weight"))
            self._hooks.append(linear.register_forward_hook(lambda _, args, out: self._added(name, args[0], out)))
        self._updates.setdefault(name, {}).setdefault(edit, []).append((left.float(), right.float()))
        self._stacks.pop(name, None)

    @contextmanager
    def rows(self, owner: Tensor) -> Iterator[None]:
        """Say of which edit each row is in the forward passes inside the context; -1: of none; shape ``(b,)``."""
        before, self._rows = self._rows, owner
        try:
            yield
        finally:
            self._rows = before

    def _added(self, name: str, key: Tensor, output: Tensor) -> Tensor | None:
        if self._rows is None:
            return None
        line, left, right = self._stack(name, key.device)
        mine = line[self._rows.to(key.device).clamp(max=len(line) - 1)]
        keys = key.float().reshape(len(mine), -1, key.shape[-1])  # OPT runs its MLP on (b · t, k)
        return output + (keys @ right[mine].mT @ left[mine]).view_as(output).to(output)

    def _stack(self, name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Each edit's line in two stacks, ``(n, r, out)`` and ``(n, r, in)``; line 0, of zeros, is for one without.

        The last entry is that of no edit.
        """
        if name not in self._stacks:
            updates = self._updates[name]
            line = torch.zeros(max(updates) + 2, dtype=torch.long)
            line[list(updates)] = torch.arange(1, len(updates) + 1)
            sides = []
            for side in range(2):
                factors = [torch.cat([pair[side].T for pair in pairs]) for pairs in updates.values()]
                sides.append(pad_sequence([torch.zeros_like(factors[0]), *factors], batch_first=True))
            self._stacks[name] = line.to(device), sides[0].to(device), sides[1].to(device)
        return self._stacks[name]
