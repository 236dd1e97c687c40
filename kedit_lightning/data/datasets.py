"""Edits from files: CounterFact and its relatives, zsRE, one's own JSONL, and the almanac.

Every loader is a function from a path to a list of `Edit`. A record that cannot be used is named by file, place and
reason; with `on_bad_record="skip"` it is left out, counted and logged instead of ending the run.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kedit_lightning.data.files import as_object, numbered, read
from kedit_lightning.data.protocols import question
from kedit_lightning.data.records import Record, edit_from_record, edit_from_zsre, snippets_from_record
from kedit_lightning.edits import Edit
from kedit_lightning.errors import DataError

OnBadRecord = Literal["raise", "skip"]
"""What becomes of a record that cannot be used."""

ReferenceTexts = Mapping[str, Mapping[str, Sequence[Mapping[str, str]]]]
"""Relation id → target id → texts on entities that have this property, each a mapping with the key `text`."""

_log = logging.getLogger(__name__)
_RELEASED = "https://rome.baulab.info/data/dsets"


def load(
    name: str,
    path: Path | str | None = None,
    *,
    size: int | None = None,
    on_bad_record: OnBadRecord = "raise",
    **options: Any,
) -> list[Edit]:
    """Load a data set by its name.

    Args:
        name: `counterfact`, `multi_counterfact`, `counterfact_rs`, `zsre`, `jsonl` or `almanac`.
        path: A JSON list or JSONL, local or an `http(s)` address; `None` downloads the released file where there is
            one. The almanac takes no path.
        size: Keep the first so many edits; `None` keeps all.
        on_bad_record: `raise` at the first record that cannot be used, or `skip`, count and log such records.
        **options: What the loader of that name takes beyond these.

    Returns:
        The edits in file order.

    Raises:
        DataError: The name, an option, the file or a record cannot be used.
    """
    _check_choice("data set", name, LOADERS)
    _check_choice("on_bad_record", on_bad_record, ("raise", "skip"))
    _check_size(size)
    takes = set(inspect.signature(LOADERS[name]).parameters) - {"path", "size", "on_bad_record"}
    if unknown := set(options) - takes:
        msg = f"data set {name!r} has no option {min(unknown)!r}; it takes {', '.join(sorted(takes)) or 'none'}"
        raise DataError(msg)
    types = get_type_hints(LOADERS[name])
    for option, value in options.items():
        _check_type(f"options.{option} of {name}", option, value, types[option])
    return LOADERS[name](path, size=size, on_bad_record=on_bad_record, **options)


def inline(records: Sequence[Record], *, size: int | None = None, on_bad_record: OnBadRecord = "raise") -> list[Edit]:
    """Edits from records at hand, such as those written out in a configuration, in any form that `jsonl` reads."""
    _check_size(size)
    return _collect("edits", numbered(records), edit_from_record, size, on_bad_record)


def counterfact(
    path: Path | str | None = None, *, size: int | None = None, on_bad_record: OnBadRecord = "raise"
) -> list[Edit]:
    """CounterFact (arXiv 2202.05262); arguments as in `load`. Some of its facts conflict: for single edits only."""
    path = path or f"{_RELEASED}/counterfact.json"
    return _collect(path, read(path), edit_from_record, size, on_bad_record)


def multi_counterfact(
    path: Path | str | None = None, *, size: int | None = None, on_bad_record: OnBadRecord = "raise"
) -> list[Edit]:
    """CounterFact for mass editing (arXiv 2210.07229); arguments as in `load`.

    Of facts with the same subject and relation (where no relation is given: the same template) the first is kept;
    how many were dropped is logged.
    """
    path = path or f"{_RELEASED}/multi_counterfact.json"
    return _collect(path, read(path), edit_from_record, size, on_bad_record, drop_conflicts=True)


def counterfact_rs(
    path: Path | str | None = None, *, size: int | None = None, on_bad_record: OnBadRecord = "raise"
) -> list[Edit]:
    """CounterFact with prompts on other relations of the same subject (RETS); arguments as in `load`."""
    if path is None:
        msg = (
            "counterfact_rs has no address to download from: take dataset/counterfact_rs.json out of the "
            "repository github.com/sunshower-liu/RETS and give its path"
        )
        raise DataError(msg)
    return _collect(path, read(path), edit_from_record, size, on_bad_record)


def zsre(
    path: Path | str | None = None,
    *,
    size: int | None = None,
    on_bad_record: OnBadRecord = "raise",
    target: Literal["answers", "alt"] = "answers",
    answer_prefix: str = "",
    loc_prefix: str | None = None,
    loc_suffix: str = "?",
) -> list[Edit]:
    """The zsRE questions in MEND's form (arXiv 2110.11309); the first three arguments as in `load`.

    Args:
        path: The file; `None` downloads `zsre_mend_eval.json`.
        size: Keep the first so many edits.
        on_bad_record: What becomes of a record that cannot be used.
        target: Edit towards the right answer (`answers`, as ROME and MEMIT do; there is no present answer to compare
            with) or a wrong one (`alt`, as EasyEdit and EAC do; records without one are left out and counted).
        answer_prefix: Put before every answer; the joining space is the scorer's and never part of it.
        loc_prefix: Replaces the `nq question: ` before the neighborhood questions; `None` keeps the file's own.
        loc_suffix: Ends the neighborhood questions, which have no question mark in the file.
    """
    path = path or f"{_RELEASED}/zsre_mend_eval.json"
    parse = partial(
        edit_from_zsre, target=target, answer_prefix=answer_prefix, loc_prefix=loc_prefix, loc_suffix=loc_suffix
    )
    return _collect(path, read(path), parse, size, on_bad_record)


def jsonl(
    path: Path | str | None = None, *, size: int | None = None, on_bad_record: OnBadRecord = "raise"
) -> list[Edit]:
    """One's own edits, a JSON object a line (or a JSON list); arguments as in `load`.

    Needed: `prompt` (with one `{}`, or complete with the subject in it), `subject` and `target_new`. Every other field
    of `Edit` may stand beside them; CounterFact's nested form and EasyEdit's flat names are read as well.
    """
    if path is None:
        msg = "jsonl needs a path: one JSON object a line with prompt, subject and target_new"
        raise DataError(msg)
    return _collect(path, read(path), edit_from_record, size, on_bad_record)


def almanac(
    path: None = None,
    *,
    size: int | None = None,
    on_bad_record: OnBadRecord = "raise",
    facts_per_subject: int = 1,
    seed: int = 0,
    skip_subjects: int = 0,
) -> list[Edit]:
    """Edits of the embedded world, generated; up to `facts_per_subject` facts of one subject, chosen by `seed`.

    With one seed the order of the subjects is one, so that what `skip_subjects` leaves is disjoint from the first so
    many edits with one fact a subject: facts to train on, and others to edit.
    """
    if path is not None:
        msg = f"the almanac is generated and takes no path, got {str(path)!r}; leave it out"
        raise DataError(msg)
    from kedit_lightning import almanac as world

    try:
        found = world.records(n=size, facts_per_subject=facts_per_subject, seed=seed, skip_subjects=skip_subjects)
    except ValueError as error:
        msg = f"almanac, size, options.facts_per_subject or options.skip_subjects: {error}"
        raise DataError(msg) from error
    return _collect("almanac", numbered(found), edit_from_record, size, on_bad_record)


LOADERS: Mapping[str, Callable[..., list[Edit]]] = MappingProxyType(
    {loader.__name__: loader for loader in (almanac, counterfact, multi_counterfact, counterfact_rs, zsre, jsonl)}
)
"""The loaders by name."""


def reference_texts(source: Path | str | None) -> ReferenceTexts | None:
    """Texts that an edited model's own should resemble (consistency).

    Args:
        source: `almanac`, or a file in the form of ROME's `attribute_snippets.json`; None where there is none.

    Returns:
        The texts by relation and target, None without a source.

    Raises:
        DataError: The file or a record cannot be used.
    """
    if source is None:
        return None
    if source == "almanac":
        from kedit_lightning import almanac as world

        return world.reference_texts()
    texts: dict[str, dict[str, list[dict[str, str]]]] = {}
    for where, raw in read(source):
        try:
            relation, target, found = snippets_from_record(as_object(raw))
        except DataError as error:
            raise DataError(error.reason, file=source, record=where) from error
        texts.setdefault(relation, {}).setdefault(target, []).extend({"text": text} for text in found)
    return texts


def _check_size(size: int | None) -> None:
    if size is not None and size < 1:
        msg = f"size must be at least 1, or null for all edits; got {size}"
        raise DataError(msg)


def _check_choice(what: str, value: object, choices: Iterable[str]) -> None:
    if value not in list(choices):
        msg = f"unknown {what} {value!r}; expected one of {', '.join(choices)}"
        raise DataError(msg)


def _check_type(where: str, name: str, value: object, wanted: Any) -> None:  # noqa: ANN401 - any annotation
    """Refuse what a loader's annotation (a class, a union of classes, a literal) does not allow."""
    if get_origin(wanted) is Literal:
        _check_choice(name, value, get_args(wanted))
    elif type(value) not in (get_args(wanted) or (wanted,)):
        legal = inspect.formatannotation(wanted).replace("None", "null")
        msg = f"{where}: expected {legal}, got {'null' if value is None else repr(value)}"
        raise DataError(msg)


def _collect(
    source: Path | str,
    records: Iterable[tuple[str, Any]],
    parse: Callable[[Record, int], Edit | None],
    size: int | None,
    on_bad_record: OnBadRecord,
    *,
    drop_conflicts: bool = False,
) -> list[Edit]:
    """Parse records until there are enough edits; say what was left out and why."""
    edits: list[Edit] = []
    seen: set[tuple[str, str]] = set()
    left_out: Counter[str] = Counter()
    read_so_far = 0
    for read_so_far, (where, raw) in enumerate(records, 1):
        try:
            edit = parse(as_object(raw), read_so_far - 1)
        except DataError as error:
            named = DataError(error.reason, file=source, record=where)
            if on_bad_record == "raise":
                raise named from error
            _log.warning("skipped %s", named)
            left_out["could not be used"] += 1
            continue
        if edit is None:
            left_out["had no alternative answer"] += 1
            continue
        if drop_conflicts and question(edit) in seen:
            left_out["conflicted with an earlier one"] += 1
            continue
        seen.add(question(edit))
        edits.append(edit)
        if len(edits) == size:
            break
    for why, count in left_out.items():
        _log.warning("%s: left out %d of %d records that %s", source, count, read_so_far, why)
    if not edits:
        msg = f"none of {read_so_far} records can be used; on_bad_record: raise shows the reason of the first"
        raise DataError(msg, file=source)
    return edits
