"""A task: how its records become prompts, and how what a model answers is scored."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any, Literal

import torch

from kedit_lightning.errors import DataError
from kedit_lightning.metrics.tasks import ClozeAccuracy, ExactMatch, RougeMean, contains_answer, exact_match, rouge
from kedit_lightning.tasks.reading import INVALID, Reader, first_word, only_word, script_counts

Scorer = Literal["strict", "contains", "likelihood", "legacy"]
"""How answers are read; see `tasks.suite.Tasks`."""

CUT = 13
"""Characters that the EAC script drops at the end of every summary: the length of GPT-2's end of text, there or not."""


@dataclass(frozen=True)
class Item:
    """One question to a model.

    Args:
        prompt: What the model continues.
        answers: What is accepted.
        shot: The prompt where the item is an example for others.
        label: The right option, where there are options.
    """

    prompt: str
    answers: tuple[str, ...]
    shot: str
    label: int = INVALID


@dataclass(frozen=True)
class Answer:
    """What a model made of an item.

    Args:
        item: The item.
        text: The continuation, up to the end of the text; for ``legacy``, which has it so, with the end-of-text token.
        nll: Mean NLL of each option, where there are options.
    """

    item: Item
    text: str
    nll: tuple[float, ...] = ()


@dataclass(frozen=True)
class Task(ABC):
    """What is asked and how; one line of `tasks.table`.

    Args:
        source: Where its records come from if nobody says otherwise; see `tasks.sources`.
        template: The prompt, with the record's fields in braces.
        field: The record's field with the answer.
        new_tokens: Length of the continuation.
        reserved: First records that are kept for examples.
        shot: The prompt of an example, where it differs.
        otherwise: The prompt for records that lack a field of the template.
        balanced: Whether records from a data set are balanced by class, in alternation.
    """

    source: str
    template: str
    field: str
    new_tokens: int
    reserved: int = 0
    shot: str = ""
    otherwise: str = ""
    balanced: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """Among which the model chooses; empty where it answers freely."""
        return ()

    @abstractmethod
    def scores(self, answers: Sequence[Answer], scorer: Scorer) -> tuple[str, dict[str, float]]:
        """Score answers.

        Args:
            answers: All answers, in the order of the data.
            scorer: How they are read.

        Returns:
            The name of the number that counts, and all numbers.
        """

    def item(self, record: Mapping[str, Any], legacy: bool = False) -> Item:
        """The question of a record.

        Args:
            record: Its fields.
            legacy: As the released script asks it, quirks included.

        Raises:
            DataError: A field is missing or of another type.
        """
        del legacy
        template = self.template
        if self.otherwise and any(name not in record for name in _fields(template)):
            template = self.otherwise
        shot = _fill(self.shot or template, record)
        return Item(_fill(template, record), self._answers(record), shot)

    def _answers(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        given = record.get(self.field)
        found = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else ()
        if not found or not all(isinstance(answer, str) for answer in found):
            msg = f"expected a text, or a list of texts, in the field {self.field!r}, got {given!r:.60}"
            raise DataError(msg)
        return found


@dataclass(frozen=True)
class Cloze(Task):
    """A choice among options: read off the generation, and off the options' likelihood.

    Args:
        says: What the model is to say, by class.
        classes: Names of the classes in the records, which may also give their number.
        measure: The number that counts.
        script: How the released script reads a generation.
        inverted: The released script has the two classes the wrong way round.
        tail: What the released script has after the prompt.
    """

    says: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    measure: Literal["accuracy", "f1"] = "accuracy"
    script: Reader = only_word
    inverted: bool = False
    tail: str = ""

    @property
    def options(self) -> tuple[str, ...]:
        """Among which the model chooses, by class."""
        return self.says

    def item(self, record: Mapping[str, Any], legacy: bool = False) -> Item:
        """The question of a record; see `Task.item`."""
        label = self._label(record)
        if legacy and self.inverted:
            label = len(self.says) - 1 - label
        item = super().item({**record, self.field: self.says[label]})
        return replace(item, prompt=item.prompt + self.tail * legacy, label=label)

    def _label(self, record: Mapping[str, Any]) -> int:
        given = str(record.get(self.field)).strip()
        names = [each.casefold() for each in self.classes]
        if given.isdecimal() and int(given) < len(names):
            return int(given)
        if given.casefold() in names:
            return names.index(given.casefold())
        known = ", ".join(f"{i} or {name}" for i, name in enumerate(self.classes))
        msg = f"expected a class in the field {self.field!r} ({known}), got {record.get(self.field)!r:.60}"
        raise DataError(msg)

    def scores(self, answers: Sequence[Answer], scorer: Scorer) -> tuple[str, dict[str, float]]:
        """Accuracy, F1 and MCC of each way to read the answers; see `Task.scores`."""
        readers: dict[str, Reader] = {"strict": first_word, "contains": only_word}
        if scorer == "legacy":
            readers = {"legacy": self.script}
        labels = torch.tensor([answer.item.label for answer in answers])
        read = {
            name: [reader(answer.text, self.says, answer.item.label) for answer in answers]
            for name, reader in readers.items()
        }
        read["likelihood"] = [likeliest(answer.nll) for answer in answers]
        numbers: dict[str, float] = {}
        for name, predictions in read.items():
            metric = ClozeAccuracy(len(self.says))
            metric.update(torch.tensor(predictions), labels)
            numbers |= {f"{name}/{key}": value for key, value in metric.compute().items()}
        return f"{scorer}/{self.measure}", numbers


@dataclass(frozen=True)
class Question(Task):
    """An open question, with the answers that are accepted."""

    def scores(self, answers: Sequence[Answer], scorer: Scorer) -> tuple[str, dict[str, float]]:
        """The share of exact matches; likelihood does not apply and counts as strict. See `Task.scores`."""
        if scorer == "legacy":
            counts = script_counts([a.item.prompt + a.text for a in answers], [a.item.answers for a in answers])
            return "legacy", {"legacy": sum(counts) / len(counts)}
        strict, contains = (
            torch.tensor([float(match(answer.text, answer.item.answers)) for answer in answers])
            for match in (exact_match, contains_answer)
        )
        metric = ExactMatch()
        metric.update(torch.arange(len(answers)), strict, contains)
        numbers = {name: summary.mean for name, summary in metric.compute().items()}
        return "contains" if scorer == "contains" else "strict", numbers


@dataclass(frozen=True)
class Summarisation(Task):
    """A summary, compared with that of a person."""

    def scores(self, answers: Sequence[Answer], scorer: Scorer) -> tuple[str, dict[str, float]]:
        """Mean of ROUGE-1, ROUGE-2 and ROUGE-L. See `Task.scores`.

        Legacy reads what follows the last "DR:", without its last 13 characters: the end-of-text token of GPT-2, or of
        a summary that has none, its own. The script's package counts n-grams as sets; that is not reproduced.
        """
        texts = [answer.text for answer in answers]
        if scorer == "legacy":
            texts = [text.split("DR:")[-1][:-CUT] for text in texts]
            texts = [text if len(text) > 1 else "" for text in texts]
        metric = RougeMean()
        found = [rouge(text, answer.item.answers[0]) for text, answer in zip(texts, answers, strict=True)]
        metric.update(torch.arange(len(answers)), torch.tensor(found))
        return "rouge", {name: summary.mean for name, summary in metric.compute().items()}


def likeliest(nll: Sequence[float]) -> int:
    """The option with the lowest mean NLL; none where it is shared or not a number.

    >>> likeliest((2.0, 1.0)), likeliest((1.0, 1.0)), likeliest((float("nan"), 1.0))
    (1, -1, -1)
    """
    best = [i for i, value in enumerate(nll) if all(value <= other for other in nll)]
    return best[0] if len(best) == 1 else INVALID


def _fields(template: str) -> list[str]:
    """The fields that a template names, without what it picks of them."""
    return [re.split(r"[.\[]", name)[0] for _, name, _, _ in Formatter().parse(template) if name]


def _fill(template: str, record: Mapping[str, Any]) -> str:
    """The template with the record's texts in it.

    Raises:
        DataError: A field is missing or no text.
    """
    for name in _fields(template):
        value = record.get(name)
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            msg = f"expected a text in the field {name!r}, got {'no such field' if value is None else repr(value)[:60]}"
            raise DataError(msg)
    try:
        return template.format_map(record)
    except (IndexError, TypeError) as error:
        named = " and ".join(dict.fromkeys(repr(name) for name in _fields(template)))
        msg = f"expected more entries in the lists of the fields {named}"
        raise DataError(msg) from error
