"""One pass over documents that sums the second moments of keys, run by a Lightning Trainer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor, distributed

from kedit_lightning.edits import Site
from kedit_lightning.errors import StatisticsError
from kedit_lightning.interrupts import interrupts_passed_on
from kedit_lightning.models.encoding import Batch, Row, buckets, collate
from kedit_lightning.models.language_model import LanguageModel
from kedit_lightning.models.quiet import quiet
from kedit_lightning.models.second_moment import SecondMoment


class KeyPass(LightningModule):
    """Sums the second moments of several sites' keys, one forward pass a batch.

    Base model and sums are plain attributes, not registered: Lightning neither moves nor broadcasts them.

    Args:
        base: The base model, unedited.
        sites: Whose keys.
        documents: Token ids of each document.
        batch_tokens: Tokens of a batch at most, padding counted.
        dtype: Type in which is summed.
        skip: Tokens at the start of each document whose keys do not count.
        place: Whether to move the model to the Trainer's device; otherwise it stays where it is.
    """

    def __init__(
        self,
        base: LanguageModel,
        sites: Sequence[Site],
        documents: Sequence[Tensor],
        batch_tokens: int = 4096,
        dtype: torch.dtype = torch.float32,
        skip: int = 0,
        *,
        place: bool = False,
    ) -> None:
        super().__init__()
        self.base, self.documents, self.batch_tokens, self.skip, self.place = base, documents, batch_tokens, skip, place
        self.moments = {site: SecondMoment(base.weight(site).shape[1], dtype) for site in sites}

    def setup(self, stage: str) -> None:
        """Place the model where the Trainer wants it."""
        if self.place:
            self.base.to(self.trainer.strategy.root_device)

    def test_dataloader(self) -> _Share:
        """This process's share of the batches."""
        batches = buckets([len(ids) for ids in self.documents], self.batch_tokens)
        rank, processes = ranks()
        return _Share(self.documents, batches[rank::processes])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the keys of every real token."""
        try:
            found = self.base.keys(batch, dict.fromkeys(self.moments))
        except torch.OutOfMemoryError as error:
            msg = f"out of memory at {batch.input_ids.numel()} tokens a batch: lower `statistics.batch_tokens`"
            raise StatisticsError(msg) from error
        counted = batch.position_ids[batch.attention_mask > 0] >= self.skip
        for site, keys in found.items():
            self.moments[site].update(keys[counted.to(keys.device)] if self.skip else keys)

    def run(self, accelerator: str = "cpu", devices: int = 1) -> dict[Site, tuple[Tensor, int]]:
        """Do the pass.

        Inside several processes that already talk to each other, the batches are shared out and the sums added up;
        otherwise ``devices`` asks for several.

        Args:
            accelerator: As in Lightning's Trainer; without ``place`` it does not matter.
            devices: Processes to start.

        Returns:
            For each site the sum of ``k kᵀ``, shape ``(k, k)``, on the CPU, and the number of keys.
        """
        trainer = _trainer(accelerator, devices)
        with self.base.unedited(), interrupts_passed_on(), _without_tips():
            trainer.test(self, verbose=False)
        sums = {}
        for site in list(self.moments):
            moment = self.moments.pop(site)
            with moment.sync_context(should_unsync=False):
                sums[site] = moment.moment.cpu(), int(moment.count)
        return sums


class _Share:
    """Batches of documents, made when they are asked for."""

    def __init__(self, documents: Sequence[Tensor], batches: Sequence[Sequence[int]]) -> None:
        self.documents, self.batches = documents, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield collate([Row(self.documents[i].tolist(), [], {}) for i in batch])


class _Progress(TQDMProgressBar):
    """Lightning's bar, which shows the time left, under the name of what is being done."""

    @property
    def test_description(self) -> str:
        """What is being done."""
        return "Second moments"


def _trainer(accelerator: str, devices: int) -> Trainer:
    rank, _ = ranks()
    watched = rank == 0 and sys.stderr.isatty()
    with _without_tips():
        return Trainer(
            accelerator=accelerator,
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            # One process is one process, also inside torchrun or SLURM, whose sizes Lightning would check.
            plugins=[LightningEnvironment()] if devices == 1 else None,
            callbacks=[_Progress()] if watched else None,
            enable_progress_bar=watched,
            enable_checkpointing=False,
            enable_model_summary=False,
            logger=False,
            # Buffers that a model makes in its forward pass must remain usable in training.
            inference_mode=False,
        )


def ranks() -> tuple[int, int]:
    """This process's number and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _without_tips() -> AbstractContextManager[None]:
    """Without Lightning's notes on devices and tips."""
    return quiet("lightning.pytorch", level=logging.WARNING)
