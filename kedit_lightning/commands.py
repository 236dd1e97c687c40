"""What `kedit` does beside training: apply a delta, revert edits. Docstrings and signatures are the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

from rich import get_console

from kedit_lightning import delta as delta_files
from kedit_lightning.delta import WeightDelta
from kedit_lightning.errors import DeltaError, KeditError
from kedit_lightning.export import refuse_occupied, write_lora, write_model
from kedit_lightning.models import Architecture, LanguageModel
from kedit_lightning.models.language_model import Dtype
from kedit_lightning.report import count
from kedit_lightning.run import COMMITS, Commit, RunDirectory, newest, read_deltas

SHOWN = 10
"""Case ids that a message lists at most."""


def apply(
    run_or_delta: Path,
    *,
    out: Path,
    model: str | None = None,
    format: Literal["hf", "lora"] = "hf",
    dtype: Dtype | None = None,
    architecture: Architecture | None = None,
) -> None:
    """Write an edited model: a Hugging Face checkpoint, or a LoRA adapter for PEFT.

    Args:
        run_or_delta: A run directory, for the model that the run ended with, bit for bit; or a delta file.
        out: Folder to write; new or empty.
        model: The base model that was edited, a Hugging Face name or a path; default: where the run found it.
        format: ``hf``: the whole model and its tokenizer; ``lora``: the updates alone, as long as they are low-rank.
        dtype: Type of the weights; default: that of the run.
        architecture: Where the sub-blocks live, for a family outside the table.

    Raises:
        KeditError: The delta is of another model or cannot be read, or the folder cannot be written.
    """
    refuse_occupied(out)
    deltas, metadata = read_deltas(run_or_delta)
    base = _base(run_or_delta, metadata, model, dtype, architecture)
    delta_files.check(base, deltas, metadata, run_or_delta)
    edits = len(metadata.get("case_ids", []))
    if format == "lora":
        write_lora(base, deltas, out)
        _say(f"{out}: LoRA adapter with {count(edits)}, for {_called(base)}")
    else:
        write_model(base, deltas, out)
        _say(f"{out}: {_called(base)} with {count(edits)}, a Hugging Face checkpoint")


def revert(
    run_dir: Path,
    *,
    out: Path,
    edit: int | None = None,
    model: str | None = None,
    dtype: Dtype | None = None,
    architecture: Architecture | None = None,
) -> None:
    """Write the model of a run without one edit, or without any.

    The weights are the pristine ones plus the other edits in their order, so that nothing of the undone edit is left.
    Edits made after it stay as they were solved, on a model that held it.

    Args:
        run_dir: The run directory, or the folder of its versions (the newest is taken).
        out: Folder to write; new or empty.
        edit: Case id of the edit to undo, as in edits.jsonl; default: all of them.
        model: The base model that was edited, a Hugging Face name or a path; default: where the run found it.
        dtype: Type of the weights; default: that of the run.
        architecture: Where the sub-blocks live, for a family outside the table.

    Raises:
        KeditError: The edit is unknown or was solved together with others, the model is another one, or the folder
            cannot be written.
    """
    refuse_occupied(out)
    run = RunDirectory(newest(run_dir, COMMITS))
    standing = run.standing()
    kept = [] if edit is None else _without(edit, run, standing)
    deltas, metadata = [delta for _, updates, _ in standing for delta in updates], standing[-1][2]
    base = _base(run_dir, metadata, model, dtype, architecture)
    delta_files.check(base, deltas, metadata, run_dir)
    write_model(base, kept, out)
    what = "without any edit" if edit is None else f"without edit {edit}"
    if edit is not None and not kept:
        what += ", the only one that the run ended with"
    _say(f"{out}: {_called(base)} {what}, a Hugging Face checkpoint")


def _without(case: int, run: RunDirectory, standing: Sequence[Commit]) -> list[WeightDelta]:
    """The updates of all commits but those of one case, in order."""
    kept: list[WeightDelta] = []
    found = False
    for number, updates, metadata in standing:
        cases = metadata["case_ids"]
        if case not in cases:
            kept += updates
        elif others := [other for other in cases if other != case]:
            msg = (
                f"{run.path}: case {case} was solved together with {_listed(others)} (commit {number}) and cannot be "
                "undone alone; edit again without it, or with batch_size 1"
            )
            raise KeditError(msg)
        else:
            found = True
    if not found:
        known = [known for metadata in run.metadata() for known in metadata["case_ids"]]
        msg = f"{run.path}: no edit has case id {case}; there are {_listed(known)}"
        if case in known:
            held = [held for _, _, metadata in standing for held in metadata["case_ids"]]
            msg = (
                f"{run.path}: case {case} is not in the model that the run ended with, which holds {_listed(held)}: "
                "the weights were restored after it"
            )
        raise KeditError(msg)
    return kept


def _base(
    path: Path, metadata: dict[str, Any], model: str | None, dtype: Dtype | None, architecture: Architecture | None
) -> LanguageModel:
    """The base model a delta was made on, unless another place is given for it."""
    name = model or metadata.get("base")
    if not name:
        msg = f"{path}: the delta does not say where its base model is; give --model, a Hugging Face name or a folder"
        raise DeltaError(msg)
    made_in = metadata.get("dtype")
    return LanguageModel(
        "almanac" if model is None and _is_almanac(name) else name,
        dtype=dtype or (cast("Dtype", made_in) if made_in in get_args(Dtype) else "float32"),
        architecture=architecture,
    )


def _is_almanac(name: str) -> bool:
    """Whether a stored name is this package's own model, wherever the package was installed when it was stored."""
    return Path(name).parts[-3:] == ("kedit_lightning", "almanac", "model")


def _called(base: LanguageModel) -> str:
    return "almanac" if _is_almanac(base.name_or_path) else base.name_or_path


def _listed(cases: Sequence[int]) -> str:
    more = f" and {len(cases) - SHOWN} more" if len(cases) > SHOWN else ""
    return f"case{'s' * (len(cases) > 1)} {', '.join(str(case) for case in cases[:SHOWN])}{more}"


def _say(line: str) -> None:
    get_console().print(line, soft_wrap=True, highlight=False, markup=False)
