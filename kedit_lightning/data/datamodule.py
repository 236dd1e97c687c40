"""The stream of edit batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from kedit_lightning.data import datasets
from kedit_lightning.data.protocols import OnConflict, protocol_name, without_conflicts
from kedit_lightning.edits import Edit
from kedit_lightning.errors import DataError

SIDE_BY_SIDE = 64
"""Edits made side by side where their number is left open: what a crash can cost, and enough to fill a machine."""


class EditDataModule(LightningDataModule):
    """Streams edit batches to `fit` and the evaluation prompts to `validate` and `test`.

    The protocol is two numbers (design.md): single editing is ``batch_size: 1, restore_every: 1``; sequential editing
    ``1, null``; TOP's mass editing ``1, 100``; JEEP's and MEMIT's ``10000, null``.

    Args:
        dataset: ``almanac``, ``counterfact``, ``multi_counterfact``, ``counterfact_rs``, ``zsre`` or ``jsonl``.
        path: File or URL of the data; the almanac needs none, CounterFact, MCF and zsRE have a default URL.
        edits: Edits written out, instead of a data set: ``prompt`` with one ``{}``, ``subject``, ``target_new``; the
            rest (``target_true``, ``paraphrase_prompts``, …) optional.
        size: Number of records to load; all by default.
        start: First record of the stream.
        stop: Record after the last of the stream.
        batch_size: Edits solved together.
        restore_every: After how many edits the weights go back to the unedited model; null: never.
        parallel_edits: Single edits (``batch_size`` and ``restore_every`` 1) that are made side by side in one fit,
            each holding in its own rows alone, so that no weight is touched; null: 64 at most, as memory allows; 1: one
            by one.
        on_bad_record: ``raise``, or ``skip`` malformed records (they are counted and named).
        on_conflict: What becomes of edits that want different answers to one question (subject and relation) in one
            batch: ``raise``, or ``keep_last``, which leaves the earlier ones out (they are counted and named). One by
            one (``batch_size: 1``) the later edit wins by itself.
        options: What the data set's loader takes beyond these, such as ``target: alt`` for zsRE or
            ``facts_per_subject: 8`` for the almanac; see ``data/datasets.py``.
        snippets: Reference texts for consistency (``attribute_snippets.json``); the almanac brings its own.

    Raises:
        DataError: The stream numbers contradict each other, or the data cannot be read.
    """

    def __init__(
        self,
        dataset: Literal["almanac", "counterfact", "multi_counterfact", "counterfact_rs", "zsre", "jsonl"] = "almanac",
        path: str | None = None,
        edits: list[dict[str, Any]] | None = None,
        size: int | None = None,
        start: int = 0,
        stop: int | None = None,
        batch_size: int = 1,
        restore_every: int | None = None,
        parallel_edits: int | None = None,
        on_bad_record: Literal["raise", "skip"] = "raise",
        on_conflict: OnConflict = "raise",
        options: dict[str, Any] | None = None,
        snippets: str | None = None,
    ) -> None:
        super().__init__()
        for value, least, expected in (
            (batch_size, 1, "batch_size ≥ 1"),
            (restore_every, 1, "restore_every ≥ 1 or null"),
            (parallel_edits, 1, "parallel_edits ≥ 1 or null"),
            (start, 0, "start ≥ 0"),
            (stop, 0, "stop ≥ 0 or null"),
        ):
            if value is not None and value < least:
                msg = f"expected {expected}, got {value}"
                raise DataError(msg)
        if restore_every is not None and restore_every % batch_size:
            msg = (
                f"expected restore_every to be a multiple of batch_size, got {restore_every} and {batch_size}: set "
                f"data.restore_every to {batch_size} to restore after each batch, or to null to keep all edits"
            )
            raise DataError(msg)
        self.single = batch_size == restore_every == 1
        if parallel_edits is not None and parallel_edits > 1 and not self.single:
            msg = (
                f"parallel_edits: expected single edits, batch_size and restore_every 1, got {batch_size} and "
                f"{restore_every}: edits that a model holds together cannot be made side by side; leave it out"
            )
            raise DataError(msg)
        self.parallel_edits = parallel_edits
        self.dataset, self.path, self.given, self.size = dataset, path, edits, size
        self.start, self.stop = start, stop
        self.batch_size, self.restore_every = batch_size, restore_every
        self.on_bad_record: Literal["raise", "skip"] = on_bad_record
        self.on_conflict: OnConflict = on_conflict
        self.options, self.snippets = options or {}, snippets
        self.edits: list[Edit] = []
        self.subjects: list[str] = []  # of all records, what start and stop leave out too
        self.current: list[Edit] = []

    def setup(self, stage: str) -> None:
        """Load the edits, once however often it is called.

        Raises:
            DataError: A record is malformed (and not skipped), edits of one batch contradict each other (and are to
                be kept), or nothing is left to edit.
        """
        if self.edits:
            return
        if self.given is not None:
            loaded = datasets.inline(self.given, size=self.size, on_bad_record=self.on_bad_record)
        else:
            loaded = datasets.load(
                self.dataset, self.path, size=self.size, on_bad_record=self.on_bad_record, **self.options
            )
        asked = loaded[self.start : self.stop]
        if not asked:
            msg = f"nothing to edit: {len(loaded)} records, of which {self.start}:{self.stop} were asked for"
            raise DataError(msg)
        self.subjects = list(dict.fromkeys(edit.subject for edit in loaded))
        self.edits = without_conflicts(asked, self.batch_size, self.on_conflict)

    def reference_texts(self) -> datasets.ReferenceTexts | None:
        """Texts that an edited model's texts should resemble, by relation and target; None where there are none."""
        own_world = self.given is None and self.dataset == "almanac"
        return datasets.reference_texts("almanac" if own_world else self.snippets)

    @property
    def protocol_name(self) -> str:
        """How the edits are made, in words."""
        return protocol_name(len(self.edits), self.batch_size, self.restore_every)

    @property
    def protocol(self) -> dict[str, Any]:
        """Which edits are streamed, and how."""
        written_out = self.given is not None
        return {
            "dataset": "edits" if written_out else self.dataset,
            "path": None if written_out else self.path,
            "options": {} if written_out else self.options,
            "size": self.size,
            "start": self.start,
            "stop": self.stop,
            "on_conflict": self.on_conflict,
            "batch_size": self.batch_size,
            "restore_every": self.restore_every,
        }

    def groups(self) -> Iterator[list[list[Edit]]]:
        """Edit batches between two restorations of the weights."""
        every = self.restore_every or len(self.edits)
        for group in batched(self.edits, every):
            yield [list(batch) for batch in batched(group, self.batch_size)]

    def train_dataloader(self) -> Iterable[list[Edit]]:
        """The current edit batch, endlessly: the editor says when its stages are over."""
        return itertools.repeat(self.current)

    def val_dataloader(self) -> Iterable[list[Edit]]:
        """The edits in batches; nothing during `fit`, which evaluates by itself before and after."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            return []
        return DataLoader(self.edits, batch_size=self.batch_size, collate_fn=list)  # type: ignore[arg-type]

    def test_dataloader(self) -> Iterable[list[Edit]]:
        """The edits in batches."""
        return self.val_dataloader()

    def transfer_batch_to_device(self, batch: list[Edit], device: torch.device, dataloader_idx: int) -> list[Edit]:
        """Edits are text and stay where they are."""
        return batch


def given(datamodule: EditDataModule | None, stage: str) -> EditDataModule:
    """The data module, which Lightning's signatures leave open, with its edits loaded.

    Raises:
        DataError: There is none, or its edits cannot be used.
    """
    if datamodule is None:
        msg = "expected datamodule=EditDataModule(…), got none"
        raise DataError(msg)
    datamodule.setup(stage)
    return datamodule


def batched(items: Iterable[Edit], n: int) -> Iterator[tuple[Edit, ...]]:
    """The items in tuples of n, of which the last may be shorter."""
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, n)):
        yield batch
