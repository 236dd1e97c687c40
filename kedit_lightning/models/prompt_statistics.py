"""Second moments of keys where prompts end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kedit_lightning.models.language_model import LanguageModel
from kedit_lightning.models.statistics import Statistics


@dataclass(frozen=True)
class Prompts:
    """Prompts as a corpus.

    Args:
        texts: The prompts; one that occurs twice counts twice.
    """

    texts: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.texts)

    def identity(self) -> str:
        """What the keys depend on."""
        return f"last tokens of {self.size} prompts {hashlib.sha256(repr(self.texts).encode()).hexdigest()}"


@dataclass(frozen=True)
class PromptStatistics(Statistics):
    """Second moments of the keys at the last tokens of prompts, computed and kept as those of documents are.

    RETS' subject constraint (https://arxiv.org/abs/2408.15091) sums them over a data set.

    Args:
        prompts: The prompts.
    """

    source: str = "prompts"
    prompts: tuple[str, ...] = ()

    @classmethod
    def like(cls, statistics: Statistics, prompts: Sequence[str]) -> PromptStatistics:
        """Those of prompts, computed and kept as other statistics are, but in float64: beside a sum, C is small."""
        same = {name: getattr(statistics, name) for name in ("forward_dtype", "ridge", "batch_tokens", "cache_dir")}
        return cls(tokens="full", mom2_dtype="float64", prompts=tuple(prompts), **same)

    @property
    def given(self) -> Path | None:
        """No statistics file."""
        return None

    def _tokenise(self, base: LanguageModel, max_length: int, tokens: int | None) -> tuple[Iterator[torch.Tensor], int]:
        del max_length, tokens  # a prompt has its last token only where it is whole
        return (torch.tensor(base.encode(text).ids, dtype=torch.int32) for text in self.prompts), -1

    @property
    def _corpus(self) -> Prompts:  # type: ignore[override]
        return Prompts(self.prompts)
