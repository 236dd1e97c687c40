"""What is asked of a model: `Edit`, one request, and `Site` and `Token`, the place in the model where it acts.

Everything here is plain Python: no model, no tokenizer, no framework.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from kedit_lightning.errors import DataError

Part = Literal["block", "attn", "mlp", "mlp_in"]
"""The output of a whole block, of its attention, of its feed-forward part, or of the first map of that part."""

SLOT = "{}"
"""What stands for the subject in a prompt, and for the prompt in a context template."""


class Token(StrEnum):
    """The token of a prompt at which a vector is read or added; the values are the field's own names."""

    SUBJECT_LAST = "subject_last"
    PROMPT_LAST = "last"
    SUBJECT_FIRST = "subject_first"
    SUBJECT_AFTER_LAST = "subject_first_after_last"


@dataclass(frozen=True)
class Site:
    """A place in the model: the output of one part of one layer.

    Attributes:
        layer: The layer, counted from 0.
        part: The whole block, its attention, its feed-forward part or the first map of that.
    """

    layer: int
    part: Part = "mlp"


@dataclass(frozen=True)
class Edit:
    """One request to rewrite a fact, together with the prompts it is evaluated on.

    Attributes:
        prompt: The edit prompt as a template with exactly one `{}` where the subject goes.
        subject: The subject of the fact.
        target_new: The answer wanted after the edit; the space before it is the scorer's business, not part of it.
        target_true: The present answer, where it is known.
        case_id: The record's own number; it need not be its position.
        relation_id: The relation of the fact, such as `P103`.
        target_new_id: Identifier of the new answer, such as `Q1860`.
        target_true_id: Identifier of the present answer.
        paraphrase_prompts: The same question in other words, complete strings.
        neighborhood_prompts: Questions on other subjects, whose answers must not change.
        neighborhood_targets: The gold answer of each neighborhood prompt (zsRE); empty means `target_true` for all.
        attribute_prompts: Questions on other subjects whose true answer is `target_new`.
        generation_prompts: Beginnings on the subject for free generation.
        relation_specific_prompts: Questions on the same subject in other relations, whose answers must not change.
        relation_specific_relations: The relation of each relation-specific prompt, where it is known.
        portability: What should follow from the edit, as (group, prompt, answer).
        locality: What must not change, as (group, prompt, answer).

    Raises:
        DataError: A field cannot be used; the sentence names it and what was expected.

    >>> Edit("The mother tongue of {} is", "Ann Example", "Dutch").text
    'The mother tongue of Ann Example is'
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    case_id: int = 0
    relation_id: str | None = None
    target_new_id: str | None = None
    target_true_id: str | None = None
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[str, ...] = ()
    neighborhood_targets: tuple[str, ...] = ()
    attribute_prompts: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    relation_specific_prompts: tuple[str, ...] = ()
    relation_specific_relations: tuple[str, ...] = ()
    portability: tuple[tuple[str, str, str], ...] = ()
    locality: tuple[tuple[str, str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no editor can use, in one sentence."""
        if (slots := self.prompt.count(SLOT)) != 1:
            msg = f"prompt must hold exactly one {{}} where the subject goes, found {slots} in {self.prompt!r}"
            raise DataError(msg)
        if not self.subject.strip():
            msg = f"subject is empty (prompt {self.prompt!r}); give the words that fill {{}}"
            raise DataError(msg)
        if self.text != self.text.rstrip():
            msg = f"prompt must not end in whitespace, got {self.text!r}; the space before the target is added later"
            raise DataError(msg)
        if not self.target_new.strip():
            msg = f"target_new is empty (prompt {self.text!r}); give the answer wanted after the edit"
            raise DataError(msg)
        if self.target_new != self.target_new.strip():
            msg = f"target_new must not begin or end in whitespace, got {self.target_new!r}; leave the space out"
            raise DataError(msg)
        for parallel, prompts in (
            ("neighborhood_targets", "neighborhood_prompts"),
            ("relation_specific_relations", "relation_specific_prompts"),
        ):
            got, wanted = len(getattr(self, parallel)), len(getattr(self, prompts))
            if got not in (0, wanted):
                msg = f"{parallel} must be empty or as long as {prompts} ({wanted}), got {got}"
                raise DataError(msg)

    @property
    def text(self) -> str:
        """The edit prompt with the subject in its slot; braces in the subject stay as they are."""
        return self.prompt.replace(SLOT, self.subject, 1)

    def fill(self, template: str) -> str:
        """Put the filled-in edit prompt into a context template.

        Args:
            template: A string with exactly one `{}`, such as `"Yes. {}"`.

        Returns:
            The template with its slot replaced by `text`.

        Raises:
            DataError: The template has no slot or several.
        """
        if (slots := template.count(SLOT)) != 1:
            msg = f"a context template must hold exactly one {{}} where the prompt goes, found {slots} in {template!r}"
            raise DataError(msg)
        return template.replace(SLOT, self.text)

    def as_record(self) -> dict[str, Any]:
        """The edit in CounterFact's form, ready for JSON; fields that hold nothing are left out.

        Returns:
            A record that the `counterfact` loader reads back as an equal edit.
        """
        rewrite: dict[str, Any] = {"prompt": self.prompt, "relation_id": self.relation_id, "subject": self.subject}
        rewrite["target_new"] = {"str": self.target_new, "id": self.target_new_id}
        if self.target_true is not None:
            rewrite["target_true"] = {"str": self.target_true, "id": self.target_true_id}
        lists = {
            name: [list(item) if isinstance(item, tuple) else item for item in getattr(self, name)]
            for name in (*PROMPT_LISTS, *GROUPED_LISTS)
        }
        return {"case_id": self.case_id, "requested_rewrite": rewrite} | {k: v for k, v in lists.items() if v}


PROMPT_LISTS = (
    "paraphrase_prompts",
    "neighborhood_prompts",
    "neighborhood_targets",
    "attribute_prompts",
    "generation_prompts",
    "relation_specific_prompts",
    "relation_specific_relations",
)
"""The fields of `Edit` that are lists of strings, in the order in which a record is written."""

GROUPED_LISTS = ("portability", "locality")
"""The fields of `Edit` that are lists of (group, prompt, answer)."""
