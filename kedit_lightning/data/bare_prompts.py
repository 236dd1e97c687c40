"""The bare prompts of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kedit_lightning.data import datasets
from kedit_lightning.errors import DataError


@dataclass(frozen=True)
class BarePrompts:
    """The edit prompts of a data set's records, each with its subject in its slot.

    Args:
        dataset: As in `EditDataModule`.
        path: File or URL of the data; null: as in `EditDataModule`.
        size: How many, the first; null: all.
        options: What the data set's loader takes beyond these.
        prompts: Prompts written out, instead of a data set.
    """

    dataset: Literal["almanac", "counterfact", "multi_counterfact", "counterfact_rs", "zsre", "jsonl"] = "counterfact"
    path: str | None = None
    size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    prompts: list[str] | None = None

    def __call__(self) -> Sequence[str]:
        """The prompts.

        Raises:
            DataError: The data set cannot be read, or there is no prompt.
        """
        if self.prompts is None:
            return [edit.text for edit in datasets.load(self.dataset, self.path, size=self.size, **self.options)]
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            msg = f"prompts: expected at least one, none of them empty, got {self.prompts[:3]}"
            raise DataError(msg)
        return self.prompts[: self.size]
