"""One record to one `Edit`: CounterFact's nested form, one's own flat form, and zsRE's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

from kedit_lightning.edits import GROUPED_LISTS, PROMPT_LISTS, SLOT, Edit
from kedit_lightning.errors import DataError

Record = Mapping[str, Any]
"""A record's fields, as they stand in the file."""

_NO_ANSWER = ("", "<|endoftext|>")
"""What released files hold where there is no present answer; it is never scored."""

_ALIASES = MappingProxyType(
    {
        "target_true": "ground_truth",
        "paraphrase_prompts": "rephrase_prompt",
        "neighborhood_prompts": "locality_prompt",
        "neighborhood_targets": "locality_ground_truth",
    }
)
"""EasyEdit's names for fields of ours."""

_FACT = ("prompt", "subject", "relation_id", "target_new", "target_true", "target_new_id", "target_true_id")
"""Fields of a fact."""

_BESIDE = ("case_id", "requested_rewrite", *PROMPT_LISTS, *GROUPED_LISTS)
"""Fields beside the fact."""

_NEAR = 0.85
"""How alike (difflib's ratio) an unknown field and a known one are if it is misspelt rather than the file's own."""

_NQ = "nq question: "


def edit_from_record(record: Record, position: int = 0) -> Edit:
    """Make an edit of a record in CounterFact's form or in one's own flat form.

    The fact (prompt, subject, relation_id, target_new, target_true) stands in `requested_rewrite` or beside the other
    fields; a target is a string or `{"str": …, "id": …}`; a prompt without a slot is complete and gets its slot where
    the subject first occurs. All but prompt, subject and target_new may be missing; further fields are ignored, unless
    they look like a misspelt one.

    Args:
        record: The record's fields.
        position: Its place in the file, the case id where the record has none.

    Returns:
        The edit.

    Raises:
        DataError: A field is missing, misspelt or cannot be used.
    """
    fact = record.get("requested_rewrite", record)
    if not isinstance(fact, Mapping):
        msg = f"field `requested_rewrite` must be an object, got {_shown(fact)}"
        raise DataError(msg)
    subject = _text(fact, "subject")
    target_new, target_new_id = _target(fact, "target_new")
    target_true, target_true_id = _target(fact, "target_true")
    if target_new is None:
        raise _missing(fact, "target_new")
    _check_spelling({*record, *fact})
    lists: dict[str, Any] = {name: _texts(record, name) for name in PROMPT_LISTS}
    lists |= {name: _triples(record, name) for name in GROUPED_LISTS}
    return Edit(
        prompt=_with_slot(_text(fact, "prompt"), subject),
        subject=subject,
        target_new=target_new,
        target_true=None if target_true in _NO_ANSWER else target_true,
        case_id=_whole_number(record, "case_id", position),
        relation_id=_optional_text(fact, "relation_id"),
        target_new_id=target_new_id,
        target_true_id=target_true_id,
        **lists,
    )


def edit_from_zsre(
    record: Record,
    position: int = 0,
    *,
    target: Literal["answers", "alt"] = "answers",
    answer_prefix: str = "",
    loc_prefix: str | None = None,
    loc_suffix: str = "?",
) -> Edit | None:
    """Make an edit of a zsRE record in MEND's form; the options are those of `datasets.zsre`.

    Args:
        record: The record's fields: subject, src, rephrase, alt, answers, loc, loc_ans.
        position: Its place in the file, the case id.
        target: Which answer to edit towards.
        answer_prefix: Put before every answer.
        loc_prefix: Replaces the `nq question: ` of the neighborhood question.
        loc_suffix: Ends the neighborhood question.

    Returns:
        The edit, or None where `alt` is asked for and the record has none.

    Raises:
        DataError: A field is missing or cannot be used.
    """
    answers = _texts(record, "answers")
    if not answers:
        raise _missing(record, "answers")
    answer = alternative = answers[0].strip()
    if target == "alt":
        alternative = _text(record, "alt").strip()
        if not alternative:
            return None
    subject, loc = _text(record, "subject"), _text(record, "loc")
    if loc_prefix is not None:
        loc = loc_prefix + loc.removeprefix(_NQ)
    return Edit(
        prompt=_with_slot(_text(record, "src"), subject),
        subject=subject,
        target_new=answer_prefix + alternative,
        target_true=answer_prefix + answer if target == "alt" else None,
        case_id=_whole_number(record, "case_id", position),
        paraphrase_prompts=_texts(record, "rephrase"),
        neighborhood_prompts=(loc.removesuffix(loc_suffix) + loc_suffix,),
        neighborhood_targets=(answer_prefix + _text(record, "loc_ans").strip(),),
    )


def snippets_from_record(record: Record) -> tuple[str, str, list[str]]:
    """Take the reference texts of one property out of a record of `attribute_snippets.json`.

    Args:
        record: The record's fields: relation_id, target_id, samples.

    Returns:
        The relation and the target they belong to, and the texts.

    Raises:
        DataError: A field is missing or cannot be used.
    """
    samples = record.get("samples")
    if not isinstance(samples, list) or not all(isinstance(sample, Mapping) for sample in samples):
        msg = f"field `samples` must be a list of objects with a text, got {_shown(samples)}"
        raise DataError(msg)
    return _text(record, "relation_id"), _text(record, "target_id"), [_text(sample, "text") for sample in samples]


def _with_slot(prompt: str, subject: str) -> str:
    """The prompt as a template: as it is, or with a slot where the subject first occurs."""
    if SLOT in prompt or not subject.strip():
        return prompt
    if subject not in prompt:
        msg = f"prompt has neither {{}} nor the subject {subject!r} in it: {prompt!r}"
        raise DataError(msg)
    return prompt.replace(subject, SLOT, 1)


def _check_spelling(names: Iterable[str]) -> None:
    """Refuse a field that would be ignored and looks like one that would not."""
    known = (*_FACT, *_BESIDE, *_ALIASES.values())
    for name in sorted(set(names) - set(known)):
        if near := difflib.get_close_matches(name, known, n=1, cutoff=_NEAR):
            msg = f"unknown field `{name}`; did you mean `{near[0]}`?"
            raise DataError(msg)


def _missing(record: Record, name: str) -> DataError:
    return DataError(f"field `{name}` is missing; the record has {', '.join(sorted(record)) or 'no fields'}")


def _shown(value: object) -> str:
    """A value and its type, short enough for one line."""
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _get(record: Record, name: str) -> Any:  # noqa: ANN401 - whatever JSON holds
    value = record.get(name)
    return record.get(_ALIASES[name]) if value is None and name in _ALIASES else value


def _optional_text(record: Record, name: str) -> str | None:
    value = _get(record, name)
    if value is not None and not isinstance(value, str):
        msg = f"field `{name}` must be text, got {_shown(value)}"
        raise DataError(msg)
    return value


def _text(record: Record, name: str) -> str:
    value = _optional_text(record, name)
    if value is None:
        raise _missing(record, name)
    return value


def _target(record: Record, name: str) -> tuple[str | None, str | None]:
    """An answer and its identifier, given as a string (identifier beside it) or as `{"str": …, "id": …}`."""
    value = _get(record, name)
    if isinstance(value, Mapping):
        return _text(value, "str").strip(), _optional_text(value, "id")
    text = _optional_text(record, name)
    return None if text is None else text.strip(), _optional_text(record, f"{name}_id")


def _texts(record: Record, name: str) -> tuple[str, ...]:
    """A list of strings, or one string that stands for a list of one; nothing where the field is missing."""
    value = _get(record, name)
    items = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        msg = f"field `{name}` must be a list of texts, got {_shown(value)}"
        raise DataError(msg)
    return tuple(items)


def _triples(record: Record, name: str) -> tuple[tuple[str, str, str], ...]:
    items = _get(record, name) or []
    if not isinstance(items, list):
        items = [items]
    triples = []
    for item in items:
        if not (isinstance(item, list) and len(item) == 3 and all(isinstance(part, str) for part in item)):
            msg = f"field `{name}` must be a list of [group, prompt, answer], got {_shown(item)}"
            raise DataError(msg)
        triples.append((item[0], item[1], item[2]))
    return tuple(triples)


def _whole_number(record: Record, name: str, default: int) -> int:
    value = record.get(name)
    if value is None:
        return default
    if not isinstance(value, int):
        msg = f"field `{name}` must be a whole number, got {_shown(value)}"
        raise DataError(msg)
    return value
