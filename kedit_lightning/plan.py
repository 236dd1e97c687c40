"""What a run will take before it begins: rows, steps, memory, time, files; and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kedit_lightning.calibration import Step

DISK = "disk"
"""The place of what is written."""


@dataclass(frozen=True)
class Rows:
    """What edits are as rows.

    Args:
        rows: Rows of all edits.
        tokens: Tokens of each edit, in no order.
        parts: Of the edits of each fit (a batch, or single ones side by side) the tokens of each part, with padding.
    """

    rows: int
    tokens: Sequence[int]
    parts: Sequence[Sequence[int]]

    @property
    def padding(self) -> float:
        """Share of the parts that is padding."""
        return 1 - sum(self.tokens) / sum(map(sum, self.parts))

    @property
    def largest(self) -> int:
        """Tokens of the largest part, padding included."""
        return max(map(max, self.parts))


@dataclass(frozen=True)
class Need:
    """Something that a place must hold.

    Args:
        place: A device, or the disk.
        what: In words.
        size: Bytes.
    """

    place: str
    what: str
    size: float


@dataclass(frozen=True)
class Moments:
    """The second moments of the keys.

    Args:
        sites: How many are needed, k × k each.
        missing: How many must be computed first.
        tokens: Over how many tokens; None: over all of ``documents``.
        documents: Documents at most.
        seconds: Seconds a token; None where nothing is missing.
    """

    sites: int
    missing: int = 0
    tokens: int | None = None
    documents: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Args:
        title: The editor and the protocol.
        layers: Layers of the model.
        batches: Edits of each batch.
        beside: How many single edits are made side by side; 1: batch after batch.
        passes: Passes of each batch.
        rows: The edits as rows.
        budget: Tokens of a part at most.
        steps: A step of every stage, measured; none where the memory for it is not there.
        weights: Bytes of the model's weights, which are loaded.
        moments: The second moments of the keys.
        needs: What must be held, beside the model.
        free: Bytes that are free, by place.
        room: How many edits can be made together at most.
        measuring: Seconds for measuring.
        commits: Bytes of each commit's tensors.
        merged: Bytes of those of delta.safetensors.
        run: The run directory.
    """

    title: str
    layers: int
    batches: Sequence[int]
    beside: int
    passes: int
    rows: Rows
    budget: int
    steps: Sequence[Step]
    weights: int
    moments: Moments
    needs: Sequence[Need]
    free: Mapping[str, int]
    room: int
    measuring: float
    commits: Sequence[int]
    merged: int
    run: Path

    def needed(self, place: str) -> float:
        """Bytes that a place must hold."""
        return sum(need.size for need in self.needs if need.place == place)

    @property
    def tight(self) -> list[str]:
        """Places that cannot hold what they must."""
        return [place for place, free in self.free.items() if self.needed(place) > free]

    @property
    def optimising(self) -> float:
        """Seconds for all steps, at most: stages may end early. A part takes time as it has tokens."""
        of_a_part = sum(step.prepare + step.steps * step.seconds for step in self.steps)
        return of_a_part * sum(map(sum, self.rows.parts)) / self.steps[0].part if self.steps else math.nan

    @property
    def collecting(self) -> float:
        """Seconds for the second moments that are missing; nan where that is not known."""
        moments = self.moments
        if not moments.missing:
            return 0.0
        return math.nan if moments.tokens is None or moments.seconds is None else moments.tokens * moments.seconds

    @property
    def advice(self) -> str:
        """What to lower where it does not fit; empty where it does."""
        if not self.tight:
            return ""
        if DISK in self.tight:
            return f"make room on the disk of {self.run.parent}, or set trainer.save_dir to another"
        if self.room < max(self.batches):
            return f"set data.batch_size to at most {self.room:,}" if self.room else "a larger machine is needed"
        return "set model.init_args.max_tokens to a part of that, or base.dtype to bfloat16"
