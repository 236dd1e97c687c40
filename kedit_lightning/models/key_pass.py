"""One pass over documents that sums the second moments of keys, run by a Lightning Trainer."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor

from kedit_lightning.edits import Site
from kedit_lightning.interrupts import interrupts_passed_on
from kedit_lightning.models.convergence import Convergence
from kedit_lightning.models.packing import KeyReader
from kedit_lightning.models.processes import agreed, ranks
from kedit_lightning.models.progress import Step, steps
from kedit_lightning.models.quiet import quiet
from kedit_lightning.models.sums import Sums

log = logging.getLogger(__name__)
BATCHES = 8
"""Batches of a round, for each process."""
HELD_OUT = 256
"""Keys on which convergence is read off."""
HELD_OUT_DOCUMENTS = 16
"""From so many documents at least."""
KEEP_EVERY = 180.0
"""Seconds between two partial files."""


@dataclass(frozen=True)
class Round:
    """Consecutive documents that are laid out together; partial sums are kept between rounds.

    Args:
        documents: Their token ids.
        tokens: Keys of them that count.
        doubling: Whether the number of tokens has doubled since the last doubling.
        last: Whether these are the held-out documents.
    """

    documents: list[Tensor]
    tokens: int
    doubling: bool = False
    last: bool = False


@dataclass(frozen=True)
class Extent:
    """What there is to count.

    Args:
        tokens: Keys; None takes all documents.
        documents: Documents, at most.
        tolerance: Relative change of ``C⁻¹ k`` at a doubling with which the count ends.
    """

    tokens: int | None = None
    documents: int | None = None
    tolerance: float | None = None


class KeyPass(LightningModule):
    """Sums the second moments of several sites' keys, one forward pass a batch.

    The first documents are held out: on their keys convergence is read off, and they go into the sums last. Base model
    and sums are plain attributes, not registered: Lightning neither moves nor broadcasts them.

    Args:
        reader: Reads keys from the base model, unedited.
        documents: Token ids of each document; read once, and only as far as it is needed.
        extent: What there is to count; by default all documents.
        dtype: Type in which is summed.
        partial: Where the sums are kept during the pass, and found again after a kill; nowhere by default.
        place: Whether to move the model to the Trainer's device; otherwise it stays where it is.
    """

    def __init__(
        self,
        reader: KeyReader,
        documents: Iterable[Tensor],
        extent: Extent | None = None,
        dtype: torch.dtype = torch.float32,
        partial: Path | None = None,
        *,
        place: bool = False,
    ) -> None:
        super().__init__()
        self.reader, self.extent, self.partial, self.place = reader, extent or Extent(), partial, place
        self.stream = iter(documents)
        widths = {site: reader.base.weight(site).shape[1] for site in reader.sites}
        self.first_doubling = max(widths.values())
        self.sums = Sums(widths, dtype)
        self.held_out: list[Tensor] = []
        self._step: Step = lambda *_: None
        self._kept_at, self._cost = time.monotonic(), 0.0

    # ------------------------------------------------------------------ what Lightning calls

    def setup(self, stage: str) -> None:
        """Place the model, hold documents out, see whether documents can be packed, go on where a pass was killed."""
        if self.place:
            self.reader.base.to(self.trainer.strategy.root_device)
        self._hold_out()
        if not self.reader.try_packing(self.held_out) and len(self.held_out) > 1:
            log.info("One document a row: this model gives other keys to documents that share a row.")
        self.sums.resume(self.partial)
        next(islice(self.stream, self.sums.documents, self.sums.documents), None)
        self._started, self._resumed = time.monotonic(), self.sums.tokens

    def test_dataloader(self) -> Iterator[Round]:
        """The rounds, the held-out documents last. Lightning asks for one ahead of the step."""
        seen = self.sums.tokens
        while documents := list(islice(self.stream, 1)):
            doubling = self.first_doubling
            while doubling <= seen:
                doubling *= 2
            end = min(doubling, seen + BATCHES * ranks()[1] * self.reader.batch_tokens)
            start, seen = seen, seen + self._count(documents)
            while seen < end and (more := next(self.stream, None)) is not None:
                documents.append(more)
                seen += self._count([more])
            yield Round(documents, seen - start, doubling=seen >= doubling)
            if self.sums.enough:
                break
        yield Round(self.held_out, self._count(self.held_out), last=True)

    def transfer_batch_to_device(self, batch: Round, device: torch.device, dataloader_idx: int) -> Round:
        """Documents go to the model when they are laid out."""
        return batch

    def test_step(self, round_: Round, batch_idx: int) -> None:
        """Add the keys of a round's documents."""
        sums, (rank, processes) = self.sums, ranks()
        if sums.enough and not round_.last:
            return
        done = sums.tokens
        for rows in self.reader.batches(round_.documents)[rank::processes]:
            for site, keys in self.reader.read(rows).items():
                sums.moments[site].update(keys)
            done += processes * sum(self._count(row) for row in rows)
            self._show(min(done, sums.tokens + round_.tokens))
        sums.documents, sums.tokens = sums.documents + len(round_.documents), sums.tokens + round_.tokens
        if not round_.last:
            self._between(round_)

    # ------------------------------------------------------------------ the pass

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
        with (
            self.reader.base.unedited(),
            interrupts_passed_on(),
            _without_tips(),
            steps("second moments, tokens", watched=ranks()[0] == 0 and trainer.is_global_zero) as self._step,
        ):
            trainer.test(self, verbose=False)
        return self.sums.take(self.reader.base.device)

    def _count(self, documents: Sequence[Tensor]) -> int:
        return sum(len(ids[self.reader.skip :]) for ids in documents)

    def _show(self, done: int) -> None:
        total, documents = self.extent.tokens, self.extent.documents
        if total is None and documents and self.sums.documents:  # as long as those before
            total = max(done, round(self.sums.tokens / self.sums.documents * documents))
        seconds = time.monotonic() - self._started
        rate = (done - self._resumed) / max(seconds, 1e-9)
        self._step(done, total, f"{rate:,.0f} tokens/s")

    def _hold_out(self) -> None:
        """Take the first documents, and some of their keys, evenly spread."""
        while len(self.held_out) < HELD_OUT_DOCUMENTS or self._count(self.held_out) < HELD_OUT:
            if (ids := next(self.stream, None)) is None:
                break
            self.held_out.append(ids)
        every = max(1, self._count(self.held_out) // HELD_OUT)
        parts = [
            {site: keys[::every].clone() for site, keys in self.reader.read(rows).items()}  # not views of all
            for rows in self.reader.batches(self.held_out)
        ]
        spread = {site: [part[site] for part in parts] for site in self.reader.sites}
        self.sums.convergence = Convergence({site: torch.cat(keys)[:HELD_OUT] for site, keys in spread.items()})

    def _between(self, round_: Round) -> None:
        """Between two rounds: read convergence off at a doubling; keep what there is every now and then."""
        since = time.monotonic() - self._kept_at
        # Not where writing takes longer than counting again would.
        keep = agreed(self.partial is not None and since > (self._cost if round_.doubling else KEEP_EVERY))
        if not (keep or round_.doubling):
            return
        self.sums.gather(self.reader.base.device)
        if round_.doubling and self.reader.skip >= 0:  # the last tokens of prompts are no sample of anything
            self.sums.read_off(self.extent.tolerance)
        if keep:
            self._keep()

    def _keep(self) -> None:
        started = time.monotonic()
        if ranks()[0] == 0 and self.partial is not None and not self.sums.keep(self.partial):
            self.partial = None
        self._kept_at = time.monotonic()
        self._cost = self._kept_at - started


def _trainer(accelerator: str, devices: int) -> Trainer:
    with _without_tips():
        return Trainer(
            accelerator=accelerator,
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            # One process is one process, also inside torchrun or SLURM, whose sizes Lightning would check.
            plugins=[LightningEnvironment()] if devices == 1 else None,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            logger=False,
            # Buffers that a model makes in its forward pass must remain usable in training.
            inference_mode=False,
        )


def _without_tips() -> AbstractContextManager[None]:
    """Without Lightning's notes on devices and tips."""
    return quiet("lightning.pytorch", level=logging.WARNING)
