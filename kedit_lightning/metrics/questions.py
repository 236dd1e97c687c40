"""From edits to questions: what each rewriting metric asks of the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from kedit_lightning.edits import Edit
from kedit_lightning.metrics.scorer import Forced


@dataclass(frozen=True)
class Question:
    """One prompt and the two answers that a metric compares.

    Args:
        case: Identity of the edit, from `identity`.
        prompt: The prompt.
        new: The new target; None where it is not compared.
        other: What it is compared with: the true answer, or the unedited model's next token; None where there is none.
        top: What the unedited model finds likeliest there: the next token, for relation specificity, or each token of
            the true answer, for locality.
    """

    case: int
    prompt: str = ""
    new: str | None = None
    other: str | int | None = None
    top: int | Forced | None = None


@dataclass(frozen=True)
class Reference:
    """What the unedited model says to the prompts of an edit that are to stay as they are.

    Args:
        relations: To each relation-specific prompt its content token and its likeliest token.
        neighborhood: To each neighborhood prompt that has a true answer the likeliest token at each token of it.
    """

    relations: Sequence[Sequence[int]] = ()
    neighborhood: Sequence[Sequence[int]] = ()


References = Mapping[int, Reference]
"""By edit (`identity`)."""


def identity(edit: Edit) -> int:
    """A number that tells edits apart, the same in every process; case ids alone may repeat in one's own data."""
    text = "\0".join((str(edit.case_id), edit.text, edit.target_new))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def golden(edit: Edit) -> list[tuple[str, str]]:
    """The neighborhood prompts that have a true answer, with it."""
    gold = edit.neighborhood_targets or (edit.target_true,) * len(edit.neighborhood_prompts)
    return [(prompt, answer) for prompt, answer in zip(edit.neighborhood_prompts, gold, strict=True) if answer]


def edited_relations(edits: Sequence[Edit]) -> set[tuple[str, str]]:
    """(subject in lower case, relation) of each edit that names its relation."""
    return {(edit.subject.lower(), edit.relation_id) for edit in edits if edit.relation_id is not None}


def questions(edit: Edit, references: References, edited: Set[tuple[str, str]]) -> dict[str, list[Question]]:
    """What is asked about one edit, by metric; a single empty question where the record has nothing to ask.

    Args:
        edit: The edit.
        references: What the unedited model said to relation-specific prompts; prompts without are left out.
        edited: From `edited_relations`, of all edits made together: their relations of this subject are left out of
            relation specificity, for there the answer was meant to change.
    """
    case, new, true = identity(edit), edit.target_new, edit.target_true or None
    reference = references.get(case, Reference())
    neighborhood = golden(edit)
    said = reference.neighborhood or (None,) * len(neighborhood)
    relations: tuple[str | None, ...] = edit.relation_specific_relations or (None,) * len(
        edit.relation_specific_prompts
    )
    found = {
        "efficacy": [Question(case, edit.text, new, true)],
        "generalization": [Question(case, prompt, new, true) for prompt in edit.paraphrase_prompts],
        "s_specificity": [
            # Without target_true (zsRE) the neighborhood has an accuracy only, no comparison.
            Question(
                case, prompt, new if true is not None else None, answer, Forced(answer, tuple(ids)) if ids else None
            )
            for (prompt, answer), ids in zip(neighborhood, said, strict=True)
        ],
        "r_specificity": [
            Question(case, prompt, new, content, top)
            for prompt, relation, (content, top) in zip(
                edit.relation_specific_prompts, relations, reference.relations, strict=bool(reference.relations)
            )
            if relation is None or (edit.subject.lower(), relation) not in edited
        ],
    }
    return {name: asked or [Question(case)] for name, asked in found.items()}
