"""Editing from Python: one call on the caller's own model and tokenizer."""

from __future__ import annotations

import difflib
import inspect
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import Callback
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedit_lightning import delta as delta_files
from kedit_lightning import editors
from kedit_lightning.callbacks.console import Console
from kedit_lightning.callbacks.figures import Figures
from kedit_lightning.callbacks.logs import NOISE
from kedit_lightning.callbacks.sequence import SequenceCurve
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors import Editor
from kedit_lightning.edits import Edit
from kedit_lightning.errors import KeditError
from kedit_lightning.messages import settings_of
from kedit_lightning.metrics import Evaluation
from kedit_lightning.models import Architecture, LanguageModel
from kedit_lightning.models.quiet import quiet
from kedit_lightning.run import Record, read_deltas
from kedit_lightning.trainer import EditTrainer


@dataclass(frozen=True)
class EditResult:
    """What `edit` did.

    Attributes:
        delta: The updates in the order in which they were added to the weights; adding them to the unedited model again
            gives the edited one bit for bit.
        records: For each edit what was asked, the answer before and after, losses, and its measures before and after.
        report: The summary over all edits as in metrics.json: ``pre`` and ``post``, and the protocol of the numbers.
        metadata: What is saved with the delta: editor, base model, fingerprint, case ids.
    """

    delta: list[WeightDelta] = field(repr=False)
    records: list[Record] = field(repr=False)
    report: Record = field(repr=False)
    metadata: Record

    def save(self, path: Path | str) -> None:
        """Write the delta to a ``.safetensors`` file, which `kedit apply` takes.

        Args:
            path: The file.

        Raises:
            KeditError: The file cannot be written; nothing is left of it.
        """
        delta_files.save(Path(path), self.delta, self.metadata)


def edit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit | Mapping[str, Any]],
    editor: str | type[Editor] = "ROME",
    *,
    batch_size: int = 1,
    on_conflict: Literal["raise", "keep_last"] = "raise",
    evaluate: bool | Evaluation = True,
    show_progress: bool = False,
    save_dir: Path | str | None = None,
    architecture: Architecture | None = None,
    **hyperparameters: Any,
) -> EditResult:
    """Edit facts in a Hugging Face model, in place.

    All edits or none: an exception or an interrupt anywhere gives the model back every bit it had before this call.
    Train mode and ``requires_grad`` are as before in either case. A model in half precision keeps float32 masters of
    the edited matrices during the call, not between calls.

    Args:
        model: A causal language model, on any device.
        tokenizer: Its tokenizer.
        edits: `Edit`s, or mappings with ``prompt`` (with one ``{}``), ``subject`` and ``target_new``, and optionally
            the other fields of `Edit`. Case ids count from 0 where they are missing or not unique.
        editor: Name of an editor, such as ``ROME`` or ``TOP``, or its class.
        batch_size: Edits solved together; MEMIT, PMET, AlphaEdit and JEEP are made for many.
        on_conflict: What to do with edits of one batch that give different answers to one question.
        evaluate: Whether the model is measured before and after, or how.
        show_progress: Whether the terminal shows progress; a first pass over documents for key statistics always does.
        save_dir: Where the run directory is kept; without it there is none.
        architecture: Where the sub-blocks live, for a family outside the table.
        hyperparameters: The editor's settings. ``layers`` is always needed; where keys are whitened,
            ``statistics=Statistics(…)`` says from which text (``mom2_adjustment=False`` does without).

    Returns:
        The delta, and a record for each edit.

    Raises:
        KeditError: The model, an edit, the editor or one of its settings cannot be used.
    """
    with ExitStack() as stack:
        stack.enter_context(_modes_kept(model))
        stack.enter_context(torch.enable_grad())
        base = LanguageModel.wrap(model, tokenizer, architecture)
        method = _make_editor(editor, base, hyperparameters)
        data = EditDataModule(edits=_as_records(edits), batch_size=batch_size, on_conflict=on_conflict)
        data.setup("fit")
        kept = save_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="kedit-"))
        stack.enter_context(_quiet())
        trainer = EditTrainer(
            save_dir=str(kept),
            evaluation=evaluate if isinstance(evaluate, Evaluation) else None,
            evaluate=bool(evaluate),
            enable_progress_bar=show_progress,
            **_placement(base.device),
        )
        trainer.callbacks = list(_callbacks(trainer, show_progress, kept=save_dir is not None))  # type: ignore[attr-defined]
        with base.transaction():
            trainer.fit(method, datamodule=data)
            deltas, metadata = read_deltas(trainer.run.path)
            return EditResult(deltas, trainer.run.records(), trainer.report, metadata)


def _as_records(edits: Sequence[Edit | Mapping[str, Any]]) -> list[Record]:
    """Edits as a data set's records, with case ids that tell them apart."""
    records = [edit.as_record() if isinstance(edit, Edit) else dict(edit) for edit in edits]
    if not records:
        msg = "expected at least one edit, got none; an edit has a prompt with one {}, a subject and a target_new"
        raise KeditError(msg)
    cases = [record.get("case_id", position) for position, record in enumerate(records)]
    if len(set(cases)) < len(cases):
        records = [{**record, "case_id": position} for position, record in enumerate(records)]
    return records


def _make_editor(editor: str | type[Editor], base: LanguageModel, settings: dict[str, Any]) -> Editor:
    method = editor if isinstance(editor, type) else _named_editor(editor)
    known = {name: one for name, one in settings_of(method).items() if name != "base"}
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(known)}"
            msg = f"{method.__name__} has no setting {name!r}{hint}"
            raise KeditError(msg)
    missing = [name for name, one in known.items() if one.default is one.empty and name not in settings]
    if missing:
        msg = f"{method.__name__} needs {' and '.join(missing)}, for which no value fits every model; give it to edit()"
        raise KeditError(msg)
    return method(base, **settings)


def _named_editor(name: str) -> type[Editor]:
    found = {one: getattr(editors, one) for one in editors.__all__}
    known = {
        one: value
        for one, value in found.items()
        if isinstance(value, type) and issubclass(value, Editor) and not inspect.isabstract(value)
    }
    if name not in known:
        msg = f"unknown editor {name!r}; there are {', '.join(known)}"
        raise KeditError(msg)
    return known[name]


class _ConsoleOfNoRun(Console):
    """The terminal of a run that leaves no directory to be pointed at."""

    def _where(self, *_: object) -> None:
        pass


def _callbacks(trainer: EditTrainer, show_progress: bool, kept: bool) -> Iterator[Callback]:
    """The trainer's callbacks, less what would be shown or drawn for nobody."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Console):
            if show_progress:
                yield callback if kept else _ConsoleOfNoRun()
        elif kept or not isinstance(callback, Figures | SequenceCurve):
            yield callback


def _placement(device: torch.device) -> dict[str, Any]:
    """The Trainer's arguments for the device that the model is on."""
    if device.type == "cpu":
        return {"accelerator": "cpu", "devices": 1}
    return {"accelerator": device.type, "devices": [device.index or 0]}


@contextmanager
def _modes_kept(model: PreTrainedModel) -> Iterator[None]:
    """Give train mode and ``requires_grad`` back as they were: the base model is frozen while it is edited."""
    training = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what Lightning says to people who write training loops; only for as long as this call takes."""
    with quiet("lightning.pytorch", "lightning.fabric"), warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message=message)
        yield
