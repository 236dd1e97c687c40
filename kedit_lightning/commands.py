"""What `kedit` does beside training: deltas applied, edits undone, word sets built. Docstrings are the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast, get_args

from rich import get_console
from rich.text import Text

from kedit_lightning import delta as delta_files
from kedit_lightning.data import datasets
from kedit_lightning.errors import DeltaError, KeditError
from kedit_lightning.export import refuse_occupied, write_lora, write_model
from kedit_lightning.lines import Record
from kedit_lightning.metrics.generation import says
from kedit_lightning.models import Architecture, LanguageModel
from kedit_lightning.models.language_model import Dtype
from kedit_lightning.probes.words import FactTable, build, read_documents, read_facts, write_sets
from kedit_lightning.remeasurement import Remeasurement, changed
from kedit_lightning.report import asked, count, edit_line, quoted, table
from kedit_lightning.reverting import SHOWN, undo
from kedit_lightning.run import COMMITS, RunDirectory, newest, read_deltas
from kedit_lightning.writing import write_beside


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
    edit: str | None = None,
    commit: int | None = None,
    out: Path | None = None,
    no_evaluate: bool = False,
    model: str | None = None,
    dtype: Dtype | None = None,
    architecture: Architecture | None = None,
) -> None:
    """Undo an edit of a run, and measure what changes; the run itself stays as it is.

    The weights are the pristine ones plus the other edits in their order, so that nothing of the undone edit is left.
    Edits made after it stay as they were solved, on a model that held it. The result is a delta file, which `kedit
    apply`, `kedit test` and `kedit predict` take, with the measurements beside it as JSON; or a checkpoint.

    Args:
        run_dir: The run directory, or the folder of its versions (the newest is taken).
        edit: The edit to undo: its case id, or @ and its number in the sequence, as `kedit log` lists it (@0 is the
            first), where a case id comes several times.
        commit: Number of a commit to undo with all its edits, for edits that were solved together.
        out: What to write: a delta file (*.safetensors), or a folder, new or empty, for a Hugging Face checkpoint;
            default: a delta file in RUN_DIR/reverted. Without an edit and a commit all is undone, and this needed.
        no_evaluate: Do not measure the edits, with and without what is undone, as the run's config.yaml says.
        model: The base model that was edited, a Hugging Face name or a path; default: where the run found it.
        dtype: Type of the weights; default: that of the run.
        architecture: Where the sub-blocks live, for a family outside the table.

    Raises:
        KeditError: The edit is unknown or was solved together with others, the model is another one, what was edited
            cannot be read again, or the place cannot be written to.
    """
    everything = edit is None and commit is None
    if everything and out is None:
        msg = "expected what to undo: --edit ID or --commit N, as `kedit log` lists them; with --out alone it is all"
        raise KeditError(msg)
    run = RunDirectory(newest(run_dir, COMMITS))
    file = out is None or out.suffix == ".safetensors"
    if out is not None and file and out.exists():
        msg = f"{out}: expected a new file to write, and this one is there already; give another one"
        raise KeditError(msg)
    if out is not None and not file:
        refuse_occupied(out)
    reverted = undo(run, edit, commit)
    remeasurement = None if no_evaluate or everything else Remeasurement(run, reverted)
    base = _base(run_dir, reverted.metadata, model, dtype, architecture)
    delta_files.check(base, reverted.standing, reverted.metadata, run_dir)
    out = out or run.path / "reverted" / f"{reverted.name}.safetensors"
    if file:
        delta_files.save(out, reverted.kept, reverted.metadata)
    else:
        write_model(base, reverted.kept, out)
    _say(f"{out}: {_called(base)} {reverted.described}, a {'delta file' if file else 'Hugging Face checkpoint'}")
    if remeasurement is None:
        return
    report = remeasurement.measure(base)
    if file:
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        write_beside(out.with_suffix(".json"), lambda path: path.write_text(text, encoding="utf-8"))
    _show_change(reverted.described, report)


def words(
    *,
    out: Path,
    texts: Path | None = None,
    facts: Path | None = None,
    dataset: str = "almanac",
    path: str | None = None,
    options: dict[str, Any] | None = None,
    size: int | None = None,
    top: int = 100,
    candidates: int = 50,
    documents: int = 20_000,
) -> None:
    """Build the sets of words that have to do with facts, for the contrast probe (JEEP, appendix A.1).

    Related are the words of the texts that fit a fact's prompt best (BM25) and name its subject; factual those that a
    table of facts has of the subject and of the relation; non-factual the related ones that are neither factual nor
    stop words. The words of the original answer are left out.

    Args:
        out: File to write, a JSON object a line; new.
        texts: Folder of texts: .txt with a document a line, .jsonl with the field `text`; default: the almanac's.
        facts: Table of facts, a JSON list or JSONL with `subject`, `relation_id`, `object` and, if known, `relation` in
            words; default: the almanac's.
        dataset: Data set of the edits, as in the data module.
        path: Its file or URL.
        options: What its loader takes beyond these, such as '{"facts_per_subject": 8}'.
        size: Only so many edits.
        top: How many of the best texts are looked at.
        candidates: How many facts of the subject, and of the relation, the table is asked for.
        documents: How many documents of the almanac's text are read.

    Raises:
        KeditError: A file or folder cannot be used, a number is below 1, or no text names any of the subjects.
    """
    if min(top, candidates, documents) < 1:
        msg = f"expected top, candidates and documents of at least 1, got {top}, {candidates} and {documents}"
        raise KeditError(msg)
    if out.exists():
        msg = f"{out}: expected a new file to write, and this one is there already; give another one"
        raise KeditError(msg)
    edits = datasets.load(dataset, path, size=size, **(options or {}))
    table_of_facts = FactTable(read_facts(facts), candidates)
    written = write_sets(out, build(edits, read_documents(texts, documents), table_of_facts, top))
    skipped = len(edits) - written
    without = f"; no text names the subject of {count(skipped)}, skipped" if skipped else ""
    _say(f"{out}: word sets of {count(written)}{without}")


def _show_change(described: str, report: Record) -> None:
    """What was undone, whose success changed, and the metrics of the edits that stay."""
    console, others = get_console(), report["others"]
    for line in report["undone"][:SHOWN]:
        before, after, unedited = (quoted(line[f"answer_{when}"]) for when in ("before", "after", "unedited"))
        back = (", as unedited", "green") if after == unedited else (f", unedited {unedited}", "yellow")
        console.print(Text.assemble("undone: ", asked(line), f": {before} → {after}", back), soft_wrap=True)
    if (left := len(report["undone"]) - SHOWN) > 0:
        console.print(f"and {left} more", highlight=False)
    if not others:
        return
    flipped = changed(report)
    _say(f"{len(flipped) or 'none'} of the other {count(len(others))} changed in success{':' * bool(flipped)}")
    for line in flipped:
        console.print(edit_line(line, says(line["answer_after"], line["target_new"])), soft_wrap=True)
    console.print(table([(described, report)], console.width))


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


def _say(line: str) -> None:
    get_console().print(line, soft_wrap=True, highlight=False, markup=False)
