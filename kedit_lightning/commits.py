"""One edit batch: all its passes, then the commit, without the edits that are rejected."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kedit_lightning import delta as delta_files
from kedit_lightning.callbacks.weight_update import put
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors import Editor
from kedit_lightning.editors.stages import latest
from kedit_lightning.edits import Edit
from kedit_lightning.errors import RejectedError
from kedit_lightning.models.fingerprint import state
from kedit_lightning.models.processes import ranks, same
from kedit_lightning.resume import random_stream
from kedit_lightning.run import Content, Record
from kedit_lightning.tensor_files import checksum

if TYPE_CHECKING:
    from kedit_lightning.trainer import EditTrainer


class Commits:
    """Commits edit batches one after another; `EditStream` says which.

    A batch that fails is rolled back bit for bit: the weights, and what the editor remembers. Edits that are rejected
    count as never asked for, and the others of their batch are edited again from the beginning; a batch of which none
    is left commits nothing. Edits that are side by side (`Editor.side_by_side`) are a batch with a commit an edit.

    Args:
        trainer: Its run directory takes the commits.
        editor: The editor.
        datamodule: What streams a batch to it.
        fit: Runs one `Trainer.fit`.
        seed: Every batch draws from a random stream of its own, by this seed and its place in the run.
        fingerprint: Of the base model.
    """

    def __init__(
        self,
        trainer: EditTrainer,
        editor: Editor,
        datamodule: EditDataModule,
        fit: Callable[[], None],
        seed: int,
        fingerprint: Record,
    ) -> None:
        self.trainer, self.editor, self.datamodule, self.fit = trainer, editor, datamodule, fit
        self.seed, self.fingerprint = seed, fingerprint
        self.number = self.done = 0
        self.owners: list[int] = []

    def again(self, lines: Sequence[Record], *, write: bool = True) -> None:
        """Take in a batch that is done, as it was committed.

        Args:
            lines: Its lines of edits.jsonl.
            write: Whether its updates are written onto the weights; not where these have been restored after it.
        """
        editor, run = self.editor, self.trainer.run
        editor.base.side_by_side.clear()
        numbers = list(dict.fromkeys(line["commit"] for line in lines if line["commit"] is not None))
        for i, number in enumerate(numbers):
            deltas, metadata, memory = run.load(number)
            if write:
                for delta in deltas:
                    put(editor.base, delta, i if editor.side_by_side else None)
                self._remember(memory)
            editor.budget, editor.evaluations = metadata["budget"], metadata["evaluations"]
            self.number = number + 1
        self.done += len(lines)
        self.owners = _places([line["commit"] for line in lines])

    def stand(self, line: Record) -> None:
        """Write an edit that was made side by side onto the weights, which have stayed unedited."""
        if line["commit"] is not None:
            for delta in self.trainer.run.load(line["commit"])[0]:
                put(self.editor.base, delta, None)

    def edit(self, batch: Sequence[Edit], lines: Sequence[Record], group: int) -> list[Record]:
        """Edit and commit a batch.

        Args:
            batch: The edits.
            lines: What was asked and what was answered before, for each.
            group: How often the weights have been restored so far; side by side before the first of the edits.

        Returns:
            Their lines of edits.jsonl, without what is measured after.

        Raises:
            RejectedError: Edits are rejected, and the trainer is to stop then.
        """
        evaluations, budget = self.editor.evaluations, self.editor.budget
        started, rejected = time.time(), dict[int, str]()
        while True:
            places = [place for place in range(len(batch)) if place not in rejected]
            try:
                with random_stream(self.seed, f"edit {self.done}"):
                    found = self._attempt(batch, places, lines, rejected, group, started)
                break
            except RejectedError as error:
                if not error.reasons:
                    raise
                rejected |= {places[i]: reason for i, reason in error.reasons.items()}
                self.editor.evaluations, self.editor.budget = evaluations, budget
                if self.trainer.on_rejected == "stop":
                    self._give_up(batch, lines, rejected, group, started)
                    raise
        if rejected:
            self.trainer.tell("on_edits_rejected", self.editor, [found[place] for place in sorted(rejected)])
        if places:
            self.number += len({found[place]["commit"] for place in places})
            self.trainer.tell("on_edits_committed", self.editor, [found[place] for place in places])
        self.done += len(batch)
        self.owners = _places([line["commit"] for line in found])
        return found

    def _give_up(
        self, batch: Sequence[Edit], lines: Sequence[Record], rejected: Mapping[int, str], group: int, started: float
    ) -> None:
        """Record a batch of which nothing is written, because the stream is to stop at a rejection."""
        why = f"in one batch with case {batch[min(rejected)].case_id}, which was rejected"
        all_of_it = {place: rejected.get(place, why) for place in range(len(batch))}
        found = self._attempt(batch, [], lines, all_of_it, group, started)
        self.trainer.tell("on_edits_rejected", self.editor, found)

    def _attempt(
        self,
        batch: Sequence[Edit],
        places: Sequence[int],
        asked: Sequence[Record],
        rejected: Mapping[int, str],
        group: int,
        started: float,
    ) -> list[Record]:
        """Edit those at some places of a batch, and make it durable."""
        editor, run, edits = self.editor, self.trainer.run, [batch[place] for place in places]
        with editor.base.transaction():
            editor.base.side_by_side.clear()
            deltas = self.trainer.weight_update.edit(editor, self.datamodule, edits, self.fit) if edits else []
            now = time.time()
            took = {"seconds": round((now - started) / len(batch), 3), "time": round(now, 3)}
            lines: list[Record] = [
                {
                    "case_id": edit.case_id,
                    "commit": None,
                    "group": group + place * editor.side_by_side,
                    **line,
                    "stages": [],
                    **took,
                }
                for place, (edit, line) in enumerate(zip(batch, asked, strict=True))
            ]
            for place, reason in rejected.items():
                lines[place]["rejected"] = reason
            for i, place in enumerate(places):
                lines[place] |= {"commit": self.number + i * editor.side_by_side, "stages": self._stages(i)}
            commits = self._contents(edits, [lines[place] for place in places], deltas)
            if ranks()[1] > 1:
                updates = {f"{i}/{name}": t for i, delta in enumerate(deltas) for name, t in delta.tensors.items()}
                found = state(editor.base, editor.names()) + checksum(updates)  # side by side no weight is edited
                same("the edited weights", found, "resume the run; report it as a defect")
            run.commit(commits, lines)
        for i, (_, _, metadata, memory) in enumerate(commits):
            self._remember(memory)
            self._log(metadata["norms"], self.done + (places[i] + 1 if editor.side_by_side else len(batch)))
        if edits:
            self._log_finals(places)
        return lines

    def _contents(self, edits: Sequence[Edit], lines: Sequence[Record], deltas: Sequence[WeightDelta]) -> list[Content]:
        """What is to be committed: side by side each edit by itself, else all of them together."""
        memory, found = self.editor.memory, list[Content]()
        for part in self.editor.solved_together() if edits else ():
            mine = [delta for delta in deltas if part.start is None or delta.edit == part.start]
            norms = {delta.name: delta.norm for delta in delta_files.merge(mine)}
            kept = {
                name: tensor[part].detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, tensor in memory.items()
            }
            found.append((lines[part][0]["commit"], mine, self._metadata(edits[part], lines[part][0], norms), kept))
        return found

    def _remember(self, memory: Mapping[str, Tensor]) -> None:
        """From the same memory layout, whether the commit was made now or is read from its file."""
        if self.editor.side_by_side:
            return
        self.editor.remember({name: tensor.to(self.editor.base.device) for name, tensor in memory.items()})

    def _stages(self, i: int) -> list[Record]:
        layers, outcomes = self.editor.passes(), self.editor.outcomes
        standing = {id(outcome) for outcome in latest(outcomes)}
        return [
            {
                "stage": outcome.stage,
                "layer": layers[outcome.pass_],
                **outcome.final(i, value=id(outcome) in standing),
            }
            for outcome in outcomes
        ]

    def _metadata(self, edits: Sequence[Edit], line: Record, norms: Mapping[str, float]) -> Record:
        editor = self.editor
        return {
            "editor": type(editor).__name__,
            "config": editor.config,
            "base": editor.base.name_or_path,
            "dtype": editor.base.dtype,
            "fingerprint": self.fingerprint,
            "case_ids": [edit.case_id for edit in edits],
            "number": line["commit"],
            "group": line["group"],
            "norms": norms,
            "budget": editor.budget,
            "evaluations": editor.evaluations,
        }

    def _log_finals(self, places: Sequence[int]) -> None:
        """Each edit's loss when its stages ended, over the number of edits."""
        for outcome in latest(self.editor.outcomes):
            losses = torch.stack(list(outcome.curves[-1].values())).sum(dim=0).tolist()
            for place, loss in zip(places, losses, strict=True):
                if self.trainer.logger is not None:
                    self.trainer.logger.log_metrics({f"final/{outcome.stage}/loss": loss}, self.done + place + 1)

    def _log(self, norms: Mapping[str, float], step: int) -> None:
        if self.trainer.logger is not None:
            curves = {f"norm/update/{name}": norm for name, norm in norms.items()}
            if not self.editor.side_by_side:  # no weight has changed
                curves |= {f"norm/weight/{name}": float(self.editor.base.weight(name).float().norm()) for name in norms}
            self.trainer.logger.log_metrics(curves, step=step)


def _places(commits: Sequence[int | None]) -> list[int]:
    """Which of the commits each edit is in, counted from 0; -1: in none."""
    numbers = list(dict.fromkeys(number for number in commits if number is not None))
    return [-1 if number is None else numbers.index(number) for number in commits]
