"""Triples that hypernetworks are trained on: an edit, the same question in other words, and an unrelated question."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset, Sampler

from kedit_lightning.data import datasets
from kedit_lightning.edits import Edit
from kedit_lightning.errors import DataError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Triple:
    """What one edit is trained with.

    Args:
        edit: The edit.
        paraphrase: A prompt that must get the new answer too.
        unrelated: A prompt on something else, whose answer must stay as it is.
        answer: The text after it over which that is measured.
    """

    edit: Edit
    paraphrase: str
    unrelated: str
    answer: str


def answers_of(edit: Edit) -> list[tuple[str, str]]:
    """Unrelated prompts of an edit with their answers."""
    answers = edit.neighborhood_targets or (edit.target_true,) * len(edit.neighborhood_prompts)
    return [(prompt, text) for prompt, text in zip(edit.neighborhood_prompts, answers, strict=True) if text]


def complete(edits: Sequence[Edit], on_incomplete: Literal["raise", "skip"]) -> list[Edit]:
    """The edits that triples can be made of.

    Args:
        edits: The edits.
        on_incomplete: What becomes of the others.

    Raises:
        DataError: One has no paraphrase or no unrelated prompt with an answer, and is not to be skipped; or none is
            left.
    """
    found, left_out = [], 0
    for edit in edits:
        missing = [] if edit.paraphrase_prompts else ["paraphrase_prompts"]
        missing += [] if answers_of(edit) else ["neighborhood_prompts with an answer (neighborhood_targets)"]
        if missing and on_incomplete == "raise":
            msg = (
                f"case {edit.case_id} has no {' and no '.join(missing)}: a hypernetwork is trained on an edit, a "
                "paraphrase and an unrelated prompt; data.on_incomplete: skip leaves such records out"
            )
            raise DataError(msg)
        found += [] if missing else [edit]
        left_out += bool(missing)
    if left_out:
        _log.warning("left out %d of %d records without a paraphrase or an unrelated prompt", left_out, len(edits))
    if not found:
        msg = f"none of {len(edits)} records has both a paraphrase and an unrelated prompt with an answer"
        raise DataError(msg)
    return found


Place = tuple[int, int, int]
"""The number of an edit, and two of any size that say which of its paraphrases and unrelated prompts are taken."""


class _Triples(Dataset[Triple]):
    """A triple of each edit."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        self.edits = edits

    def __len__(self) -> int:
        return len(self.edits)

    def __getitem__(self, place: Place) -> Triple:
        edit, (one, other) = self.edits[place[0]], place[1:]
        paraphrases, unrelated = edit.paraphrase_prompts, answers_of(edit)
        return Triple(edit, paraphrases[one % len(paraphrases)], *unrelated[other % len(unrelated)])


class _Batches(Sampler[list[Place]]):
    """Full batches in an order that seed and epoch decide; of an epoch that was broken off those that are left.

    Args:
        n: Edits.
        size: Of a batch.
        seed: Of order and prompts.
        trainer: Knows the epoch, and how many of its batches are done; none: the first, from its beginning.
    """

    def __init__(self, n: int, size: int, seed: int, trainer: Trainer | None) -> None:
        self.n, self.size, self.seed, self.trainer = n, size, seed, trainer

    def __len__(self) -> int:
        return self.n // self.size

    def __iter__(self) -> Iterator[list[Place]]:
        trainer = self.trainer
        epoch = trainer.current_epoch if trainer else 0
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed if trainer else 0
        generator = torch.Generator().manual_seed(self.seed * EPOCHS + epoch)
        order = torch.randperm(self.n, generator=generator)[:, None]
        places = torch.cat([order, torch.randint(2**31, (self.n, 2), generator=generator)], dim=1)
        for batch in torch.split(places[: len(self) * self.size], self.size)[done:]:
            yield [(i, one, other) for i, one, other in batch.tolist()]


class _Resumed(DataLoader[Triple]):
    """Goes on in the middle of an epoch; where that was, the trainer knows."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to take up."""


EPOCHS = 2**20
"""Seeds are so far apart, an epoch each."""


class TripleData(LightningDataModule):
    """Triples from a data set of edits, the last of which are kept for validation.

    Args:
        dataset: As of the edits: ``almanac``, ``zsre``, ``jsonl``, …
        path: Its file or address, where it has one.
        size: Only so many edits.
        start: The first one taken.
        stop: The one before which to stop.
        options: What its loader takes beyond these; the almanac's ``skip_subjects`` keeps subjects for editing later.
        batch_size: Edits that are made together in a step.
        validation: How many of the last edits are for validation, in batches of the same size.
        seed: Of their order, and of which of an edit's prompts are taken when.
        on_incomplete: What becomes of edits without paraphrases or unrelated prompts.
        on_bad_record: What becomes of a record that cannot be used at all.

    Raises:
        DataError: A number is out of range, or the edits cannot be used.
    """

    def __init__(
        self,
        dataset: str = "almanac",
        path: str | None = None,
        size: int | None = None,
        start: int = 0,
        stop: int | None = None,
        options: dict[str, Any] | None = None,
        batch_size: int = 1,
        validation: int = 100,
        seed: int = 0,
        on_incomplete: Literal["raise", "skip"] = "raise",
        on_bad_record: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__()
        if min(batch_size, validation) < 1 or start < 0:
            got = f"{batch_size}, {validation} and {start}"
            msg = f"data: expected batch_size and validation of at least 1 and start of at least 0, got {got}"
            raise DataError(msg)
        self.dataset, self.path, self.size, self.options = dataset, path, size, options or {}
        self.start, self.stop, self.batch_size, self.validation = start, stop, batch_size, validation
        self.seed = seed
        self.on_incomplete: Literal["raise", "skip"] = on_incomplete
        self.on_bad_record: Literal["raise", "skip"] = on_bad_record
        self.edits: list[Edit] = []

    def setup(self, stage: str) -> None:
        """Load the edits, once.

        Raises:
            DataError: A record cannot be used, or too few are left to train on.
        """
        if self.edits:
            return
        found = datasets.load(self.dataset, self.path, size=self.size, on_bad_record=self.on_bad_record, **self.options)
        edits = complete(found[self.start : self.stop], self.on_incomplete)
        if len(edits) < self.validation + self.batch_size:
            msg = (
                f"data: expected at least {self.validation} edits for validation and {self.batch_size} for a step, got "
                f"{len(edits)}: lower data.validation or data.batch_size"
            )
            raise DataError(msg)
        self.edits = edits

    def train_dataloader(self) -> DataLoader[Triple]:
        """In another order every epoch; a last batch that is not full is left out."""
        triples = _Triples(self.edits[: -self.validation])
        batches = _Batches(len(triples), self.batch_size, self.seed, self.trainer)
        return _Resumed(triples, batch_sampler=batches, collate_fn=list)

    def val_dataloader(self) -> DataLoader[Triple]:
        """Always the same triples; of n batches each takes every n-th, so that facts of one subject are apart."""
        edits = self.edits[-self.validation :]
        n = -(-len(edits) // self.batch_size)
        batches = [[(i, 0, 0) for i in range(start, len(edits), n)] for start in range(n)]
        return DataLoader(_Triples(edits), batch_sampler=batches, collate_fn=list)

    def transfer_batch_to_device(self, batch: list[Triple], device: torch.device, dataloader_idx: int) -> list[Triple]:
        """Triples are text and stay where they are."""
        return batch
