"""Planning a stream of edits: counts its rows, and does a little of it to know the rest."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from kedit_lightning import report
from kedit_lightning.calibration import measuring_an_edit, seconds_of_a_token, step_of_every_stage
from kedit_lightning.callbacks.base import EditCallback
from kedit_lightning.checkpoints import Checkpoints
from kedit_lightning.data.datamodule import SIDE_BY_SIDE, EditDataModule, batched
from kedit_lightning.editors import Editor
from kedit_lightning.edits import Edit, Site
from kedit_lightning.measurement import Measurement
from kedit_lightning.models.devices import free_memory
from kedit_lightning.models.key_statistics import Identity, KeyStatistics
from kedit_lightning.models.memory import fitting, room
from kedit_lightning.models.progress import steps
from kedit_lightning.models.weights import HALVES
from kedit_lightning.plan import DISK, Moments, Need, Plan, Rows

if TYPE_CHECKING:
    from kedit_lightning.trainer import EditTrainer

_log = logging.getLogger(__name__)
TRIED = 4
"""Edits at most that the time of measuring is taken on."""


def plan(trainer: EditTrainer, editor: Editor, datamodule: EditDataModule) -> Plan:
    """Plan a stream of edits: one step of every stage is done and a few edits are measured, and nothing is written.

    Second moments that are missing are not computed. The model and the editor are left as they were.

    Args:
        trainer: The trainer.
        editor: The editor.
        datamodule: The edits, which are loaded.

    Raises:
        KeditError: An edit cannot be read, or does not fit into memory by itself.
    """
    base, edits, groups = editor.base, datamodule.edits, list(datamodule.groups())
    batches = [batch for group in groups for batch in group]
    evaluator = Checkpoints(trainer, Measurement(trainer, editor, datamodule)).measurement.evaluator
    editor.restore()
    editor.prepare_rows()
    editor.moments = _stand_ins(editor)
    try:
        free = {device: free_memory(device) for device in (torch.device("cpu"), base.device)}
        beside = parallel(trainer, editor, datamodule)
        fits = [list(block) for block in batched(edits, beside)] if beside > 1 else batches
        n = max(map(len, fits))
        own = editor.update_size(1) if beside > 1 else 0
        asked = {at: (fixed, one + own) for at, (fixed, one) in editor.needs(n).items()}
        most = room(asked)
        done = step_of_every_stage(editor, fits[0][:most]) if most else []
        rows = count(editor, fits)
        moments = _moments(editor)
        tried = edits[: min(TRIED, len(groups[0]) * beside)]
        each, at_checkpoint, once = measuring_an_edit(evaluator, tried, scored=trainer.evaluate)
    finally:
        editor.forwards.forget()
        editor.deltas, editor.moments, editor.outcomes = nn.ModuleList(), {}, []
    needs = [Need(place(at), f"{report.count(n)} together", fixed + n * one) for at, (fixed, one) in asked.items()]
    needs += _held(editor)
    if done:
        largest = max(step.memory * rows.largest / step.part for step in done)
        needs.append(Need(place(base.device), f"a step of {rows.largest:,} tokens", largest))
    commits = [editor.update_size(len(batch)) + editor.memory_size(len(batch)) for batch in batches]
    again = sum(at for at in trainer.evaluate_at if at <= len(edits))
    merged = editor.update_size(sum(map(len, groups[-1])))
    needs.append(Need(DISK, "updates", sum(commits) + merged))
    return Plan(
        title=f"{type(editor).__name__}, {datamodule.protocol_name}",
        layers=base.num_layers,
        batches=[len(batch) for batch in batches],
        passes=len(editor.passes()),
        rows=rows,
        budget=editor.budget,
        steps=done,
        weights=sum(weight.numel() * weight.element_size() for weight in base.model.parameters()),
        moments=moments,
        needs=needs,
        free={place(device): size for device, size in free.items()} | {DISK: _free_disk(trainer.run.path)},
        beside=beside,
        room=most,
        measuring=len(edits) * (2 * each + once) + again * at_checkpoint,
        commits=commits,
        merged=merged,
        run=trainer.run.path,
    )


def parallel(trainer: EditTrainer, editor: Editor, datamodule: EditDataModule) -> int:
    """How many edits are made side by side; 1: one by one.

    Where they can be, `EditDataModule.parallel_edits`, halved until they fit into memory.

    Args:
        trainer: The trainer.
        editor: The editor, whose second moments are there.
        datamodule: The edits.
    """
    if not datamodule.single:
        return 1
    wanted = datamodule.parallel_edits
    hearing = [one for one in trainer.callbacks if isinstance(one, EditCallback)]  # type: ignore[attr-defined]
    reasons = [f"{type(editor).__name__} trains weights"] if not editor.can_be_side_by_side else []
    reasons += [f"{type(one).__name__} looks at the edited weights" for one in hearing if one.reads_weights]
    reasons += ["trainer.on_rejected is stop"] if trainer.on_rejected == "stop" else []
    if reasons:
        if wanted is not None and wanted > 1:
            _log.warning("warning: edits are made one by one, not %d side by side: %s", wanted, "; ".join(reasons))
        return 1
    n = min(wanted or SIDE_BY_SIDE, len(datamodule.edits))
    found = fitting(n, editor.needs, editor.update_size(1))
    if found < n and wanted:
        _log.warning("%d edits side by side do not fit into memory: going on with %d.", n, found)
    return found


def count(editor: Editor, batches: Sequence[Sequence[Edit]]) -> Rows:
    """The rows of edit batches, shared out as the editor does.

    Args:
        editor: The editor, whose context templates are there.
        batches: The edits.

    Raises:
        DataError: A prompt is longer than the model's context.
    """
    n, parts = 0, []
    tokens: list[int] = []
    with steps("counting rows") as show:
        for i, batch in enumerate(batches):
            shared = editor.share_out(batch)
            for part in shared:
                n += len(part.rows)
                real = torch.zeros(len(part), dtype=torch.long)
                tokens += real.index_add_(0, part.edit, part.rows.attention_mask.sum(dim=1)).tolist()
            parts.append([part.tokens for part in shared])
            show(i + 1, len(batches), "")
    return Rows(n, tokens, parts)


def place(device: torch.device) -> str:
    """A device in words."""
    return "main memory" if device.type == "cpu" else str(device)


def _stand_ins(editor: Editor) -> dict[Site, KeyStatistics]:
    """Second moments of the right width, which take no memory: what is needed for the solve can be asked of them."""
    identity, found = editor.statistics.source == "identity", {}
    for site in editor.sites():
        k = editor.base.weight(site).shape[1]
        found[site] = Identity(k) if identity else KeyStatistics(torch.empty(()).expand(k, k))
    return found


def _moments(editor: Editor) -> Moments:
    """What is there of the second moments, and how long the rest takes."""
    base, statistics, sites = editor.base, editor.statistics, editor.sites()
    if statistics.source == "identity" or statistics.given:
        statistics.second_moments(base, sites)  # a given file is read, and so checked
        return Moments(len(sites) if statistics.given else 0)
    missing = [site for site, path in statistics.files(base, sites).items() if not path.is_file()]
    if not missing:
        return Moments(len(sites))
    wanted = statistics.wanted(base)
    seconds = seconds_of_a_token(base, statistics, missing)
    return Moments(len(sites), len(missing), None if wanted == "full" else wanted, statistics.n_samples, seconds)


def _held(editor: Editor) -> Iterator[Need]:
    """What a run keeps from the first edit to the last: second moments, and the edited weights as they were."""
    base = editor.base
    if bits := torch.finfo(editor.moments_dtype).bits if editor.moments_dtype else 0:
        widths = [base.weight(site).shape[1] for site in editor.sites()]
        yield Need(place(torch.device("cpu")), "second moments", bits // 8 * sum(k * k for k in widths))
    weights = [base.weight(name) for name in editor.names()]
    copies = sum(w.numel() * (2 * w.element_size() + 4 * (w.dtype in HALVES)) for w in weights)
    yield Need(place(base.device), "edited weights, as before the run and before the batch", copies)


def _free_disk(path: Path) -> int:
    """Bytes that are free where a folder is or will be."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(there).free
